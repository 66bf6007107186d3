"""A reset starts a sample over from this call's initial states, in the middle of a sequence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    GAPS,
    RESETS,
    assert_identical,
    assert_same,
    cast_floats,
    numerical_gradient,
    reference_rnn,
    scalar_of,
)

import jaxrnn


def rows(tree, sample, start=0, stop=None):
    """One sample's part of a batch-major pytree, between two steps if it has a time axis."""
    return jax.tree.map(lambda leaf: leaf[sample : sample + 1, start:stop], tree)


@pytest.mark.parametrize("name", ["lstm", "readout", "nested_states"])
@pytest.mark.parametrize("go_backwards", [False, True])
def test_packed_episodes_equal_separate_calls(name, go_backwards):
    case = CASES[name]
    params, inputs, initial_states, _ = case.arguments(batch=2, time=6)
    step = case.make_step(jnp, params)
    # Episodes of 4 and 2 steps in the first sample, of 1, 2 and 3 in the second.
    bounds = [[0, 4, 6], [0, 1, 3, 6]]
    starts = np.zeros((2, 6), bool)
    for sample, edges in enumerate(bounds):
        starts[sample, [edge - 1 for edge in edges[1:]] if go_backwards else edges[:-1]] = True
    last_output, outputs, new_states = jaxrnn.rnn(
        step, inputs, initial_states, go_backwards, reset=starts
    )
    if go_backwards:
        outputs = jax.tree.map(lambda leaf: leaf[:, ::-1], outputs)
    for sample, edges in enumerate(bounds):
        own_states = jax.tree.map(lambda leaf, b=sample: leaf[b : b + 1], initial_states)
        for start, stop in itertools.pairwise(edges):
            alone_last, alone, alone_states = reference_rnn(
                case.make_step(np, params),
                rows(inputs, sample, start, stop),
                own_states,
                go_backwards,
            )
            if go_backwards:
                alone = jax.tree.map(lambda leaf: leaf[:, ::-1], alone)
            assert_same(rows(outputs, sample, start, stop), alone)
            if (start == 0) if go_backwards else (stop == 6):
                assert_same(last_output[sample : sample + 1], alone_last)
                assert_same(rows(new_states, sample), alone_states)


def test_it_is_differentiable_into_initial_states():
    """Every episode adds to the gradient of the one set of initial states."""
    case = CASES["lstm"]
    arguments = case.arguments()

    def loss(states, rnn, xp, others):
        moved = others._replace(initial_states=states)
        return scalar_of(case.call(rnn, xp, moved, reset=RESETS, mask=GAPS), xp)

    states, wide = arguments.initial_states, cast_floats(arguments, np.float64)
    actual = jax.jit(jax.grad(lambda s: loss(s, jaxrnn.rnn, jnp, arguments)))(states)
    expected = numerical_gradient(lambda s: loss(s, reference_rnn, np, wide), states)
    assert_same(actual, cast_floats(expected, np.float32), scale=10)


def test_a_masked_step_resets_nothing():
    case = CASES["lstm"]
    arguments = case.arguments()
    expected = case.call(jaxrnn.rnn, jnp, arguments, mask=GAPS)
    actual = case.call(jaxrnn.rnn, jnp, arguments, mask=GAPS, reset=~GAPS)
    assert_same(actual, expected)


def test_a_reset_at_the_first_step_changes_nothing():
    case = CASES["lstm"]
    arguments = case.arguments()
    first = np.zeros((3, 7), bool)
    first[:, 0] = True
    expected = case.call(jaxrnn.rnn, jnp, arguments)
    assert_same(case.call(jaxrnn.rnn, jnp, arguments, reset=first), expected)


def test_it_resets_to_the_states_of_this_call():
    def step(x, states):
        return states[0], [states[0] + x]

    x = jnp.ones((1, 4, 1))
    _, _, states = jaxrnn.rnn(step, x, jnp.zeros((1, 1)))
    _, outputs, _ = jaxrnn.rnn(step, x, states, reset=jnp.array([[False, False, True, False]]))
    np.testing.assert_array_equal(outputs[0, :, 0], [4.0, 5.0, 4.0, 5.0])


def test_a_reset_restores_states_only_and_never_the_held_output():
    """After a reset, a masked step still holds the output of the step before it."""

    def step(x, states):
        return states[0] + x, [states[0] + x]

    pattern = {"mask": np.array([[1, 1, 0, 1]]), "reset": np.array([[0, 1, 0, 0]])}
    _, outputs, _ = jaxrnn.rnn(step, jnp.ones((1, 4, 1)), jnp.full((1, 1), 10.0), **pattern)
    np.testing.assert_array_equal(outputs[0, :, 0], [11.0, 11.0, 11.0, 12.0])


def test_resets_of_every_form_say_the_same():
    case = CASES["lstm"]
    arguments = case.arguments()
    expected = case.call(jaxrnn.rnn, jnp, arguments, reset=RESETS)
    for reset in (RESETS[..., None].astype(np.int32), jnp.asarray(RESETS) * 0.5):
        assert_identical(case.call(jaxrnn.rnn, jnp, arguments, reset=reset), expected)


def test_padding_is_invisible_beside_resets():
    case = CASES["lstm"]
    params, inputs, states, _ = case.arguments()

    def loss(params, inputs, states):
        step = case.make_step(jnp, params)
        return scalar_of(jaxrnn.rnn(step, inputs, states, mask=GAPS, reset=RESETS))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    expected = run(params, np.where(GAPS[..., None], inputs, 0.0), states)
    actual = run(params, np.where(GAPS[..., None], inputs, np.nan), states)
    assert_identical(actual, expected)
