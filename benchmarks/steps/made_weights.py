"""Weights that are made within the step, from others.

Letters: B samples, T timesteps, D input features, H units.
"""

import jax.numpy as jnp
from jax import Array, lax

from benchmarks.steps.forms import Draw, Loop, Size, loop
from benchmarks.steps.gated import gru_cell


def weight_norm(draw: Draw, size: Size) -> Loop:
    """The weight is normalised inside the step: work that need not be repeated."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            U = p["U"] / jnp.linalg.norm(p["U"], axis=0, keepdims=True)
            h = jnp.tanh(x @ p["W"] + h @ U + p["b"])
            return h, h

        return step

    return loop(body, draw.gates(1, D, H), draw.normal(B, H), draw.normal(T, B, D))


def masked_weights(draw: Draw, size: Size) -> Loop:
    """A GRU of which five weights in six are zero."""
    B, T, D, H = size
    mask = draw.normal(H, 3 * H) > 1

    def body(p):
        def step(h, x):
            h = gru_cell(p | {"U": p["U"] * mask}, x, h)
            return h, h

        return step

    return loop(body, draw.gates(3, D, H), draw.normal(B, H), draw.normal(T, B, D))


def spectral_norm(draw: Draw, size: Size) -> Loop:
    """One round of the power method per step finds the norm to divide by (Miyato et al. 2018)."""
    B, T, D, H = size

    def unit(v: Array) -> Array:
        return lax.stop_gradient(v / jnp.linalg.norm(v))

    def body(p):
        def step(carry, x):
            h, left = carry
            right = unit(p["U"].T @ left)
            left = unit(p["U"] @ right)
            h = jnp.tanh(x @ p["W"] + h @ (p["U"] / (left @ p["U"] @ right)) + p["b"])
            return (h, left), h

        return step

    init = draw.normal(B, H), draw.normal(H)
    return loop(body, draw.gates(1, D, H), init, draw.normal(T, B, D))


def low_rank(draw: Draw, size: Size) -> Loop:
    """A GRU whose weights have corrections of rank four (Hu et al. 2021)."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            W = p["W"] + p["W_down"] @ p["W_up"]
            U = p["U"] + p["U_down"] @ p["U_up"]
            h = gru_cell({"W": W, "U": U, "b": p["b"]}, x, h)
            return h, h

        return step

    params = draw.gates(3, D, H)
    for name, rows in (("W", D), ("U", H)):
        params |= {f"{name}_down": draw.weight(rows, 4), f"{name}_up": draw.weight(4, 3 * H)}
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))
