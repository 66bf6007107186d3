"""What JAX's strict settings forbid, only the caller's own code can do: the library never does."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    BATCH,
    CASES,
    SETTINGS,
    TIME,
    assert_identical,
    assert_same,
    checking_leaks,
    reference_rnn,
    scalar_of,
)
from jax import lax

import jaxrnn
from jaxrnn import cells

FEATURES, UNITS = 2, 4


@contextlib.contextmanager
def strict():
    """All at once: whatever one of them forbids, the error names it."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        checking_leaks(),
        jax.debug_nans(True),
    ):
        yield


def draw(*shape):
    return np.cos(np.arange(np.prod(shape)) * 1.7).reshape(shape).astype(np.float32)


PARAMS = {
    "w": draw(FEATURES, UNITS),
    "k": draw(FEATURES + UNITS, 2 * UNITS),
    "b": draw(1, UNITS),
    "v": draw(UNITS, 3),
}


def make_step(xp, p):
    """A product before the loop, one in it that is to be split, one after it."""

    def step(x, states):
        (h,) = states
        z, r = xp.split(xp.concatenate([x, h], -1) @ p["k"], 2, axis=-1)
        h = xp.tanh(x @ p["w"] + p["b"] + z * xp.tanh(r))
        return h @ p["v"], [h]

    return step


# What the cases have promotes ranks.
CASE = dataclasses.replace(CASES["simple_rnn"], make_step=make_step, params=lambda _: PARAMS)


@pytest.mark.parametrize(
    "name",
    [
        "masked_blocks",
        "lengths_and_mask_time_major",
        "masked_reset_backwards_unrolled",
        "remat_everything",
    ],
)
def test_rnn(name):
    flags = {"method": "sequential"} | SETTINGS[name]

    def derivatives(rnn):
        def loss(arguments):
            results = CASE.call(rnn, jnp, arguments, **flags)
            return scalar_of(results), results

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(CASE.arguments())

    with strict():
        actual = derivatives(jaxrnn.rnn)
    assert_same(actual, derivatives(functools.partial(reference_rnn, xp=jnp)), scale=10)


@pytest.mark.parametrize(
    ("make", "use_bias", "compiled"),
    # One of them eagerly, which takes long: while JAX looks for leaks it has no caches.
    [(cells.simple_rnn, True, False), (cells.gru, True, True), (cells.lstm, False, True)],
)
def test_cells(make, use_bias, compiled):
    inputs = draw(BATCH, TIME, FEATURES)

    def gradient():
        cell = make(UNITS, use_bias=use_bias)
        params = cell.init(jax.random.key(0), FEATURES)

        def loss(params):
            steps, states = (cell.step(params),) * 2, (cell.initial_states(BATCH),) * 2
            return scalar_of(jaxrnn.bidirectional(*steps, inputs, *states, input_length=5))

        return jax.grad(loss)(params)

    run = jax.jit(gradient) if compiled else gradient
    with strict():
        actual = run()
    assert_identical(actual, run())


@pytest.mark.parametrize("flags", [{}, {"chunk": 2}, {"remat": True}])
def test_nothing_is_moved_to_the_device_between_calls(flags):
    x, h, w = map(jnp.asarray, (draw(TIME, BATCH, UNITS), draw(BATCH, UNITS), draw(UNITS, UNITS)))
    mask = jnp.asarray(draw(TIME, BATCH) > 0)

    def body(h, x):
        h = jnp.tanh(x @ w + h @ w)
        return h, h

    def step(x, states):
        h, y = body(*states, x)
        return y, [h]

    flags = {"method": "sequential"} | flags
    expected = lax.scan(body, h, x), reference_rnn(step, x, [h], mask=mask, time_major=True, xp=jnp)
    with jax.transfer_guard("disallow"):
        actual = (
            jaxrnn.scan(body, h, x, **flags),
            jaxrnn.rnn(step, x, [h], mask=mask, time_major=True, **flags),
        )
    assert_same(actual, expected)


def test_padding_may_be_nan_outside_jit_where_nan_is_looked_for():
    mask = np.array([[1, 0], [1, 1]])
    padded = jnp.where(mask[..., None] == 1, draw(2, 2, FEATURES), jnp.nan)
    step, first = make_step(jnp, PARAMS), jnp.zeros((2, UNITS))

    def loss(inputs):
        return jnp.sum(jaxrnn.rnn(step, inputs, [first], mask=mask)[1] ** 2)

    with jax.debug_nans(True):
        gradient = jax.grad(loss)(padded)
    assert_same(gradient, jax.grad(loss)(jnp.nan_to_num(padded)))


def test_states_of_several_dtypes_in_parallel():
    """They enter one another, or count in numbers of another dtype."""

    def step(x, states):
        a, b, count = states
        new_a = jnp.float32(0.5) * a + b.astype(jnp.float32) + x
        new_b = jnp.bfloat16(0.5) * b + a.astype(jnp.bfloat16)
        count = (jnp.float32(2) * count.astype(jnp.float32)).astype(jnp.int32)
        return a, [new_a, new_b, count]

    inputs = draw(BATCH, TIME, 1)
    states = [jnp.ones((BATCH, 1), dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.int32)]

    def run(method):
        return jaxrnn.rnn(step, inputs, states, method=method)

    with strict():
        actual = run("parallel")
    assert_same(actual, run("lax"), compute_dtype=jnp.bfloat16)
