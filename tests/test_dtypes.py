"""States keep the dtypes that they were given; outputs have the step's; weak types never matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, GAPS, assert_same, cast_floats, reference_rnn, scalar_of

import jaxrnn

X = jnp.ones((2, 4, 3))


@pytest.mark.parametrize("returned", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("given", ["bfloat16", "float16", "float32"])
def test_a_floating_state_keeps_its_dtype(given, returned):
    def step(x, states):
        assert states[0].dtype == given
        h = (0.5 * states[0] + x).astype(returned)
        return h, [h]

    state = jnp.zeros((2, 3), given)
    last_output, outputs, (new_state,) = jaxrnn.rnn(step, X, [state])
    assert new_state.dtype == given
    assert last_output.dtype == outputs.dtype == returned
    np.testing.assert_array_equal(new_state.astype(jnp.float32), jnp.full((2, 3), 1.875))


def test_casting_back_is_differentiable():
    case = CASES["bfloat16_compute"]
    arguments = case.arguments()

    def loss(params, rnn):
        return scalar_of(case.call(rnn, jnp, arguments._replace(params=params), mask=GAPS))

    def loop(*arguments, **flags):
        return reference_rnn(*arguments, xp=jnp, **flags)

    actual = jax.jit(jax.grad(lambda params: loss(params, jaxrnn.rnn)))(arguments.params)
    expected = jax.jit(jax.grad(lambda params: loss(params, loop)))(arguments.params)
    assert_same(actual, expected, case.compute_dtype)


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (lambda: jnp.zeros((2, 3)), lambda _: jnp.full((2, 3), 1.0)),
        (lambda: jnp.full((2, 3), 0.0), lambda s: s + np.float32(1.0)),
        (lambda: jnp.broadcast_to(jnp.asarray(0.0), (2, 3)), lambda s: s + jnp.ones((2, 3))),
        (lambda: jnp.zeros((2, 3), jnp.int32), lambda _: jnp.full((2, 3), 1)),
        (lambda: jnp.full((2, 3), 0), lambda s: s + jnp.ones((2, 3), jnp.int32)),
        (lambda: jnp.zeros((2, 3), jnp.bfloat16), lambda _: jnp.full((2, 3), 1.0)),
    ],
    ids=["strong", "weak", "broadcast", "int_strong", "int_weak", "bfloat16"],
)
@pytest.mark.parametrize("mask", [None, np.ones((2, 4))])
def test_weak_types_never_matter(given, returned, mask):
    def step(x, states):
        new = returned(states[0])
        return new, [new]

    state = given()
    _, _, (new_state,) = jaxrnn.rnn(step, X, [state], mask=mask)
    assert new_state.dtype == state.dtype


def test_integer_and_boolean_outputs_are_held_and_zeroed_in_their_own_dtype():
    def step(x, states):
        n = states[0] + 1
        return {"count": n, "odd": n % 2 == 1}, [n]

    mask = np.array([[1, 0, 1, 0], [0, 1, 1, 0]])
    for zeroed, counts in (
        (False, [[1, 1, 2, 2], [0, 1, 2, 2]]),
        (True, mask * [[1, 0, 2, 0], [0, 1, 2, 0]]),
    ):
        last_output, outputs, _ = jaxrnn.rnn(
            step, X, [jnp.zeros((2,), jnp.int8)], mask=mask, zero_output_for_mask=zeroed
        )
        assert outputs["count"].dtype == last_output["count"].dtype == jnp.int8
        assert outputs["odd"].dtype == last_output["odd"].dtype == jnp.bool_
        np.testing.assert_array_equal(outputs["count"], counts)
        np.testing.assert_array_equal(outputs["odd"], np.asarray(counts) % 2 == 1)
        np.testing.assert_array_equal(last_output["count"], [2, 2])


@pytest.mark.parametrize("name", ["lstm", "nested_states", "counter"])
@pytest.mark.parametrize("remat", [False, True])
def test_double_precision_throughout(name, remat):
    case = CASES[name]
    arguments = cast_floats(case.arguments(), np.float64)
    expected = case.call(reference_rnn, np, arguments, mask=GAPS)
    with jax.enable_x64(True):
        actual = case.call(jaxrnn.rnn, jnp, arguments, mask=GAPS, remat=remat)
        assert_same(actual, expected)


def test_complex_states_and_outputs():
    def step(x, states):
        z = states[0] * jnp.asarray(1j, jnp.complex64) + x
        return z, [z]

    expected, rows = np.zeros((2, 3), np.complex64), []
    for _ in range(4):
        expected = expected * np.complex64(1j) + np.float32(1.0)
        rows.append(expected)
    last_output, outputs, new_states = jaxrnn.rnn(step, X, [jnp.zeros((2, 3), jnp.complex64)])
    assert_same(last_output, rows[-1])
    assert_same(outputs, np.stack(rows, axis=1))
    assert_same(new_states, [rows[-1]])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_lengths_of_any_integer_dtype(dtype):
    case = CASES["lstm"]
    arguments = case.arguments()
    lengths = np.array([2, 7, 0], dtype)
    expected = case.call(reference_rnn, np, arguments, input_length=lengths)
    assert_same(case.call(jaxrnn.rnn, jnp, arguments, input_length=lengths), expected)
