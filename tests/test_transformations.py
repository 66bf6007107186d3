"""`rnn` is an ordinary JAX function: every transformation equals the plain loop's."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    GAPS,
    RESETS,
    Arguments,
    assert_same,
    cast_floats,
    is_float,
    numerical_gradient,
    reference_rnn,
    scalar_of,
)

import jaxrnn

# The method is named because the library leaves arrays as small as these to lax.scan.
BLOCKS = {"chunk": 3, "method": "sequential"}
MASKED = {"mask": GAPS, "reset": RESETS, "go_backwards": True, **BLOCKS}
loop = functools.partial(reference_rnn, xp=jnp)


def loss(case, rnn, xp, arguments, **flags):
    return scalar_of(case.call(rnn, xp, arguments, **flags), xp)


def float_leaves(gradients, arguments):
    """Gradients with respect to floats, in float32; those of integers are of no interest."""
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(arguments), strict=True)
    return [gradient.astype(np.float32) for gradient, leaf in pairs if is_float(leaf)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smooth])
def test_gradient_with_respect_to_everything(name):
    """Parameters closed over, inputs, initial states and constants jointly."""
    case = CASES[name]
    arguments = case.arguments()
    flags = MASKED if case.holdable else {}
    actual = jax.jit(jax.grad(lambda a: loss(case, jaxrnn.rnn, jnp, a, **flags), allow_int=True))(
        arguments
    )
    expected = numerical_gradient(
        lambda a: loss(case, reference_rnn, np, Arguments(*a), **flags), arguments
    )
    assert_same(float_leaves(actual, arguments), float_leaves(expected, arguments), scale=10)


@pytest.mark.parametrize("argument", ["params", "inputs", "initial_states", "constants"])
def test_gradient_with_respect_to_each_argument_alone(argument):
    case = CASES["constants"]
    arguments = case.arguments()
    wide = cast_floats(arguments, np.float64)
    value = getattr(arguments, argument)
    actual = jax.jit(
        jax.grad(lambda v: loss(case, jaxrnn.rnn, jnp, arguments._replace(**{argument: v})))
    )(value)
    expected = numerical_gradient(
        lambda v: loss(case, reference_rnn, np, wide._replace(**{argument: v})), value
    )
    assert_same(actual, cast_floats(expected, np.float32), scale=10)


@pytest.mark.parametrize(
    "flags",
    [{"unroll": True}, BLOCKS, {"remat": True, **MASKED}, {"return_all_outputs": False}],
    ids=["unroll", "blocks", "remat_masked", "last_only"],
)
def test_gradient_on_every_path(flags):
    case = CASES["readout"]
    arguments = case.arguments()
    actual = jax.jit(jax.grad(lambda a: loss(case, jaxrnn.rnn, jnp, a, **flags)))(arguments)
    expected = numerical_gradient(
        lambda a: loss(case, reference_rnn, np, Arguments(*a), **flags), arguments
    )
    assert_same(actual, cast_floats(expected, np.float32), scale=10)


@pytest.mark.parametrize("flags", [{}, MASKED], ids=["plain", "masked"])
def test_jit_equals_eager(flags):
    case = CASES["nested_states"]
    arguments = case.arguments()
    expected = case.call(jaxrnn.rnn, jnp, arguments, **flags)
    assert_same(jax.jit(lambda a: case.call(jaxrnn.rnn, jnp, a, **flags))(arguments), expected)
    assert_same(case.call(reference_rnn, np, arguments, **flags), expected)


@pytest.mark.parametrize("over", ["params", "inputs", "initial_states", "constants", "all"])
def test_vmap(over):
    case = CASES["constants"]
    several = [case.arguments(seed=seed) for seed in range(3)]
    first = several[0]
    if over != "all":
        several = [first._replace(**{over: getattr(one, over)}) for one in several]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *several)
    axes = tuple(0 if over in (field, "all") else None for field in first._fields)
    mapped = first._replace(
        **{field: getattr(stacked, field) for field in first._fields if over in (field, "all")}
    )
    actual = jax.jit(
        jax.vmap(
            lambda *a: case.call(jaxrnn.rnn, jnp, Arguments(*a), mask=GAPS, **BLOCKS), in_axes=axes
        )
    )(*mapped)
    expected = [case.call(reference_rnn, np, one, mask=GAPS) for one in several]
    assert_same(actual, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))


@pytest.mark.parametrize("pattern", ["mask", "reset", "input_length"])
def test_vmap_over_masks_resets_and_lengths(pattern):
    case = CASES["readout"]
    arguments = case.arguments()
    values = np.array([3, 0, 7]) if pattern == "input_length" else np.stack([GAPS, RESETS, ~GAPS])
    actual = jax.jit(
        jax.vmap(lambda value: case.call(jaxrnn.rnn, jnp, arguments, **{pattern: value}))
    )(values)
    expected = [case.call(reference_rnn, np, arguments, **{pattern: value}) for value in values]
    assert_same(actual, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))


def test_gradient_of_an_ensemble():
    """grad over vmap over parameters: each member gets its own gradient."""
    case = CASES["simple_rnn"]
    several = [case.arguments(seed=seed) for seed in range(2)]
    arguments = several[0]
    wide = cast_floats(arguments, np.float64)
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *(one.params for one in several))

    def member(params):
        return loss(case, jaxrnn.rnn, jnp, arguments._replace(params=params), mask=GAPS, **BLOCKS)

    actual = jax.jit(jax.grad(lambda params: jax.vmap(member)(params).sum()))(params)
    expected = [
        numerical_gradient(
            lambda p: loss(case, reference_rnn, np, wide._replace(params=p), mask=GAPS),
            one.params,
        )
        for one in several
    ]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *expected)
    assert_same(actual, expected, scale=10)


@pytest.mark.parametrize("flags", [{}, MASKED], ids=["plain", "masked"])
def test_forward_mode(flags):
    """jvp and linearize, along a direction in all arguments at once."""
    case = CASES["constants"]
    arguments, direction = case.arguments(seed=0), case.arguments(seed=1)

    def call(rnn, xp, a):
        return case.call(rnn, xp, Arguments(*a), **flags)

    wide, slope = cast_floats((arguments, direction), np.float64)
    ends = [
        call(reference_rnn, np, jax.tree.map(lambda a, d, s=sign: a + s * 1e-5 * d, wide, slope))
        for sign in (1, -1)
    ]
    tangent = jax.tree.map(lambda p, m: ((p - m) / 2e-5).astype(np.float32), *ends)
    expected = (call(reference_rnn, np, arguments), tangent)
    forward = functools.partial(call, jaxrnn.rnn, jnp)
    actual = jax.jit(lambda a, d: jax.jvp(forward, (a,), (d,)))(arguments, direction)
    assert_same(actual, expected, scale=10)

    def linearized(a, d):
        value, linear = jax.linearize(forward, a)
        return value, linear(d)

    assert_same(jax.jit(linearized)(arguments, direction), expected, scale=10)


def quadratic(case, arguments, rnn, **flags):
    """A function of the initial state alone, small enough for whole Jacobians."""

    def function(state):
        moved = arguments._replace(initial_states=[state])
        last_output, outputs, (new_state,) = case.call(rnn, jnp, moved, **flags)
        return outputs * last_output[:, None], new_state

    return function


REMAT = {"remat": True, "mask": GAPS[:1, :3], "method": "sequential"}


@pytest.mark.parametrize(
    ("transformation", "flags"),
    [
        pytest.param(jax.jacfwd, {}, id="jacfwd"),
        pytest.param(jax.jacrev, REMAT, id="jacrev"),
        pytest.param(
            lambda f: jax.hessian(lambda s: scalar_of(f(s))), REMAT, id="forward_over_reverse"
        ),
        pytest.param(
            lambda f: jax.jacrev(jax.jacfwd(lambda s: scalar_of(f(s)))), {}, id="reverse_forward"
        ),
        pytest.param(
            lambda f: jax.jacrev(jax.jacrev(lambda s: scalar_of(f(s)))), {}, id="reverse_twice"
        ),
    ],
)
def test_whole_jacobians_and_second_order(transformation, flags):
    case = CASES["simple_rnn"]
    arguments = case.arguments(batch=1, time=3)
    (state,) = arguments.initial_states
    actual = jax.jit(transformation(quadratic(case, arguments, jaxrnn.rnn, **flags)))(state)
    expected = jax.jit(transformation(quadratic(case, arguments, loop, **flags)))(state)
    assert_same(actual, expected, scale=10)


def test_hessian_with_respect_to_parameters():
    case = CASES["simple_rnn"]
    arguments = case.arguments(batch=1, time=3)

    def hessian(rnn):
        return jax.jit(jax.hessian(lambda p: loss(case, rnn, jnp, arguments._replace(params=p))))(
            arguments.params
        )

    assert_same(hessian(jaxrnn.rnn), hessian(loop), scale=10)


def test_checkpoint_around_a_call_and_inside_the_step():
    case = CASES["lstm"]
    arguments = case.arguments()

    def checkpointed(step, *others, **flags):
        inside = functools.partial(jaxrnn.rnn, jax.checkpoint(step))
        return jax.checkpoint(lambda *operands: inside(*operands, **flags))(*others)

    actual = jax.jit(jax.grad(lambda a: loss(case, checkpointed, jnp, a, mask=GAPS)))(arguments)
    expected = jax.jit(jax.grad(lambda a: loss(case, loop, jnp, a, mask=GAPS)))(arguments)
    assert_same(actual, expected, scale=10)


def test_custom_derivatives_inside_the_step_keep_their_rules():
    """The rules are wrong on purpose: only a gradient that follows them can match."""

    @jax.custom_vjp
    def clipped(x):
        return jnp.sin(x)

    clipped.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.where(x > 0, 3.0, 0.5) * g,))

    @jax.custom_jvp
    def odd(x):
        return jnp.cos(x)

    odd.defjvp(lambda primals, tangents: (jnp.cos(primals[0]), 2.0 * tangents[0]))

    def step(x, states):
        h = clipped(states[0] @ w + x @ w) + odd(states[0])
        return h, [h]

    rng = np.random.default_rng(0)
    w, x = np.float32(rng.normal(size=(3, 3))), np.float32(rng.normal(size=(2, 4, 3)))
    h = jnp.ones((2, 3))

    def gradient(rnn):
        flags = {"mask": GAPS[:2, :4], **BLOCKS}
        return jax.jit(jax.grad(lambda x, h: scalar_of(rnn(step, x, [h], **flags)), (0, 1)))(x, h)

    assert_same(gradient(jaxrnn.rnn), gradient(loop), scale=10)


def test_control_flow_inside_the_step():
    """cond on a state, switch, and an inner scan and while loop."""

    def step(x, states):
        h, n = states
        h = jax.lax.cond(n[0] % 2 == 0, lambda: jnp.tanh(h + x @ w), lambda: h - x @ w)
        h = jax.lax.switch(n[0] % 3, [jnp.sin, jnp.cos, lambda h: h * 0.5], h)
        h, _ = jax.lax.scan(lambda c, y: (0.9 * c + y, None), h, jnp.stack([x, h]))
        return h, [h, jax.lax.while_loop(lambda m: m[0] % 4 != 1, lambda m: m + 1, n + 1)]

    rng = np.random.default_rng(0)
    w, x = np.float32(rng.normal(size=(3, 3))), np.float32(rng.normal(size=(2, 4, 3)))
    states = [jnp.ones((2, 3)), jnp.zeros((2,), jnp.int32)]

    def run(rnn):
        def function(x, h):
            results = rnn(step, x, [h, states[1]], **BLOCKS)
            return scalar_of(results), results

        return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(x, states[0])

    assert_same(run(jaxrnn.rnn), run(loop), scale=10)


def test_rnn_inside_scan_and_inside_rnn():
    """An outer loop whose step is a whole inner call."""
    case = CASES["simple_rnn"]
    params, inputs, (state,), _ = case.arguments()
    inner = case.make_step(jnp, params)

    def outer(rnn):
        def step(x, states):
            # The features of a step become the time axis of the inner call.
            last_output, _, new_states = rnn(inner, jnp.stack([x, 2.0 * x], axis=1), states)
            return last_output, new_states

        return step

    expected = reference_rnn(outer(loop), inputs, [state], xp=jnp, mask=GAPS)
    actual = jaxrnn.rnn(outer(jaxrnn.rnn), inputs, [state], mask=GAPS)
    assert_same(actual, expected)
    _, scanned = jax.lax.scan(
        lambda carry, x: outer(jaxrnn.rnn)(x, carry)[::-1], [state], inputs.swapaxes(0, 1)
    )
    expected = reference_rnn(outer(loop), inputs, [state], xp=jnp)[1]
    chex.assert_trees_all_close(scanned.swapaxes(0, 1), expected, rtol=2e-5, atol=2e-5)


def test_parameters_closed_over_by_an_eager_call():
    """Without jit, a gradient flows into a closure as it does through any JAX function."""
    case = CASES["simple_rnn"]
    arguments = case.arguments()

    wide = cast_floats(arguments, np.float64)

    def eager(params):
        return loss(case, jaxrnn.rnn, jnp, arguments._replace(params=params))

    expected = numerical_gradient(
        lambda p: loss(case, reference_rnn, np, wide._replace(params=p)), arguments.params
    )
    assert_same(jax.grad(eager)(arguments.params), cast_floats(expected, np.float32), scale=10)


def test_without_jit_the_step_sees_numbers():
    """As under a debugger: the masks, the held output and a condition in Python."""

    def step(x, states):
        h = states[0] * (0.5 if float(jnp.sum(x)) > 0 else 0.25) + x
        return 2 * h, [h]

    def plain(x, states):
        h = states[0] * np.float32(0.5 if float(np.sum(x)) > 0 else 0.25) + x
        return 2 * h, [h]

    # All samples valid at the same steps: a masked one is fed something else.
    mask = np.tile([1, 0, 1, 1, 0], (2, 1))
    inputs = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    start = [np.ones((2, 3), np.float32)]
    with jax.disable_jit():
        actual = jaxrnn.rnn(step, inputs, start, mask=mask)
    assert_same(actual, reference_rnn(plain, inputs, start, mask=mask))
