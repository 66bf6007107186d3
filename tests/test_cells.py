"""The cells against Keras's formulas, written per gate in NumPy float64."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrnn import cells, rnn

GOLDEN = Path(__file__).parent / "golden" / "layers.npz"
B, T, D, H = 3, 7, 4, 5
MAKERS = {"simple_rnn": cells.simple_rnn, "gru": cells.gru, "lstm": cells.lstm}
GATES = {"simple_rnn": 1, "gru": 3, "lstm": 4}
STATES = {"simple_rnn": 1, "gru": 1, "lstm": 2}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def gate(params, position):
    """Column block `position` of each parameter, in float64."""
    block = slice(position * H, (position + 1) * H)
    return [np.asarray(params[name], np.float64)[..., block] for name in sorted(params)[::-1]]


def simple_rnn_reference(params, x, states):
    u, w, b = gate(params, 0)
    h = np.tanh(x @ w + states[0] @ u + b)
    return h, [h]


def gru_reference(params, x, states):
    (h,) = states
    (uz, wz, bz), (ur, wr, br), (uh, wh, bh) = (gate(params, k) for k in range(3))
    z = sigmoid(x @ wz + bz[0] + h @ uz + bz[1])
    r = sigmoid(x @ wr + br[0] + h @ ur + br[1])
    candidate = np.tanh(x @ wh + bh[0] + r * (h @ uh + bh[1]))
    h = z * h + (1 - z) * candidate
    return h, [h]


def lstm_reference(params, x, states):
    h, c = states
    (ui, wi, bi), (uf, wf, bf), (ug, wg, bg), (uo, wo, bo) = (gate(params, k) for k in range(4))
    i = sigmoid(x @ wi + h @ ui + bi)
    f = sigmoid(x @ wf + h @ uf + bf)
    o = sigmoid(x @ wo + h @ uo + bo)
    c = f * c + i * np.tanh(x @ wg + h @ ug + bg)
    h = o * np.tanh(c)
    return h, [h, c]


REFERENCES = {"simple_rnn": simple_rnn_reference, "gru": gru_reference, "lstm": lstm_reference}


def scanned(step, x, states):
    """All outputs `[B, T, H]` and the last states, by a plain scan."""

    def body(carry, input_t):
        output, new = step(input_t, carry)
        return new, output

    states, outputs = jax.lax.scan(body, states, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(outputs, 0, 1), states


def looped(step, params, x, states):
    x, states = np.asarray(x, np.float64), [np.asarray(s, np.float64) for s in states]
    outputs = []
    for t in range(x.shape[1]):
        output, states = step(params, x[:, t], states)
        outputs.append(output)
    return np.stack(outputs, axis=1), states


def random_params(name, seed=0):
    """Parameters without structure: no zero bias, no symmetry that would hide a swapped gate."""
    rng = np.random.default_rng(seed)
    columns = GATES[name] * H
    bias_shape = (2, columns) if name == "gru" else (columns,)
    shapes = {"kernel": (D, columns), "recurrent_kernel": (H, columns), "bias": bias_shape}
    return {k: jnp.asarray(rng.normal(size=s) * 0.7, jnp.float32) for k, s in shapes.items()}


def random_inputs(name, seed=1):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    states = [jnp.asarray(rng.normal(size=(B, H)), jnp.float32) for _ in range(STATES[name])]
    return x, states


@pytest.mark.parametrize("name", MAKERS)
def test_outputs_and_states_follow_keras_formulas(name):
    params, (x, states) = random_params(name), random_inputs(name)
    actual = scanned(MAKERS[name](H).step(params), x, states)
    expected = looped(REFERENCES[name], params, x, states)
    chex.assert_trees_all_equal_dtypes(actual, (x, states))
    chex.assert_trees_all_close(jax.tree.map(np.float64, actual), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_weights_of_a_keras_layer_give_its_results(name):
    with np.load(GOLDEN) as golden:
        arrays = {key: golden[key] for key in golden.files}
    weights = [arrays[f"{name}/weights/{k}"] for k in range(3)]
    initial, expected = (
        [arrays[f"{name}/{group}/{k}"] for k in range(STATES[name])]
        for group in ("initial", "states")
    )
    params = dict(zip(("kernel", "recurrent_kernel", "bias"), weights, strict=True))
    cell = MAKERS[name](initial[0].shape[-1])
    _, outputs, states = rnn(cell.step(params), arrays["inputs"], initial)
    np.testing.assert_allclose(outputs, arrays[f"{name}/outputs"], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(states, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_without_bias_equals_a_bias_of_zeros(name):
    params, (x, states) = random_params(name), random_inputs(name)
    zeroed = params | {"bias": jnp.zeros_like(params["bias"])}
    del params["bias"]
    actual = scanned(MAKERS[name](H, use_bias=False).step(params), x, states)
    expected = scanned(MAKERS[name](H).step(zeroed), x, states)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=1e-7)
    created = MAKERS[name](H, use_bias=False).init(jax.random.key(0), D)
    chex.assert_trees_all_equal_shapes_and_dtypes(created, params)


@pytest.mark.parametrize(("name", "order"), [("gru", "zrh"), ("lstm", "ifgo")])
def test_each_gate_alone_does_what_its_name_says(name, order):
    """Saturates one gate's bias at a time: a swap of any two gates changes the result."""
    cell = MAKERS[name](H)
    zeros = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), D))
    h = jnp.full((B, H), 0.25)
    states = [h, jnp.full((B, H), 0.75)][: STATES[name]]
    x = jnp.zeros((B, D))
    c = states[-1]

    def result(letter):
        block = slice(order.index(letter) * H, (order.index(letter) + 1) * H)
        bias = zeros["bias"].at[..., block].set(50.0 / zeros["bias"].ndim)
        return cell.step(zeros | {"bias": bias})(x, states)[1][-1]

    half = 0.5
    if name == "gru":
        # Candidate tanh(0) = 0 unless its own bias is set; then 25 + r * 25 saturates it.
        expected = {"z": h, "r": half * h, "h": half * h + half}
    else:
        expected = {"i": half * c, "f": c, "g": half * c + half, "o": half * c}
    for letter in order:
        np.testing.assert_allclose(result(letter), expected[letter], rtol=1e-6)
    if name == "lstm":
        block = slice(3 * H, 4 * H)
        open_output = cell.step(zeros | {"bias": zeros["bias"].at[block].set(50.0)})(x, states)[0]
        np.testing.assert_allclose(open_output, jnp.tanh(half * c), rtol=1e-6)


def test_gru_resets_after_the_matmul():
    """With r closed, the recurrent bias d_h goes too; reset before the matmul would keep it."""
    cell = cells.gru(H)
    params = random_params("gru")
    bias = params["bias"].at[:, H : 2 * H].set(-50.0).at[:, :H].set(-50.0)
    x, states = random_inputs("gru")
    output, _ = cell.step(params | {"bias": bias})(x[:, 0], states)
    _, w, b = gate(params, 2)
    np.testing.assert_allclose(output, np.tanh(np.asarray(x[:, 0]) @ w + b[0]), rtol=1e-5)


def test_sigmoid_by_tanh_is_exact():
    """Reads the forget gate off an LSTM over a fine grid of pre-activations."""
    z = np.linspace(-30, 30, 20001, dtype=np.float32)[:, None]
    cell = cells.lstm(1, use_bias=False)
    kernel = jnp.array([[0.0, 1.0, 0.0, 0.0]])
    step = cell.step({"kernel": kernel, "recurrent_kernel": jnp.zeros((1, 4))})
    _, (_, c) = step(jnp.asarray(z), [jnp.zeros_like(z), jnp.ones_like(z)])
    np.testing.assert_allclose(c, jax.nn.sigmoid(z), rtol=0, atol=2e-7)


def test_an_activation_is_a_function_and_no_name_of_one():
    with pytest.raises(TypeError, match=r"activation is 'tanh'; expected a function"):
        cells.simple_rnn(H, "tanh")


def test_simple_rnn_takes_another_activation():
    params, (x, states) = random_params("simple_rnn"), random_inputs("simple_rnn")
    output, _ = cells.simple_rnn(H, jax.nn.relu).step(params)(x[:, 0], states)
    u, w, b = gate(params, 0)
    z = np.asarray(x[:, 0]) @ w + np.asarray(states[0]) @ u + b
    np.testing.assert_allclose(output, np.maximum(z, 0), rtol=1e-5, atol=1e-6)


def naive_lstm(params):
    """Split first, then activate with jax.nn.sigmoid."""

    def step(x, states):
        h, c = states
        z = x @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"]
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return h, [h, c]

    return step


def naive_gru(params):
    def step(x, states):
        (h,) = states
        xz, xr, xh = jnp.split(x @ params["kernel"] + params["bias"][0], 3, axis=-1)
        hz, hr, hh = jnp.split(h @ params["recurrent_kernel"] + params["bias"][1], 3, axis=-1)
        z, r = jax.nn.sigmoid(xz + hz), jax.nn.sigmoid(xr + hr)
        h = z * h + (1 - z) * jnp.tanh(xh + r * hh)
        return h, [h]

    return step


@pytest.mark.parametrize(("name", "naive"), [("gru", naive_gru), ("lstm", naive_lstm)])
def test_gradients_equal_those_of_a_naive_step(name, naive):
    params, (x, states) = random_params(name), random_inputs(name)

    def loss(make):
        def of(params, x, states):
            outputs, last = scanned(make(params), x, states)
            return jnp.sum(jnp.sin(outputs)) + sum(jnp.sum(s**2) for s in last)

        return jax.grad(of, argnums=(0, 1, 2))

    actual = loss(MAKERS[name](H).step)(params, x, states)
    expected = loss(naive)(params, x, states)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_one_matmul_for_each_left_side(name):
    params, (x, states) = random_params(name), random_inputs(name)
    jaxpr = jax.make_jaxpr(MAKERS[name](H).step(params))(x[:, 0], states)
    primitives = [equation.primitive.name for equation in jaxpr.jaxpr.eqns]
    assert primitives.count("dot_general") == 2
    assert primitives.count("tanh") == {"simple_rnn": 1, "gru": 2, "lstm": 2}[name]


@pytest.mark.parametrize("name", MAKERS)
def test_init_draws_keras_defaults(name):
    features, units = 60, 40
    columns = GATES[name] * units
    params = MAKERS[name](units).init(jax.random.key(3), features)
    bias_shape = (2, columns) if name == "gru" else (columns,)
    chex.assert_shape(params["kernel"], (features, columns))
    chex.assert_shape(params["bias"], bias_shape)

    # Uniform within the Glorot limit and filling it: the variance tells it from a narrower draw.
    limit = np.sqrt(6 / (features + columns))
    kernel = np.asarray(params["kernel"])
    assert np.abs(kernel).max() <= limit
    assert np.abs(kernel).max() > 0.98 * limit
    np.testing.assert_allclose(kernel.var(), limit**2 / 3, rtol=0.05)
    np.testing.assert_allclose(kernel.mean(), 0, atol=0.05 * limit)

    # One orthogonal [H, nH] matrix, as in Keras, not an orthogonal block for each gate.
    recurrent_kernel = np.asarray(params["recurrent_kernel"])
    np.testing.assert_allclose(recurrent_kernel @ recurrent_kernel.T, np.eye(units), atol=1e-5)

    expected = np.zeros(bias_shape, np.float32)
    if name == "lstm":
        expected[units : 2 * units] = 1
    np.testing.assert_array_equal(params["bias"], expected)


def test_unit_forget_bias_can_be_left_out():
    params = cells.lstm(H, unit_forget_bias=False).init(jax.random.key(0), D)
    np.testing.assert_array_equal(params["bias"], np.zeros(4 * H, np.float32))


@pytest.mark.parametrize("name", MAKERS)
def test_init_depends_on_the_key_alone(name):
    init = MAKERS[name](H).init
    first, again, other = (init(jax.random.key(seed), D) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    for weights in ("kernel", "recurrent_kernel"):
        assert not np.allclose(first[weights], other[weights])
    chex.assert_trees_all_close(jax.jit(init, static_argnums=1)(jax.random.key(0), D), first)


@pytest.mark.parametrize("name", MAKERS)
def test_initial_states_are_separate_zeros(name):
    states = MAKERS[name](H).initial_states(B)
    assert isinstance(states, list)
    chex.assert_trees_all_equal(states, [jnp.zeros((B, H))] * STATES[name])
    assert len({id(state) for state in states}) == STATES[name]


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16_compute_over_float32_parameters_and_states(name):
    cell = MAKERS[name](H, dtype=jnp.bfloat16)
    params, (x, states) = random_params(name), random_inputs(name)
    chex.assert_trees_all_equal_dtypes(cell.init(jax.random.key(0), D), params)
    outputs, last = scanned(cell.step(params), x, states)
    assert outputs.dtype == jnp.bfloat16
    assert [state.dtype for state in last] == [jnp.float32] * STATES[name]

    expected_outputs, expected_last = looped(REFERENCES[name], params, x, states)
    np.testing.assert_allclose(np.float64(outputs), expected_outputs, atol=0.1)
    chex.assert_trees_all_close(jax.tree.map(np.float64, last), expected_last, atol=0.2)

    def loss(params):
        return jnp.sum(scanned(cell.step(params), x, states)[0].astype(jnp.float32))

    chex.assert_trees_all_equal_dtypes(jax.grad(loss)(params), params)

    step = str(jax.make_jaxpr(cell.step(params))(x[:, 0], states))
    assert "preferred_element_type=float32" not in step
    assert "preferred_element_type=bfloat16" in step


def test_a_float32_cell_state_accumulates_below_bfloat16_resolution():
    """A state at 256 takes in steps of 1/2, which a bfloat16 sum (spacing 2) would lose."""
    zeros = jax.tree.map(jnp.zeros_like, cells.lstm(1).init(jax.random.key(0), 1))
    params = zeros | {"bias": jnp.array([0.0, 50.0, 50.0, 0.0])}
    step = cells.lstm(1, dtype=jnp.bfloat16).step(params)
    states = [jnp.zeros((1, 1)), jnp.full((1, 1), 256.0)]
    _, (_, c) = scanned(step, jnp.zeros((1, 10, 1)), states)
    np.testing.assert_allclose(c, [[261.0]])


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16_states_under_float32_compute_keep_their_dtype(name):
    params, (x, states) = random_params(name), random_inputs(name)
    states = [state.astype(jnp.bfloat16) for state in states]
    outputs, last = scanned(MAKERS[name](H).step(params), x, states)
    assert outputs.dtype == jnp.float32
    assert [state.dtype for state in last] == [jnp.bfloat16] * STATES[name]


@pytest.mark.parametrize("name", MAKERS)
def test_param_dtype_is_that_of_parameters_and_initial_states(name):
    cell = MAKERS[name](H, param_dtype=jnp.bfloat16)
    params, states = cell.init(jax.random.key(0), D), cell.initial_states(B)
    assert {array.dtype for array in jax.tree.leaves((params, states))} == {jnp.dtype("bfloat16")}
    recurrent_kernel = np.float32(params["recurrent_kernel"])
    np.testing.assert_allclose(recurrent_kernel @ recurrent_kernel.T, np.eye(H), atol=0.02)
    # Without a dtype of its own the cell computes in that of its parameters, whatever the input's.
    output, new_states = cell.step(params)(np.ones((B, D), np.float32), states)
    assert {array.dtype for array in (output, *new_states)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", MAKERS)
def test_strict_dtype_promotion_is_satisfied(name):
    params, (x, states) = random_params(name), random_inputs(name)
    with jax.numpy_dtype_promotion("strict"):
        step = MAKERS[name](H, dtype=jnp.bfloat16).step(params)
        output, _ = jax.eval_shape(step, x[:, 0], states)
    assert output.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", MAKERS)
def test_numpy_weights_as_keras_hands_them_out(name):
    params, (x, states) = random_params(name), random_inputs(name)
    as_numpy = jax.tree.map(np.asarray, params)
    step = MAKERS[name](H).step
    actual = step(as_numpy)(np.asarray(x[:, 0]), states)
    chex.assert_trees_all_close(actual, step(params)(x[:, 0], states))


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_can_be_printed(name):
    step = MAKERS[name](H).step(random_params(name))
    shapes = f"{(D, GATES[name] * H)}, {(H, GATES[name] * H)}, "
    for printed in (step, jax.tree.map(jax.typeof, step)):
        assert repr(printed).startswith(f"<{name}_step with arrays of {shapes}")
    assert repr(jax.tree.map(lambda _: None, step)) == f"<{name}_step with arrays of >"


@pytest.mark.parametrize("name", MAKERS)
def test_vmap_over_parameters(name):
    x, states = random_inputs(name)
    each = [random_params(name, seed) for seed in (0, 1)]

    def final(params):
        return scanned(MAKERS[name](H).step(params), x, states)

    actual = jax.vmap(final)(stacked(*each))
    expected = stacked(*map(final, each))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_user_mistakes_are_named(name):
    make = MAKERS[name]
    cell, params = make(H), random_params(name)
    x, states = jnp.ones((B, D)), make(H).initial_states(B)
    for units in (0, -3, 2.5, "8"):
        with pytest.raises(ValueError, match=f"units is {units!r}; expected a positive integer"):
            make(units)
    with pytest.raises(ValueError, match="features is 0; expected a positive integer"):
        cell.init(jax.random.key(0), 0)
    with pytest.raises(ValueError, match=r"features is an array key<fry>\[\]; expected"):
        cell.init(D, jax.random.key(0))
    with pytest.raises(TypeError, match="param_dtype is int32; expected a floating dtype"):
        make(H, param_dtype=jnp.int32)
    with pytest.raises(TypeError, match=r"^dtype is bool; expected a floating dtype"):
        make(H, dtype=bool)
    with pytest.raises(ValueError, match=rf"{name}: .* shape \(3, 6\), .* for 4 features"):
        cell.step(params)(jnp.ones((B, D + 2)), states)
    with pytest.raises(ValueError, match=rf"params\['recurrent_kernel'\].* for units={H + 1}"):
        make(H + 1).step(params | {"kernel": jnp.ones((D, GATES[name] * (H + 1)))})
    with pytest.raises(ValueError, match=r"params\['kernel'\] has shape \(3,\), expected \[feat"):
        cell.step(params | {"kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"\['bias', 'kernel', .*, expected \['kernel'.*use_bias"):
        make(H, use_bias=False).step(params)
    with pytest.raises(TypeError, match=r"params is a list, expected a dict .* dict\(zip\(\["):
        cell.step(list(params.values()))
    with pytest.raises(ValueError, match=f"got 3 states, expected {STATES[name]}"):
        cell.step(params)(x, [*states, x, x][:3])
    with pytest.raises(ValueError, match=rf"states\[0\] has shape \(3, 1\), expected {H} units"):
        cell.step(params)(x, [jnp.ones((B, 1)), *states[1:]])
    with pytest.raises(TypeError, match=rf"{name}: states\[0\] has dtype int32, .* astype"):
        cell.step(params)(x, [state.astype(int) for state in states])
    with pytest.raises(TypeError, match=rf"{name}: params\['kernel'\] has dtype int32, .* astype"):
        cell.step(params | {"kernel": params["kernel"].astype(int)})
