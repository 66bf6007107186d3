"""One body with all that an engine can meet, to be put through every transformation."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxrnn

BATCH, TIME, FEATURES, UNITS = 2, 5, 3, 4
# Two blocks of two steps and one of a single step; small as it is, the body is taken apart.
ENGINE = functools.partial(jaxrnn.scan, method="sequential", chunk=2)


def draw(*shape, seed=0):
    return jnp.asarray(0.5 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(batch=BATCH, time=TIME, seed=0):
    """Consts, init and xs of the body below."""
    p = {
        "w": draw(FEATURES, 2 * UNITS, seed=seed),
        "u": draw(UNITS, 2 * UNITS, seed=seed + 1),
        "b": draw(2 * UNITS, seed=seed + 2),
        "v": draw(UNITS, FEATURES, seed=seed + 3),
    }
    init = {"h": draw(batch, UNITS, seed=seed + 4), "n": jnp.arange(batch)}
    return p, init, draw(time, batch, FEATURES, seed=seed + 5)


def gated(p):
    """Two gates, an elementwise parameter in the recurrence, an integer state, and a readout."""

    def body(carry, x):
        h, n = carry["h"], carry["n"]
        f, g = jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 2, axis=-1)
        h = jax.nn.sigmoid(f + p["b"][:UNITS] * h) * h + jnp.tanh(g) * (1 + n[:, None] % 2)
        return {"h": h, "n": n + 1}, {"y": h @ p["v"], "h": h, "n": n}

    return body


def run(scan, p, init, xs):
    return scan(gated(p), init, xs)


def scalar_of(tree):
    """As that of the helpers, but of sines, so that second derivatives do not vanish."""
    return helpers.scalar_of(
        jax.tree.map(lambda leaf: jnp.sin(leaf) if helpers.is_float(leaf) else leaf, tree)
    )


def loss(scan, p, h, xs):
    """A scalar function of float arguments alone."""
    return scalar_of(run(scan, p, {"h": h, "n": jnp.arange(h.shape[0])}, xs))


def floats():
    p, init, xs = operands()
    return p, init["h"], xs


def directions(arguments, seed=9):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), arguments)


def assert_agree(function, *arguments, scale=10.0):
    """`function(scan, *arguments)` is the same for the engine and `lax.scan`."""
    ours = jax.jit(functools.partial(function, ENGINE))(*arguments)
    theirs = jax.jit(functools.partial(function, lax.scan))(*arguments)
    helpers.assert_same(ours, theirs, scale=scale)
