"""Steps that are singular somewhere: masked, they must not make a gradient infinite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GAPS,
    assert_identical,
    assert_same,
    cast_floats,
    numerical_gradient,
    reference_rnn,
    results_and_gradients,
    scalar_of,
    with_padding,
)
from structure import count, loops, primitive_of

import jaxrnn

SELECT = primitive_of(lambda c: jax.lax.select(c, c, c), np.ones(2, bool))

# The method is named because the library leaves arrays as small as these to lax.scan.
BLOCKS = {"chunk": 3, "method": "sequential"}


def log_step(xp, p):
    """Singular at zero: the derivative of log."""

    def step(x, states):
        h = xp.tanh(xp.log(x) @ p["w"] + states[0] @ p["u"])
        return h, [h]

    return step


def normalising_step(xp, p):
    """Singular at any constant vector: the derivative of the standard deviation at zero."""

    def step(x, states):
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / xp.sqrt((centred**2).mean(axis=-1, keepdims=True))
        h = xp.tanh(scaled @ p["w"] + states[0] @ p["u"])
        return h, [h]

    return step


def interval_step(xp, p):
    """Singular where the input is that of the step before: a quotient and the root of a square."""

    def step(x, states):
        h, before = states
        distance = xp.sqrt(((x - before) ** 2).sum(axis=-1, keepdims=True))
        h = xp.tanh((x / distance) @ p["w"] + h @ p["u"])
        return h, [h, x]

    return step


def undefined_step(xp, p):
    """Singular below the data, and at zeros, from which the sample without data starts."""

    def step(x, states):
        direction = states[0] / xp.sqrt((states[0] ** 2).sum(axis=-1, keepdims=True))
        h = xp.tanh(xp.log(x - 0.25) @ p["w"] + direction @ p["u"])
        return h, [h]

    return step


def squaring_step(xp, p):
    """Finite at any finite state, of which it makes what may not be finite."""

    def step(x, states):
        h = (states[0] * states[0]) @ p["w"] * x
        return h, [h]

    return step


@pytest.mark.parametrize(
    ("make_step", "flags"),
    [
        (log_step, BLOCKS),
        (log_step, {}),
        (normalising_step, BLOCKS | {"unroll": True}),
        (interval_step, {"go_backwards": True, "remat": True}),
        (undefined_step, BLOCKS),
    ],
)
def test_gradients_stay_finite_for_a_step_singular_at_the_padding(make_step, flags):
    rng = np.random.default_rng(1)
    inputs = rng.uniform(0.5, 2.0, (3, 7, 4)).astype(np.float32)
    params = {"w": rng.normal(size=(4, 4)).astype(np.float32), "u": np.eye(4, dtype=np.float32)}
    states = [rng.normal(size=(3, 4)).astype(np.float32)]
    if make_step is interval_step:
        states.append(np.zeros((3, 4), np.float32))
    if make_step is undefined_step:
        states[0][2] = 0
    rest = (params, states)
    backwards = flags.get("go_backwards", False)

    def call(rnn, xp, inputs, rest, **flags):
        return rnn(make_step(xp, rest[0]), inputs, rest[1], mask=GAPS, **flags)

    @np.errstate(invalid="ignore")  # the reference runs masked steps, too, and throws them away
    def reference(inputs, rest):
        return call(reference_rnn, np, inputs, rest, go_backwards=backwards)

    run = results_and_gradients(lambda x, r: call(jaxrnn.rnn, jnp, x, r, **flags))
    (_, results), gradients = run(with_padding(inputs, GAPS, 0.0), rest)
    assert_same(results, reference(inputs, rest))
    expected = numerical_gradient(lambda both: scalar_of(reference(*both), np), (inputs, rest))
    assert_same(gradients, cast_floats(expected, np.float32), scale=10)
    for padding in (np.nan, -1.0):
        (_, padded_results), padded = run(with_padding(inputs, GAPS, padding), rest)
        assert_identical(padded_results, results)
        assert_identical(padded, gradients)


def test_only_a_step_that_can_be_singular_is_kept_from_held_states():
    """It costs a selection per state and step: the input's, the new state's, and this one."""
    params = {"w": np.eye(2, dtype=np.float32), "u": np.eye(2, dtype=np.float32)}

    def selections(make_step):
        def run(x):
            step = make_step(jnp, params)
            return jaxrnn.rnn(step, x, [jnp.ones((3, 2))], mask=GAPS, method="lax")

        jaxpr = jax.make_jaxpr(run)(jnp.ones((3, 7, 2)))
        return sum(count(body, SELECT) for body in loops(jaxpr.jaxpr))

    def smooth_step(xp, p):
        def step(x, states):
            h = xp.tanh(x @ p["w"] + states[0] @ p["u"])
            return h, [h]

        return step

    assert selections(smooth_step) == 2
    assert selections(log_step) == 3
    assert selections(squaring_step) == 3


@pytest.mark.parametrize("flags", [{}, {"mask": GAPS}], ids=["plain", "masked"])
def test_a_step_may_call_what_was_compiled_with_an_array(flags):
    w, x = 0.1 * np.arange(10, dtype=np.float32).reshape(2, 5), np.ones((3, 7, 2), np.float32)

    def naive(x, states):
        h = jnp.tanh(x @ w) + states[0]
        return h, [h]

    def run(step):
        return jaxrnn.rnn(step, x, [jnp.zeros((3, 5))], **flags)

    assert_same(run(jax.jit(naive)), run(naive))


@pytest.mark.parametrize("make_step", [log_step, normalising_step])
def test_gradients_stay_finite_when_every_step_of_every_sample_is_masked(make_step):
    rng = np.random.default_rng(2)
    params = {"w": rng.normal(size=(4, 4)).astype(np.float32), "u": np.eye(4, dtype=np.float32)}
    states = [rng.normal(size=(3, 4)).astype(np.float32)]

    def call(inputs, rest):
        return jaxrnn.rnn(make_step(jnp, rest[0]), inputs, rest[1], mask=np.zeros((3, 7)))

    (_, results), (inputs_gradient, (params_gradient, states_gradient)) = results_and_gradients(
        call
    )(np.zeros((3, 7, 4), np.float32), (params, states))
    last_output, outputs, new_states = results
    np.testing.assert_array_equal(last_output, states[0])
    np.testing.assert_array_equal(outputs, np.repeat(states[0][:, None], 7, axis=1))
    assert_identical(new_states, states)
    assert not np.any(inputs_gradient)
    assert not any(np.any(leaf) for leaf in params_gradient.values())
    expected = numerical_gradient(
        lambda s: scalar_of((s, np.repeat(s[:, None], 7, axis=1), [s]), np), states[0]
    )
    assert_same(states_gradient, [cast_floats(expected, np.float32)])


def test_a_masked_step_does_not_grow_beyond_what_the_states_may_hold():
    start, params = np.full((2, 1), 1e15, np.float32), {"w": np.full((1, 1), 0.5, np.float32)}

    def call(inputs, rest, **flags):
        return jaxrnn.rnn(squaring_step(jnp, rest[0]), inputs, rest[1], **flags)

    rest = (params, [start])
    inputs = np.ones((2, 3, 1), np.float32)
    run = results_and_gradients(lambda x, r: call(x, r, input_length=1)[::2])
    (_, results), (inputs_gradient, gradients) = run(inputs, rest)
    short = results_and_gradients(lambda x, r: call(x, r)[::2])
    (_, expected), (short_gradient, expected_gradients) = short(inputs[:, :1], rest)
    assert_identical(results, expected)
    assert_identical(gradients, expected_gradients)
    np.testing.assert_array_equal(inputs_gradient[:, :1], short_gradient)
    assert not np.any(inputs_gradient[:, 1:])


@pytest.mark.parametrize("padding", [0, -3])
def test_gradients_stay_finite_when_all_integers_are_padding(padding):
    def loss(weight, inputs):
        def step(x, states):
            return states[0] + weight * jnp.log(x.astype(jnp.float32)), states

        return jaxrnn.rnn(step, inputs, [jnp.ones((2, 1))], input_length=0)[0].sum()

    slope = jax.grad(loss)(jnp.float32(2.0), jnp.full((2, 4, 1), padding))
    np.testing.assert_array_equal(slope, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "flags",
    [
        BLOCKS,
        {"go_backwards": True, "time_major": True},
        {"zero_output_for_mask": True},
        {"return_all_outputs": False, "remat": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("readout", [False, True])
def test_a_sample_without_valid_steps_keeps_its_state_to_itself(readout, flags, value):
    rng = np.random.default_rng(3)
    time_major = flags.get("time_major", False)
    inputs = rng.normal(size=(3, 7, 4)).astype(np.float32)
    w, u = (rng.normal(size=(4, 4)).astype(np.float32) for _ in range(2))
    first, count = np.ones((3, 4), np.float32), np.zeros(3, np.int32)
    mask = GAPS.T if time_major else GAPS
    inputs = inputs.swapaxes(0, 1) if time_major else inputs

    def call(params, first):
        def step(x, states):
            h = jnp.tanh(x @ params[0] + states[0] @ params[1])
            return h * 2 if readout else h, [h, states[1] + 1]

        return jaxrnn.rnn(step, inputs, [first, count], mask=mask, **flags)

    def others(params, first):
        """What is made of all but the last sample."""
        last, outputs, (state, _) = call(params, first)
        outputs = outputs[:, :2] if time_major else outputs[:2]
        return scalar_of((last[:2], outputs, state[:2]))

    poisoned = first.copy()
    poisoned[2, 1] = value
    derivative = jax.jit(jax.value_and_grad(others, (0, 1)))
    assert_identical(derivative((w, u), poisoned), derivative((w, u), first))

    def placed(results):
        last, outputs, (state, _) = results
        return last[2], outputs[:, 2] if time_major else outputs[2], state[2]

    last, outputs, state = jax.jit(lambda *a: placed(call(*a)))((w, u), poisoned)
    held = np.zeros(4) if flags.get("zero_output_for_mask") else poisoned[2]
    np.testing.assert_array_equal(state, poisoned[2])
    np.testing.assert_array_equal(last, held)
    np.testing.assert_array_equal(outputs, np.broadcast_to(held, outputs.shape))


def test_a_state_of_nan_does_no_harm_where_all_is_masked():
    """The step is singular somewhere, and there is no sample whose state it could be lent."""

    def loss(w, first):
        def step(x, states):
            h = jnp.exp(x @ w + states[0])
            return h, [h]

        last, _, _ = jaxrnn.rnn(step, jnp.ones((2, 3, 4)), [first], mask=jnp.zeros((2, 3)))
        return jnp.sum(last[:, 0])

    first = jnp.full((2, 4), jnp.nan).at[:, 0].set(2.0)
    value, gradient = jax.value_and_grad(loss)(jnp.eye(4), first)
    assert value == 4
    np.testing.assert_array_equal(gradient, np.zeros((4, 4)))


def test_a_masked_step_without_an_output():
    w, inputs = jnp.eye(4), np.ones((3, 7, 4), np.float32)

    def step(x, states):
        return None, {"h": jnp.tanh(x @ w + states["h"])}

    def with_output(x, states):
        h = jnp.tanh(x @ w + states[0])
        return h, [h]

    last, outputs, states = jaxrnn.rnn(step, inputs, {"h": jnp.zeros((3, 4))}, mask=GAPS)
    assert (last, outputs) == (None, None)
    expected, _, _ = jaxrnn.rnn(with_output, inputs, [jnp.zeros((3, 4))], mask=GAPS)
    assert_same(states["h"], expected)


@pytest.mark.parametrize("reads", [jax.lax.stop_gradient, jnp.sign])
def test_infinite_weights_that_no_derivative_passes_make_no_gradient_infinite(reads):
    """Two products of one state become one, but not if only one of them has a derivative."""
    w, u = 0.3 * jnp.eye(4), 0.2 * jnp.ones((4, 4))
    diverged = u.at[0, 0].set(jnp.inf)

    def gradients(scan, **flags):
        def loss(w, u):
            def body(h, x):
                new = jnp.tanh(x @ w + h @ u)
                return new, (new, reads(h @ diverged))

            return (scan(body, jnp.ones((2, 4)), jnp.ones((5, 2, 4)), **flags)[1][0] ** 2).sum()

        return jax.grad(loss, (0, 1))(w, u)

    assert_same(gradients(jaxrnn.scan, method="sequential"), gradients(jax.lax.scan))
