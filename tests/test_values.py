"""Outputs, last output and states equal the plain-Python loop's, for every case and setting."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    GAPS,
    LENGTHS,
    SETTINGS,
    assert_same,
    reference_rnn,
)

import jaxrnn

# Two cases go through every setting, the rest through those that differ most; where a case can't
# be masked, that leaves the settings without a mask.
CORE = ("nested_inputs_and_outputs", "constants")
SPREAD = ("masked_blocks", "remat_everything")
UNMASKED = ("plain", "unrolled_by_two_backwards", "remat_backwards", "last_only")

PROBLEMS = [
    (name, setting)
    for name, case in CASES.items()
    for setting in (SETTINGS if name in CORE else SPREAD if case.holdable else UNMASKED)
]


@pytest.mark.parametrize(("name", "setting"), PROBLEMS)
def test_equals_the_plain_loop(name, setting):
    case, flags = CASES[name], SETTINGS[setting]
    arguments = case.arguments()
    actual = case.call(jaxrnn.rnn, jnp, arguments, **flags)
    expected = case.call(reference_rnn, np, arguments, **flags)
    assert_same(actual, expected, case.compute_dtype)


def test_the_eleven_keras_arguments_are_positional():
    case = CASES["constants"]
    arguments = case.arguments()
    params, inputs, states, constants = arguments
    step = case.make_step(jnp, params)
    actual = jaxrnn.rnn(
        step, inputs, states, True, GAPS, constants, False, LENGTHS, False, True, True
    )
    expected = case.call(
        reference_rnn,
        np,
        arguments,
        go_backwards=True,
        mask=GAPS,
        input_length=LENGTHS,
        zero_output_for_mask=True,
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("name", ["lstm", "readout"])
def test_last_output_is_the_last_row_of_outputs(name):
    case = CASES[name]
    for flags in ({}, {"mask": GAPS}, {"mask": GAPS, "go_backwards": True}):
        last_output, outputs, _ = case.call(jaxrnn.rnn, jnp, case.arguments(), **flags)
        np.testing.assert_array_equal(last_output, outputs[:, -1])


@pytest.mark.parametrize(
    ("states", "constants", "container"),
    [(list, None, list), (tuple, None, tuple), (list, tuple, list), (tuple, list, tuple)],
)
def test_the_step_gets_its_states_in_the_container_in_which_they_came(states, constants, container):
    seen = []

    def step(x, states):
        seen.append((type(states), len(states)))
        return x, [states[0], states[1]]

    pair = [jnp.zeros((2, 3)), jnp.ones((2, 3))]
    constants = None if constants is None else constants(pair)
    _, _, new_states = jaxrnn.rnn(step, jnp.ones((2, 4, 3)), states(pair), constants=constants)
    assert set(seen) == {(container, 2 if constants is None else 4)}
    assert type(new_states) is states


def test_a_bare_array_stands_for_a_list_of_one_with_constants_too():
    def step(x, states):
        assert type(states) is list
        state, constant = states
        return x + constant, (state + x,)

    x = jnp.ones((2, 4, 3))
    last_output, _, new_states = jaxrnn.rnn(step, x, jnp.zeros((2, 3)), constants=[2.0 * x[:, 0]])
    assert type(new_states) is list
    np.testing.assert_array_equal(new_states[0], 4.0 * x[:, 0])
    np.testing.assert_array_equal(last_output, 3.0 * x[:, 0])


def test_numpy_and_jax_arrays_serve_alike_and_a_single_step_is_enough():
    case = CASES["lstm"]
    arguments = case.arguments(time=1)
    step = case.make_step(np, arguments.params)
    expected = reference_rnn(step, arguments.inputs, arguments.initial_states)
    step = case.make_step(jnp, arguments.params)
    assert_same(jaxrnn.rnn(step, arguments.inputs, arguments.initial_states), expected)


@pytest.mark.parametrize("length", [0, 3, 7, 100])
def test_lengths_may_be_zero_or_beyond_the_end(length):
    case = CASES["readout"]
    arguments = case.arguments()
    expected = case.call(reference_rnn, np, arguments, input_length=length)
    actual = case.call(jaxrnn.rnn, jnp, arguments, input_length=length)
    assert_same(actual, expected)
    actual = case.call(jaxrnn.rnn, jnp, arguments, input_length=jnp.full(3, length))
    assert_same(actual, expected)
