"""A masked step leaves no trace: not in outputs, not in states, not in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    GAPS,
    LENGTHS,
    assert_identical,
    assert_same,
    results_and_gradients,
    valid_steps,
    with_padding,
)

import jaxrnn

# The method is named because the library leaves arrays as small as these to lax.scan.
BLOCKS = {"chunk": 3, "method": "sequential"}
PADDINGS = (np.nan, np.inf, -np.inf, 1e30)
PADDED_CASES = (
    "lstm",
    "readout",
    "nested_inputs_and_outputs",
    "rank_1_state",
    "rank_3_state",
    "counter",
    "boolean_state",
    "constants",
    "no_output",
)


def case_call(case, **flags):
    def call(inputs, rest):
        params, states, constants = rest
        step = case.make_step(jnp, params)
        return jaxrnn.rnn(step, inputs, states, constants=constants, **flags)

    return call


@pytest.mark.parametrize("name", PADDED_CASES)
def test_padding_of_any_value_changes_no_result_and_no_gradient(name):
    case = CASES[name]
    zeroed = PADDED_CASES.index(name) % 2 == 1
    flags = {"zero_output_for_mask": zeroed, "go_backwards": zeroed} if zeroed else BLOCKS
    params, inputs, states, constants = case.arguments()
    rest = (params, states, constants)
    run = results_and_gradients(case_call(case, mask=GAPS, input_length=LENGTHS, **flags))
    valid = valid_steps(*GAPS.shape, GAPS, LENGTHS)
    (_, results), gradients = run(with_padding(inputs, valid, 0.0), rest)
    for padding in PADDINGS:
        (_, padded_results), padded = run(with_padding(inputs, valid, padding), rest)
        assert_identical(padded_results, results)
        assert_identical(padded, gradients)
    for leaf in jax.tree.leaves(gradients[0]):
        assert np.all(np.asarray(leaf)[~valid] == 0.0)
        assert np.any(np.asarray(leaf)[valid] != 0.0)


@pytest.mark.parametrize("flags", [{"unroll": True}, {"remat": True}, {"time_major": True}, BLOCKS])
def test_padding_is_invisible_on_every_path(flags):
    case = CASES["readout"]
    params, inputs, states, _ = case.arguments()
    arrange = (lambda x: x.swapaxes(0, 1)) if flags.get("time_major") else (lambda x: x)
    run = results_and_gradients(case_call(case, mask=arrange(GAPS), **flags))
    plain = run(arrange(with_padding(inputs, GAPS, 0.0)), (params, states, None))
    padded = run(arrange(with_padding(inputs, GAPS, np.nan)), (params, states, None))
    assert_identical(padded, plain)


def test_tangents_of_masked_inputs_are_not_felt():
    case = CASES["readout"]
    params, inputs, states, _ = case.arguments()
    call = lambda x: case_call(case, mask=GAPS)(x, (params, states, None))  # noqa: E731
    tangent = np.ones_like(inputs)
    jvp = jax.jit(lambda x, dx: jax.jvp(call, (x,), (dx,)))
    expected = jvp(inputs, with_padding(tangent, GAPS, 0.0))
    actual = jvp(with_padding(inputs, GAPS, np.nan), with_padding(tangent, GAPS, 5.0))
    assert_identical(actual, expected)


@pytest.mark.parametrize("shape", ["same", "other"])
def test_before_the_first_valid_step_the_output_is_the_first_state_or_zero(shape):
    units = 4 if shape == "same" else 5
    states = [jnp.full((2, 4), 7.0), jnp.full((2, units), 3.0)]

    def step(x, states):
        return states[1] + x[:, :1], [states[0], states[1] + 1.0]

    mask = np.array([[0, 0, 1, 0], [0, 0, 0, 0]])
    last_output, outputs, new_states = jaxrnn.rnn(step, jnp.ones((2, 4, 3)), states, mask=mask)
    first = 7.0 if shape == "same" else 0.0
    np.testing.assert_array_equal(outputs[0, :, 0], [first, first, 4.0, 4.0])
    np.testing.assert_array_equal(outputs[1, :, 0], [first] * 4)
    np.testing.assert_array_equal(last_output[:, 0], [4.0, first])
    np.testing.assert_array_equal(new_states[1][:, 0], [4.0, 3.0])


def test_the_first_state_must_match_the_output_in_structure_too():
    state = {"h": jnp.full((2, 4), 7.0)}
    mask = np.zeros((2, 3))

    def bare_output(x, states):
        return states[0]["h"], states

    def dict_output(x, states):
        return states[0], states

    last_output, _, _ = jaxrnn.rnn(bare_output, jnp.ones((2, 3, 1)), [state], mask=mask)
    np.testing.assert_array_equal(last_output, jnp.zeros((2, 4)))
    last_output, _, _ = jaxrnn.rnn(dict_output, jnp.ones((2, 3, 1)), [state], mask=mask)
    np.testing.assert_array_equal(last_output["h"], state["h"])


def test_a_held_output_keeps_the_dtype_of_the_output():
    def step(x, states):
        return states[0].astype(jnp.bfloat16), [states[0] + 1.0]

    state = jnp.full((2, 4), 7.0)
    mask = np.array([[0, 1, 0], [0, 0, 0]])
    last_output, outputs, (new_state,) = jaxrnn.rnn(step, jnp.ones((2, 3, 1)), [state], mask=mask)
    assert last_output.dtype == outputs.dtype == jnp.bfloat16
    assert new_state.dtype == jnp.float32
    np.testing.assert_array_equal(outputs[..., 0].astype(jnp.float32), np.full((2, 3), 7.0))


def test_of_a_complex_first_state_a_real_output_holds_the_real_part():
    def step(x, states):
        return states[0].real + x, [1j * states[0]]

    state = jnp.full((2, 4), 7.0 + 5.0j)
    mask = np.array([[0, 1, 0], [0, 0, 0]])
    last_output, outputs, _ = jaxrnn.rnn(step, jnp.ones((2, 3, 4)), [state], mask=mask)
    assert last_output.dtype == outputs.dtype == jnp.float32
    np.testing.assert_array_equal(outputs[..., 0], [[7.0, 8.0, 8.0], [7.0, 7.0, 7.0]])


def test_random_keys_as_first_state_are_no_output():
    def step(x, states):
        keys, count = states
        return x[:, 0] + count, [keys, count + 1]

    states = [jax.random.split(jax.random.key(0), 2), jnp.ones(2)]
    mask = np.array([[0, 1, 0], [0, 0, 0]])
    last_output, outputs, _ = jaxrnn.rnn(step, jnp.ones((2, 3, 1)), states, mask=mask)
    np.testing.assert_array_equal(last_output, [2.0, 0.0])
    np.testing.assert_array_equal(outputs, [[0.0, 2.0, 2.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("return_all_outputs", [True, False])
def test_last_output_is_the_latest_valid_one_even_where_rows_are_zeroed(return_all_outputs):
    def step(x, states):
        return x, states

    inputs = jnp.arange(1.0, 13.0).reshape(3, 4, 1)
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    last_output, outputs, _ = jaxrnn.rnn(
        step,
        inputs,
        jnp.full((3, 1), 50.0),
        mask=mask,
        zero_output_for_mask=True,
        return_all_outputs=return_all_outputs,
    )
    np.testing.assert_array_equal(last_output[:, 0], [2.0, 8.0, 0.0])
    rows = inputs[..., 0] * mask
    np.testing.assert_array_equal(outputs[..., 0], rows if return_all_outputs else rows[:, -1:])


@pytest.mark.parametrize("setting", ["mask", "reset"])
def test_a_random_key_in_the_state_always_moves_on(setting):
    key = jax.random.key(3)
    inputs = np.zeros((2, 4, 3), np.float32)
    pattern = np.array([[0, 1, 0, 0], [0, 0, 0, 1]], bool)

    def step(x, states):
        noise, key = states
        key, now = jax.random.split(key)
        noise = noise + jax.random.normal(now, noise.shape)
        return noise, [noise, key]

    noise, expected_key, rows = jnp.zeros((2, 3)), key, []
    for t in range(4):
        if setting == "reset":
            noise = jnp.stack([jnp.zeros(3) if pattern[b, t] else noise[b] for b in range(2)])
        new, (_, expected_key) = step(None, [noise, expected_key])
        held = pattern[:, t] if setting == "mask" else [True, True]
        noise = jnp.stack([new[b] if held[b] else noise[b] for b in range(2)])
        rows.append(noise)
    last_output, outputs, states = jaxrnn.rnn(
        step, inputs, [jnp.zeros((2, 3)), key], **{setting: pattern}
    )
    assert_same(last_output, rows[-1])
    assert_same(outputs, jnp.stack(rows, axis=1))
    assert_same(states, [rows[-1], expected_key])


def test_masks_of_every_form_say_the_same():
    case = CASES["rank_1_state"]
    arguments = case.arguments()
    expected = case.call(jaxrnn.rnn, jnp, arguments, mask=GAPS)
    for mask in (
        jnp.asarray(GAPS)[..., None],
        GAPS.astype(np.int8),
        GAPS.astype(np.uint8)[..., None],
        -0.25 * GAPS.astype(np.float32),
        jnp.asarray(GAPS, jnp.bfloat16),
        GAPS.astype(np.int64) << 32,  # wider than what JAX has
        1e-300 * GAPS,
    ):
        assert_identical(case.call(jaxrnn.rnn, jnp, arguments, mask=mask), expected)


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4, jnp.int8])
def test_masked_integers_may_be_narrow(dtype):
    """As inputs, and as states of a step that is kept from what they hold."""
    x, n = (jnp.asarray(np.arange(size).reshape(3, -1, 2) % 7, dtype) for size in (42, 6))

    def step(x, states):
        return jnp.log(x.astype(jnp.float32)), [states[0] + x]

    _, outputs, [total] = jaxrnn.rnn(step, x, [n[:, 0]], mask=GAPS)
    expected = np.asarray(n[:, 0], int) + np.sum(np.asarray(x, int) * GAPS[..., None], axis=1)
    bits = 2 ** (8 if dtype is jnp.int8 else 4)
    assert total.dtype == dtype
    np.testing.assert_array_equal(np.asarray(total, int) % bits, expected % bits)
    assert outputs.dtype == jnp.float32


def test_lengths_may_be_a_list_with_traced_numbers():
    case = CASES["rank_1_state"]
    arguments = case.arguments()
    expected = case.call(jaxrnn.rnn, jnp, arguments, input_length=[7, 2, 0])
    run = jax.jit(lambda n: case.call(jaxrnn.rnn, jnp, arguments, input_length=[7, n, n - 2]))
    assert_identical(run(2), expected)


def test_a_mask_of_ones_is_no_mask():
    case = CASES["counter"]
    arguments = case.arguments()
    expected = case.call(jaxrnn.rnn, jnp, arguments)
    assert_same(case.call(jaxrnn.rnn, jnp, arguments, mask=np.ones((3, 7))), expected)
    assert_same(case.call(jaxrnn.rnn, jnp, arguments, input_length=7), expected)


@pytest.mark.parametrize("container", ["list", "dict"])
def test_a_step_may_write_into_the_containers_it_was_given(container):
    """What such a step changes is a list or dict of its own: masks and resets still hold."""
    key = 0 if container == "list" else "n"

    def step(x, states):
        x["a"] = x["a"] + 1.0
        states[key] = states[key] + x["a"]
        return states[key], states

    inputs, state = {"a": np.zeros((3, 7, 1), np.float32)}, np.zeros((3, 1), np.float32)
    states = [state] if container == "list" else {"n": state}
    reset = np.zeros((3, 7), bool)
    reset[0, 3] = True
    _, outputs, new_states = jaxrnn.rnn(step, inputs, states, mask=GAPS, reset=reset)
    np.testing.assert_array_equal(new_states[key][:, 0], [2.0, 3.0, 0.0])
    np.testing.assert_array_equal(outputs[0, :, 0], [1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0])
    assert states[key] is state
    assert not inputs["a"].any()
