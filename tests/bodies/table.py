"""What a body is, how its operands are drawn, and what many of them have in common."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BATCH, TIME = 3, 7
FEATURES, UNITS, OUTPUTS = 2, 4, 5


class Operands(NamedTuple):
    """What a body is scanned with."""

    consts: Any
    init: Any
    xs: Any


@dataclasses.dataclass(frozen=True)
class Body:
    """A scan body with builders for its operands.

    Attributes:
        name: the name of its maker.
        make: ``consts -> f``.
        consts, init: ``Draw -> pytree`` of arrays.
        xs: the same, time-major, or None for a scan over nothing.
        compute_dtype: the narrowest dtype that values go through.
        second_order: whether `lax.scan` differentiates it twice.
        forward: whether `lax.scan` knows its jvp (a `custom_vjp` has none).
        reverse_mode: whether `lax.scan` can differentiate it backwards (a `while` can't).
    """

    name: str
    make: Callable[[Any], Callable]
    consts: Callable[["Draw"], Any]
    init: Callable[["Draw"], Any]
    xs: Callable[["Draw"], Any] | None
    compute_dtype: str
    forward: bool
    reverse_mode: bool

    def operands(self, time: int = TIME, seed: int = 0) -> Operands:
        """The operands of one problem; equal seeds give equal values."""
        draw = Draw(time, seed)
        return Operands(self.consts(draw), self.init(draw), self.xs and self.xs(draw))

    def run(self, scan: Callable, operands: Operands, time: int = TIME, **flags: Any):
        """Calls `scan` with this body."""
        consts, init, xs = operands
        return scan(self.make(consts), init, xs, time if xs is None else None, **flags)


class Draw:
    """Draws operands as JAX arrays."""

    def __init__(self, time: int, seed: int):
        self.time, self.seed = time, seed
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
        """Normal values, small enough to keep tanh away from saturation."""
        return jnp.asarray(0.5 * self._rng.standard_normal(shape), dtype)

    def integers(self, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(high, size=shape), jnp.int32)

    def rows(self, *shape: int, **kwargs: Any) -> jax.Array:
        return self(self.time, *shape, **kwargs)


BODIES: dict[str, Body] = {}


def body(
    *, init, consts=lambda _: {}, xs=lambda d: d.rows(BATCH, FEATURES),
    compute_dtype="float32", forward=True, reverse_mode=True,
):  # fmt: skip
    """Enters the decorated maker of a body into `BODIES` under its own name."""

    def enter(make):
        name = make.__name__
        BODIES[name] = Body(name, make, consts, init, xs, compute_dtype, forward, reverse_mode)
        return make

    return enter


def layer(gates: int = 1, features: int = FEATURES, **kwargs: Any):
    return lambda d: {
        "w": d(features, gates * UNITS, **kwargs),
        "u": d(UNITS, gates * UNITS, **kwargs),
        "b": d(gates * UNITS, **kwargs),
    }


def state(*shape: int, **kwargs: Any):
    return lambda d: d(*(shape or (BATCH, UNITS)), **kwargs)


def two_states(d: Draw):
    return d(BATCH, UNITS), d(BATCH, UNITS)


def gates(z, c):
    i, f, g, o = z
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def elman(p, x, h):
    return jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
