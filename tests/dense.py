"""Steps `(p, h, x) -> (h, y)` of a state and some matrices: operands, loop and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from structure import sum_of_sines

BATCH, TIME, FEATURES, UNITS = 3, 8, 5, 32
# In two blocks, however little there is to do.
SPLIT = {"method": "sequential", "chunk": 4}


def operands():
    """Parameters, the first state, and inputs of all steps."""
    rng = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    shapes = dict.fromkeys("uva", (UNITS, UNITS)) | {"w": (FEATURES, UNITS), "b": (UNITS,)}
    p = {name: draw(*shape, scale=0.1) for name, shape in shapes.items()}
    return p, draw(BATCH, UNITS), draw(TIME, BATCH, FEATURES)


def run(scan, step, **flags):
    """The loop, a function of the operands."""
    return lambda p, h, xs: scan(lambda h, x: step(p, h, x), h, xs, **flags)


def gradient(function):
    """By all operands, of a scalar that all results are in."""
    return jax.grad(lambda *a: sum_of_sines(function(*a)), (0, 1, 2))
