"""What a step asks for twice is computed, kept and handed on once; what only looks alike is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import BATCH, FEATURES, SPLIT, TIME, UNITS, gradient, operands, run
from helpers import assert_same
from jax import lax
from structure import SCAN, equations, multiply_adds

import jaxrnn


def runge_kutta(p, h, x):
    """Four evaluations of one network at the same input (Runge and Kutta's classical method)."""

    def slope(h):
        return jnp.tanh(h @ p["u"] + x @ p["w"] + p["b"]) @ p["v"]

    first = slope(h)
    second = slope(h + 0.05 * first)
    third = slope(h + 0.05 * second)
    fourth = slope(h + 0.1 * third)
    h = h + (first + 2 * second + 2 * third + fourth) / 60
    return h, h


def halves(p, h, x):
    """One split of which each use takes another part: nobody reads all of either."""
    z = x @ p["w"] + h @ p["u"] + p["b"]
    left, _ = jnp.split(z, 2, -1)
    _, right = jnp.split(z, 2, -1)
    h = jnp.tanh(jnp.concatenate([right, left], -1) @ p["v"])
    return h, (left, right)


def signs(p, h, x):
    """Literals that are equal, and yet not the same."""
    above, below = 1 / (0 * jnp.abs(h) + 0.0), 1 / (-0.0 * jnp.abs(h))
    h = jnp.tanh(x @ p["w"] + h @ p["u"])
    return h, (above > 0, below > 0, h * 0.1, h * np.float32(np.nextafter(np.float32(0.1), 1)))


def types(p, h, x):
    """The same numbers in several dtypes, and summed up along several axes."""
    rounded = [x.astype(dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.float16)]
    z = sum(r.astype(jnp.float32) for r in rounded) @ p["w"]
    h = jnp.tanh(z + h @ p["u"])
    return h, (*rounded, jnp.sum(z, 0), jnp.sum(z, 1), jnp.sum(z, 0))


@jax.custom_vjp
def clipped(x):
    """The identity, with a gradient that is clipped."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


def clipping_twice(p, h, x):
    """Each cotangent is clipped by itself, and not their sum."""
    z = x @ p["w"] + h @ p["u"] + p["b"]
    h = jnp.tanh(clipped(z) * clipped(z))
    return h, h


def draws(p, h, x):
    """The same key gives the same numbers, and another key others."""
    key = jax.random.fold_in(jax.random.key(3), jnp.int32(100 * jnp.abs(x[0, 0])))
    z = x @ p["w"] + h @ p["u"]
    same = [jax.random.normal(key, z.shape) for _ in range(2)]
    other = jax.random.normal(jax.random.split(key)[0], z.shape)
    h = jnp.tanh(z + 0.1 * same[0] + 0.2 * same[1] + 0.3 * other)
    return h, h


STEPS = [runge_kutta, halves, signs, types, clipping_twice, draws]


@pytest.mark.parametrize("step", STEPS)
def test_values_and_gradients_are_those_of_lax_scan(step):
    function, expected = run(jaxrnn.scan, step, **SPLIT), run(lax.scan, step)
    assert_same(jax.jit(function)(*operands()), jax.jit(expected)(*operands()))
    if step is not signs:  # an infinite slope
        ours, theirs = (jax.jit(gradient(f))(*operands()) for f in (function, expected))
        assert_same(ours, theirs, scale=10)


def test_a_sum_that_several_terms_share_is_one_row_per_step():
    """Once for all four evaluations: `x @ w + b` leaves the loop and comes back as one array."""
    program = jax.make_jaxpr(run(jaxrnn.scan, runge_kutta, **SPLIT))(*operands())
    (inner,) = [
        e for e, times in equations(program.jaxpr) if e.primitive is SCAN and times == TIME // 4
    ]
    rows = [v.aval.shape for v in inner.invars if v.aval.shape[:2] == (4, BATCH)]
    assert rows == [(4, BATCH, UNITS)]
    assert multiply_adds(program.jaxpr) == TIME * BATCH * (FEATURES + 8 * UNITS) * UNITS


def test_draws_without_a_key_are_not_taken_for_one():
    """`lax.rng_uniform` gives other numbers each time that it is called."""

    def step(h, x):
        first, second = (lax.rng_uniform(0.0, 1.0, (BATCH, UNITS)) for _ in range(2))
        h = jnp.tanh(x @ jnp.ones((FEATURES, UNITS)) + h)
        return h, (first, second)

    _, h, xs = operands()
    _, (first, second) = jax.jit(lambda h, xs: jaxrnn.scan(step, h, xs, **SPLIT))(h, xs)
    assert not np.any(np.asarray(first) == np.asarray(second))
