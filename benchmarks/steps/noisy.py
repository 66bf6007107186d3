"""Steps with a random key in the state.

Letters: B samples, T timesteps, D input features, H units.
"""

import jax
import jax.numpy as jnp

from benchmarks.steps.forms import Draw, Loop, Size, loop
from benchmarks.steps.gated import lstm_cell


def dropout(draw: Draw, size: Size) -> Loop:
    """A random key in the state, and dropout between state and state."""
    B, T, D, H = size

    def body(p):
        def step(carry, x):
            key, h = carry
            key, now = jax.random.split(key)
            kept = jax.random.bernoulli(now, 0.9, h.shape)
            h = jnp.tanh(x @ p["W"] + jnp.where(kept, h / 0.9, 0) @ p["U"] + p["b"])
            return (key, h), h

        return step

    init = (jax.random.key(0), draw.normal(B, H))
    return loop(body, draw.gates(1, D, H), init, draw.normal(T, B, D))


def zoneout(draw: Draw, size: Size) -> Loop:
    """An LSTM whose units now and then keep their old values (Krueger et al., 2016)."""
    B, T, D, H = size

    def body(p):
        def step(carry, x):
            key, h, c = carry
            key, of_h, of_c = jax.random.split(key, 3)
            new_h, new_c = lstm_cell(p, x, h, c)
            h = jnp.where(jax.random.bernoulli(of_h, 0.1, h.shape), h, new_h)
            c = jnp.where(jax.random.bernoulli(of_c, 0.1, c.shape), c, new_c)
            return (key, h, c), h

        return step

    init = (jax.random.key(0), draw.normal(B, H), draw.normal(B, H))
    return loop(body, draw.gates(4, D, H), init, draw.normal(T, B, D))


def langevin(draw: Draw, size: Size) -> Loop:
    """Particles in wells with two minima, pushed by their inputs and by noise: no product."""
    B, T, _, H = size

    def body(p):
        def step(carry, x):
            key, h = carry
            key, now = jax.random.split(key)
            noise = jax.random.normal(now, h.shape)
            h = h + 0.1 * (h - h**3 + p["b"] + x) + p["scale"] * noise
            return (key, h), h

        return step

    params = {"b": draw.normal(H), "scale": draw.normal(H, scale=0.1)}
    return loop(body, params, (jax.random.key(0), draw.normal(B, H)), draw.normal(T, B, H))
