"""Steps that evaluate a network several times: solvers, and loops within a step.

Letters: B samples, T timesteps, D input features, H units.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.steps.forms import Draw, Loop, Size, loop
from benchmarks.steps.gated import gru_cell


def inner_scan(draw: Draw, size: Size) -> Loop:
    """Three passes over the state at every step, in a loop inside the loop."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            drive = x @ p["W"] + p["b"]
            h, _ = lax.scan(lambda h, _: (jnp.tanh(drive + h @ p["U"]), None), h, length=3)
            return h, h

        return step

    return loop(body, draw.gates(1, D, H), draw.normal(B, H), draw.normal(T, B, D))


def adaptive(draw: Draw, size: Size) -> Loop:
    """Up to four rounds per input, of which each sample takes as many as it wants (Graves 2016)."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            drive = x @ p["W"] + p["b"]

            def ponder(carry, _):
                h, halted, mean = carry
                h = jnp.tanh(drive + h @ p["U"])
                share = jax.nn.sigmoid(h @ p["halt"]) * (1 - halted)
                return (h, halted + share, mean + share[:, None] * h), None

            start = (h, jnp.zeros(B), jnp.zeros_like(h))
            (h, halted, mean), _ = lax.scan(ponder, start, None, length=4)
            h = mean + (1 - halted)[:, None] * h
            return h, halted

        return step

    params = draw.gates(1, D, H) | {"halt": draw.weight(H)}
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))


def euler(draw: Draw, size: Size) -> Loop:
    """One Euler step of a differential equation whose right side is a two-layer network."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            hidden = jnp.tanh(jnp.concatenate([h, x], axis=-1) @ p["W1"])
            h = h + 0.1 * (hidden @ p["W2"])
            return h, h

        return step

    params = {"W1": draw.weight(H + D, 2 * H), "W2": draw.weight(2 * H, H)}
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))


def runge_kutta(draw: Draw, size: Size) -> Loop:
    """Runge and Kutta's classical step, for as long as each input lasts."""
    B, T, D, H = size

    def body(p):
        def slope(h, x):
            return jnp.tanh(h @ p["W1"] + x @ p["V"] + p["b"]) @ p["W2"]

        def step(h, row):
            x, time = row
            first = slope(h, x)
            second = slope(h + time / 2 * first, x)
            third = slope(h + time / 2 * second, x)
            fourth = slope(h + time * third, x)
            h = h + time / 6 * (first + 2 * second + 2 * third + fourth)
            return h, h

        return step

    params = {
        "W1": draw.weight(H, 2 * H),
        "W2": draw.weight(2 * H, H),
        "V": draw.weight(D, 2 * H),
        "b": draw.normal(2 * H, scale=0.1),
    }
    times = 0.1 * jnp.abs(draw.normal(T))
    return loop(body, params, draw.normal(B, H), (draw.normal(T, B, D), times))


def ode_gru(draw: Draw, size: Size) -> Loop:
    """A GRU whose state relaxes in eight substeps between inputs (Rubanova et al. 2019)."""
    B, T, D, H = size

    def body(p):
        def relaxed(h: Array) -> Array:
            return h + 0.1 * jnp.tanh(h @ p["W1"]) @ p["W2"]

        def step(h, x):
            h = gru_cell(p, x, lax.fori_loop(0, 8, lambda _, h: relaxed(h), h))
            return h, h

        return step

    params = draw.gates(3, D, H) | {"W1": draw.weight(H, H), "W2": draw.weight(H, H)}
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))
