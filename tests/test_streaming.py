"""Cutting the time axis anywhere and handing the states on equals one call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, GAPS, TIME, assert_same

import jaxrnn


def cut_call(case, arguments, cut, **flags):
    """Two calls, the second over what comes later in processing order."""
    later_first = flags.get("go_backwards", False)
    parts = [slice(cut, None), slice(0, cut)] if later_first else [slice(0, cut), slice(cut, None)]
    states, outputs = arguments.initial_states, []
    for part in parts:
        inputs = jax.tree.map(lambda leaf, part=part: leaf[:, part], arguments.inputs)
        patterns = {name: flags[name][:, part] for name in {"mask", "reset"} & flags.keys()}
        last_output, piece, states = case.call(
            jaxrnn.rnn,
            jnp,
            arguments._replace(inputs=inputs, initial_states=states),
            **flags | patterns,
        )
        outputs.append(piece)
    return last_output, jax.tree.map(lambda *p: jnp.concatenate(p, axis=1), *outputs), states


@pytest.mark.parametrize("cut", [1, 5])
def test_two_calls_equal_one(cut):
    case = CASES["nested_inputs_and_outputs"]
    arguments = case.arguments()
    expected = case.call(jaxrnn.rnn, jnp, arguments)
    assert_same(cut_call(case, arguments, cut), expected)


@pytest.mark.parametrize("name", ["bare_state", "namedtuple_state", "rank_1_state"])
@pytest.mark.parametrize(("cut", "go_backwards"), [(5, False), (3, True)])
def test_with_a_mask_that_gaps_across_the_cut(name, cut, go_backwards):
    """Where the output is the first state, the held output crosses the cut as well."""
    case = CASES[name]
    arguments = case.arguments()
    flags = {"mask": GAPS, "go_backwards": go_backwards}
    expected = case.call(jaxrnn.rnn, jnp, arguments, **flags)
    assert_same(cut_call(case, arguments, cut, **flags), expected)


@pytest.mark.parametrize("name", ["readout", "counter"])
def test_any_output_streams_through_a_mask_where_masked_rows_are_zero(name):
    case = CASES[name]
    arguments = case.arguments()
    flags = {"mask": GAPS, "zero_output_for_mask": True}
    _, outputs, states = case.call(jaxrnn.rnn, jnp, arguments, **flags)
    _, cut_outputs, cut_states = cut_call(case, arguments, 4, **flags)
    assert_same((cut_outputs, cut_states), (outputs, states))


def test_with_resets_in_the_first_part():
    case = CASES["lstm"]
    arguments = case.arguments()
    reset = np.zeros(GAPS.shape, bool)
    reset[0, 2] = reset[1, 3] = True
    expected = case.call(jaxrnn.rnn, jnp, arguments, reset=reset)
    assert_same(cut_call(case, arguments, 4, reset=reset), expected)


def test_step_by_step_under_jit():
    case = CASES["lstm"]
    arguments = case.arguments()
    expected = case.call(jaxrnn.rnn, jnp, arguments)

    @jax.jit
    def advance(x, states):
        step = case.make_step(jnp, arguments.params)
        last_output, _, states = jaxrnn.rnn(step, x, states, return_all_outputs=False)
        return last_output, states

    states, outputs = arguments.initial_states, []
    for t in range(TIME):
        last_output, states = advance(arguments.inputs[:, t : t + 1], states)
        outputs.append(last_output)
    assert_same((last_output, jnp.stack(outputs, axis=1), states), expected)
