"""Constants: arrays inside and outside `jit`, and what is no array as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same

import jaxrnn

TOKENS = np.array([[[0], [2], [1]], [[1], [1], [0]]])
TABLE = np.arange(12, dtype=np.float32).reshape(3, 4)
X = np.ones((2, 3, 4), np.float32)
H = np.zeros((2, 4), np.float32)


def both(step, inputs, constants):
    """The results outside and inside `jit`."""

    def call(inputs):
        return jaxrnn.rnn(step, inputs, [H], constants=constants)

    return call(inputs), jax.jit(call)(inputs)


def test_a_numpy_table_can_be_looked_up_by_what_is_traced():
    def step(token, states):
        h, table = states
        h = h + table[token[:, 0]]
        return h, [h]

    outside, inside = both(step, TOKENS, [TABLE])
    expected = np.cumsum(TABLE[TOKENS[..., 0]], axis=1)
    assert_same(outside, (expected[:, -1], expected, [expected[:, -1]]))
    assert_same(inside, outside)


def test_numbers_are_arrays_that_decide_no_dtype():
    seen = []

    def step(x, states):
        h, rate, flag = states
        seen.append((rate, flag))
        h = jnp.where(flag, h + rate * x, h)
        return h, [h]

    outside, inside = both(step, jnp.asarray(X, jnp.bfloat16), [0.5, np.True_])
    assert all(isinstance(constant, jax.Array) for pair in seen for constant in pair)
    assert outside[1].dtype == inside[1].dtype == H.dtype
    np.testing.assert_array_equal(outside[0], 1.5)
    assert_same(inside, outside)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_a_step_may_write_into_a_container_among_its_constants(jit):
    bag = {"scale": np.float32(2.0)}

    def step(x, states):
        h, constants = states
        constants["scale"] = h = h + constants["scale"] * x
        return h, [h]

    last_output, _, _ = jit(lambda x: jaxrnn.rnn(step, x, [H], constants=[bag]))(X)
    np.testing.assert_array_equal(last_output, 6.0)
    assert bag == {"scale": np.float32(2.0)}


def test_what_is_no_array_reaches_the_step():
    def step(x, states):
        h, function, name = states
        assert name == "tanh"
        h = function(x + h)
        return h, [h]

    outside, inside = both(step, X, [jnp.tanh, "tanh"])
    np.testing.assert_allclose(outside[0], np.tanh(1 + np.tanh(1 + np.tanh(1.0))), rtol=1e-6)
    assert_same(inside, outside)
    report = jaxrnn.explain(step, X, [H], constants=[jnp.tanh, "tanh"])
    assert "over 3 steps" in report


def test_nor_does_it_hide_the_error_of_a_step():
    def step(x, states):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        jaxrnn.rnn(step, X, [H], constants=[both, 0.5, jnp.float32])
    note = caught.value.__notes__[0]
    assert "states[1]: a function" in note
    assert "states[2]: float32[]" in note


def test_an_array_of_what_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"constants\[1\]\['names'\]"):
        jaxrnn.rnn(lambda x, s: (x, s[:1]), X, [H], constants=[H, {"names": np.array(["a"])}])
