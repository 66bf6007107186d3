"""What is left in the loop, counted in the jaxpr: the whole point of taking bodies apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bodies import table
from helpers import CASES, assert_same
from jax import lax
from structure import (
    DOT,
    SCAN,
    TIME,
    count,
    equations,
    innermost_loops,
    loops,
    multiply_adds,
    primitive_of,
    products_in_innermost_loops,
    programs,
    sum_of_sines,
)

import jaxrnn

BATCH, FEATURES, UNITS = 3, 5, 16
SPLIT = {"method": "sequential", "chunk": 4}
EXP = primitive_of(jnp.exp, 1.0)
TRANSPOSE = primitive_of(jnp.transpose, np.ones((2, 3)))

ONE_PRODUCT = [
    "elman_cell",
    "gru_reset_after",
    "lstm_activated_before_the_split",
    "lstm_columns",
    "lstm_concatenated",
    "lstm_concatenated_with_ones",
    "lstm_einsum",
    "lstm_four_matmuls",
    "lstm_jitted",
    "lstm_peephole_clipped",
    "lstm_slices",
    "lstm_split",
    "affine_with_readout",
    "bfloat16_lstm",
    "custom_jvp_inside",
    "embedding",
    "integers_and_booleans",
    "layer_norm",
    "no_output",
    "precisions",
    "quantised_weights",
    "swapped_each_step",
    "vectors",
    "weight_normalised",
]


@pytest.mark.parametrize("name", ONE_PRODUCT)
def test_one_product_in_the_loop_and_one_in_that_of_the_gradient(name):
    forward, gradient = programs(name, **SPLIT)
    expected = 2 if name == "precisions" else 1  # two products that may not become one
    assert products_in_innermost_loops(forward) == [expected]
    assert products_in_innermost_loops(gradient) == [expected, expected]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("diagonal_affine", [0]),
        ("linear_recurrent_unit", [0]),
        ("output_ignores_state", [0]),
        ("gru_reset_before", [2]),
        ("stacked_lstm", [1, 1]),
    ],
)
def test_products_in_the_loops_of_other_bodies(name, expected):
    forward, gradient = programs(name, **SPLIT)
    assert products_in_innermost_loops(forward) == expected
    assert products_in_innermost_loops(gradient) == sorted(2 * expected)


@pytest.mark.parametrize(
    "flags",
    [
        {"mask": True},
        {"mask": True, "reset": True, "zero_output_for_mask": True},
        {"reset": True, "return_all_outputs": False, "go_backwards": True, "remat": True},
    ],
    ids=["mask", "mask_reset_zero", "reset_last_only_remat"],
)
@pytest.mark.parametrize("name", ["lstm", "readout"])
def test_masks_and_resets_cost_no_fission(name, flags):
    case = CASES[name]
    arguments = case.arguments(time=TIME)
    pattern = np.arange(case.arguments().inputs.shape[0] * TIME).reshape(-1, TIME) % 3 == 1
    flags = flags | dict.fromkeys({"mask", "reset"} & flags.keys(), pattern)

    def run(params, inputs, initial_states):
        moved = arguments._replace(params=params, inputs=inputs, initial_states=initial_states)
        return case.call(jaxrnn.rnn, jnp, moved, **SPLIT, **flags)

    forward = jax.make_jaxpr(run)(*arguments[:3])
    products = products_in_innermost_loops(forward)
    # An output that is held at masked steps runs in a loop of its own, behind the readout.
    assert sum(products) == 1
    gradient = jax.make_jaxpr(jax.grad(lambda *a: sum_of_sines(run(*a)), (0, 1, 2)))(*arguments[:3])
    recomputed = 1 if flags.get("remat") else 0
    assert sum(products_in_innermost_loops(gradient)) == 2 + recomputed


@pytest.mark.parametrize("name", ["lstm_split", "stacked_lstm", "gru_reset_before", "layer_norm"])
def test_no_product_is_computed_twice(name):
    """Moving work must not multiply it: as many multiply-adds run as under `lax.scan`."""
    forward, gradient = programs(name, **SPLIT)
    forward_before, gradient_before = programs(name, lax.scan)
    assert multiply_adds(forward) == multiply_adds(forward_before) > 0
    assert multiply_adds(gradient) <= multiply_adds(gradient_before)


@pytest.mark.parametrize("name", ["lstm_columns", "lstm_einsum"])
def test_products_are_rows_times_a_matrix_however_they_are_written(name):
    """With nothing to transpose in the loop."""
    forward, _ = programs(name, **SPLIT)
    products = [e for e, _ in equations(forward) if e.primitive is DOT]
    assert len(products) >= 2
    for equation in products:
        rows, matrix = (v.aval.ndim for v in equation.invars)
        assert matrix == 2
        assert equation.params["dimension_numbers"] == (((rows - 1,), (0,)), ((), ()))
    innermost = innermost_loops(forward)
    assert [count(body, TRANSPOSE) for body in innermost] == [0]


def test_gates_taken_by_index_are_rows_of_their_own():
    """XLA does not vectorise what reads a slice of the row of a step."""
    forward, _ = programs("gates_by_index", **SPLIT)
    (step,) = innermost_loops(forward)
    gate = (table.BATCH, 1, table.UNITS)
    read = [v.aval.shape for v in step.invars]
    assert (read.count(gate), read.count((table.BATCH, 4, table.UNITS))) == (4, 0)


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_are_written_where_they_stay(reverse):
    """No block stacks ys of its own, which the loop over blocks would copy."""
    for program in programs("lstm_split", **SPLIT, reverse=reverse):
        scans = [e for e, _ in equations(program) if e.primitive is SCAN]
        over_blocks, over_steps = scans[:2]
        for equation in (over_blocks, over_steps):
            shapes = [v.aval.shape for v in equation.outvars]
            assert {shape[0] for shape in shapes if len(shape) > 2} == {TIME}


def test_a_readout_runs_once_per_block_over_all_its_steps():
    forward, gradient = programs("affine_with_readout", **SPLIT)
    for program in (forward, gradient):
        sizes = [e.outvars[0].aval.shape for e, _ in equations(program) if e.primitive is DOT]
        assert (4 * BATCH, 5) in sizes  # [block and batch, outputs]
        assert (BATCH, 5) not in sizes


def test_loop_invariant_work_runs_once():
    """The weights' own function, marked by primitives that occur nowhere else, is in no loop."""

    def run(w, u, h, xs):
        def body(h, x):
            normalised = lax.erf(u) @ jnp.cosh(u)
            h = jnp.tanh(x @ w @ normalised + h @ normalised)
            return h, h

        return jaxrnn.scan(body, h, xs, **SPLIT)

    shapes = [(FEATURES, UNITS), (UNITS, UNITS), (BATCH, UNITS), (TIME, BATCH, FEATURES)]
    operands = [np.ones(shape, np.float32) for shape in shapes]
    erf = primitive_of(lax.erf, 1.0)
    cosh = primitive_of(jnp.cosh, 1.0)
    forward = jax.make_jaxpr(run)(*operands)
    gradient = jax.make_jaxpr(jax.grad(lambda *a: sum_of_sines(run(*a)), (0, 1, 2, 3)))(*operands)
    tangent = jax.make_jaxpr(lambda *a: jax.jvp(run, a, a))(*operands)
    for program in (forward, gradient, tangent):
        assert count(program, erf) == 1
        assert not any(count(body, erf) + count(body, cosh) for body in loops(program))


def test_stacked_and_tiled_inputs_leave_the_loop_with_their_product():
    rng = np.random.default_rng(0)
    shapes = (4 * FEATURES, UNITS), (UNITS,), (TIME, FEATURES)
    w, h, xs = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    def body(h, x):
        first, second = jnp.stack([x, jnp.sin(x)])
        pairs = jnp.tile(jnp.stack([second, first], axis=1), (1, 2))
        h = jnp.tanh(pairs.ravel() @ w + 0.5 * h)
        return h, h

    split = functools.partial(jaxrnn.scan, body, **SPLIT)
    assert products_in_innermost_loops(jax.make_jaxpr(split)(h, xs)) == [0]
    assert_same(split(h, xs), lax.scan(body, h, xs))


def test_a_product_written_twice_runs_once_though_it_could_be_merged_with_itself():
    u, h, xs = np.eye(UNITS), np.ones((BATCH, UNITS)), np.ones((TIME, BATCH, UNITS))

    def run(u, h, xs, scan, **flags):
        def body(h, x):
            h = jnp.tanh(x @ u + h @ u) * jnp.cos(h @ u)
            return h, h

        return scan(body, h, xs, **flags)[1]

    split = jax.make_jaxpr(functools.partial(run, scan=jaxrnn.scan, **SPLIT))(u, h, xs)
    (loop,) = innermost_loops(split)
    assert multiply_adds(loop) == BATCH * UNITS * UNITS


def test_matrices_for_states_are_in_no_pass():
    """Over a block, outer products would be matrices per step to write and to read, for nothing.

    And what is kept of the state is read by the gradient's loop where it lies, one step at a time.
    """
    units = 128  # of small ones it is no matter
    block, matrix = SPLIT["chunk"], (BATCH, units, units)
    w, state, xs = np.ones((units, units)), np.ones(matrix), np.ones((TIME, BATCH, units))

    def run(w, state, xs):
        def body(state, x):
            row = x @ w
            state = 0.9 * state + jnp.einsum("bi,bj->bij", row, x)
            return state, jnp.einsum("bi,bij->bj", row, state)

        return jaxrnn.scan(body, state, xs, **SPLIT)

    forward = jax.make_jaxpr(run)(w, state, xs)
    sizes = [out.aval.size for e, _ in equations(forward) for out in e.outvars]
    assert max(sizes) == max(TIME * BATCH * units, BATCH * units * units)
    gradient = jax.grad(lambda *operands: sum_of_sines(run(*operands)), (0, 1, 2))
    for function in (run, gradient):
        text = jax.jit(function).lower(w, state, xs).compile().as_text()
        assert f"f32[{BATCH},{units},{units}]" in text
        assert f"f32[{block},{BATCH},{units},{units}]" not in text


def test_matrices_that_follow_from_a_counter_are_not_carried_from_loop_to_loop():
    """As in the state space models that weigh all their past alike, solved at every step."""
    unit, x = np.eye(UNITS, dtype=np.float32), np.ones((TIME, UNITS), np.float32)
    w = np.tri(UNITS, dtype=np.float32)

    def run(scan, w, x, **flags):
        def body(carry, row):
            h, n = carry
            forward, backward = unit - w / n, unit + w / n
            h = jnp.linalg.solve(backward, forward @ h + row / n)
            return (h, n + 1), h

        return scan(body, (x[0], jnp.ones(())), x, **flags)

    program = jax.make_jaxpr(functools.partial(run, jaxrnn.scan, **SPLIT))(w, x)
    counting, solving = innermost_loops(program)
    assert {v.aval.shape for v in counting.outvars} == {()}
    matrices = [v for v in solving.invars if v.aval.shape == (UNITS, UNITS)]
    assert len(matrices) == 3  # w, the unit matrix and what is factorised in a pass
    assert_same(run(jaxrnn.scan, w, x, **SPLIT), run(lax.scan, w, x))


def test_shifted_states_are_made_a_step_early_where_something_costly_reads_them():
    """XLA would make them within the kernel of the logarithm, number by number."""
    pad = primitive_of(lambda x: lax.pad(x, 0.0, [(1, 0, 0)]), np.ones(3))
    concatenate = primitive_of(lambda x: lax.concatenate([x, x], 0), np.ones(3))

    def shifts_read_in_the_loop(make):
        def step(h, x):
            h = make(h, jnp.pad(h[:, 1:], ((0, 0), (0, 1))), jnp.roll(h, 1, axis=1)) + x @ w
            return h, h

        w, h, xs = np.ones((FEATURES, UNITS)), np.ones((BATCH, UNITS)), np.ones((TIME, BATCH, 5))
        program = jax.make_jaxpr(lambda h, xs: jaxrnn.scan(step, h, xs, **SPLIT))(h, xs)
        (loop,) = innermost_loops(program)
        shifts = {e.primitive: e.outvars[0] for e, _ in equations(loop)}
        read = {v for e, _ in equations(loop) for v in e.invars if not hasattr(v, "val")}
        return [shifts[primitive] in read for primitive in (pad, concatenate)]

    assert shifts_read_in_the_loop(lambda h, *shifted: h + sum(shifted)) == [True, True]
    assert shifts_read_in_the_loop(lambda h, *shifted: jnp.exp(h - sum(shifted))) == [False, False]
    assert shifts_read_in_the_loop(lambda h, a, b: jnp.logaddexp(h, a) + b) == [False, True]


@pytest.mark.parametrize("make", [lambda: jnp.full((BATCH, UNITS), 0.0), lambda: 0.0])
def test_states_of_weak_type_are_taken_apart_too(make):
    """`jnp.full` and Python numbers make them; `lax.scan` promotes them silently."""
    u, xs = jnp.ones((UNITS, UNITS)), jnp.ones((TIME, BATCH, UNITS))

    def body(c, x):
        c = jnp.tanh(c + (x @ u).mean() if jnp.ndim(c) == 0 else c @ u + x @ u)
        return c, c

    def products(scan, **flags):
        jaxpr = jax.make_jaxpr(lambda xs: scan(body, make(), xs, **flags))(xs)
        return products_in_innermost_loops(jaxpr)

    assert products(lax.scan)[0] > products(jaxrnn.scan, **SPLIT)[0]


@pytest.mark.parametrize("samples", [1, 3])
def test_what_a_matrix_spreads_is_spread_in_the_loop(samples):
    """A row of a product is read there, not the memory's rows that a fixed matrix makes of it."""

    def body(params, h, x):
        h = params["decay"] * h + (x @ params["w"])[..., None] * params["scale"]
        return h, jnp.sum(h, -1)

    units = 16
    shapes = {"w": (5, units), "decay": (units, 4), "scale": (units, 4)}
    params = {name: jnp.full(shape, 0.1) for name, shape in shapes.items()}
    xs, h = jnp.ones((TIME, samples, 5)), jnp.ones((samples, units, 4))
    program = jax.make_jaxpr(
        lambda params, h, xs: jaxrnn.scan(lambda h, x: body(params, h, x), h, xs, **SPLIT)
    )(params, h, xs)
    (step,) = innermost_loops(program)
    rows = [v.aval.shape for v in step.invars if v.aval.ndim]
    assert rows.count((samples, units, 4)) == 1 + 2 * (samples == 1)  # the memory; two matrices
    assert any(shape in rows for shape in [(samples, units), (samples, units, 1)])


@pytest.mark.parametrize("samples", [1, 3])
def test_exponentials_are_made_once_for_a_gradient(samples):
    """Results make them in the loop, of fewer numbers; a gradient stores a row of them."""

    def body(params, h, x):
        rate = jax.nn.sigmoid(x @ params["w"])
        h = jnp.exp(-rate[..., None] * params["decay"]) * h + rate[..., None]
        return h, jnp.sum(h, -1)

    given = {"w": jnp.ones((5, 16)), "decay": jnp.ones((16, 4))}, jnp.ones((TIME, samples, 5))
    h = jnp.ones((samples, 16, 4))

    def of(params, xs):
        return jaxrnn.scan(lambda h, x: body(params, h, x), h, xs, **SPLIT)

    def in_loops(function):
        return [count(step, EXP) for step in innermost_loops(jax.make_jaxpr(function)(*given))]

    assert in_loops(of) == [1]
    assert in_loops(lambda *a: jax.vjp(of, *a)[0])[0] == 0


def test_one_column_for_all_gates_is_repeated_and_not_cut():
    """A product of one column, added to many by broadcasting, before they are cut into gates."""
    samples, units, features = 64, 128, 3
    draw = np.random.default_rng(0).standard_normal
    u, v = (np.float32(0.1 * draw(s)) for s in ((units, 4 * units), (features, 1)))
    xs, init = (np.float32(draw(s)) for s in ((4, samples, features), (samples, units)))

    def run(scan, u, v):
        def body(h, x):
            i, f, g, o = jnp.split(h @ u + x @ v, 4, axis=-1)
            h = jnp.tanh(i) * jnp.tanh(f) + jnp.tanh(g) * jnp.tanh(o)
            return h, h

        return scan(body, init, xs)

    ours = functools.partial(jaxrnn.scan, method="sequential")
    assert_same(
        jax.jit(run, static_argnums=0)(ours, u, v), jax.jit(run, static_argnums=0)(lax.scan, u, v)
    )


@pytest.mark.parametrize(("rows", "inside"), [(1, 1), (15, 1), (16, 2)])
def test_products_of_many_rows_with_a_matrix_of_each_sample_stay(rows, inside):
    """The rows of all steps would have to be brought together, sample by sample."""
    matrices, w = np.ones((BATCH, FEATURES, 3)), np.ones((3, 3))

    def body(h, x):
        h = jnp.tanh(jnp.einsum("bkd,bdq->bkq", x, matrices) + h @ w)
        return h, h

    def run(h, xs):
        return jaxrnn.scan(body, h, xs, **SPLIT)

    jaxpr = jax.make_jaxpr(run)(np.ones((BATCH, rows, 3)), np.ones((TIME, BATCH, rows, FEATURES)))
    assert products_in_innermost_loops(jaxpr) == [inside]


def test_the_gradients_of_an_ensemble_within_a_step_are_products_outside_the_loop():
    """A loop would write the gradient of all weights at each step."""
    members, rows = 2, 16
    u = np.ones((members, UNITS, UNITS))

    def loss(u, h, xs):
        def body(h, x):
            h = jax.vmap(lambda h, u: jnp.tanh(x + h @ u))(h, u)
            return h, h

        return sum_of_sines(jaxrnn.scan(body, h, xs, **SPLIT))

    h, xs = np.ones((members, rows, UNITS)), np.ones((TIME, rows, UNITS))
    gradient = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(u, h, xs)
    assert products_in_innermost_loops(gradient) == [1, 1]
