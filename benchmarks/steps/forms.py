"""What a step of `never_slower` is made of: a size, random numbers, and a loop in two versions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxrnn

Scan = Callable[..., tuple[Any, Any]]


class Size(NamedTuple):
    """Samples, timesteps, input features, units."""

    B: int
    T: int
    D: int
    H: int

    def __str__(self) -> str:
        return ",".join(map(str, self))


class Loop(NamedTuple):
    """A step with its numbers.

    Attributes:
        arguments: (params, init, xs); gradients go to every floating leaf.
        plain: (*arguments) -> (final carry, ys), with `lax.scan`.
        ours: the same with jaxrnn.
    """

    arguments: tuple[Any, Any, Any]
    plain: Callable[[Any, Any, Any], Any]
    ours: Callable[[Any, Any, Any], Any]


class Draw:
    """Random arrays, float32, the same ones in every run."""

    def __init__(self, seed: int = 0):
        """Starts from a seed."""
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Independent normal numbers."""
        return jnp.asarray(scale * self._rng.standard_normal(shape), jnp.float32)

    def weight(self, rows: int, *columns: int) -> Array:
        """A matrix that keeps the size of what it multiplies."""
        return self.normal(rows, *columns, scale=rows**-0.5)

    def integers(self, high: int, *shape: int) -> Array:
        """Integers from 0 below `high`."""
        return jnp.asarray(self._rng.integers(0, high, shape), jnp.int32)

    def gates(self, count: int, features: int, units: int) -> dict[str, Array]:
        """The parameters of a cell with so many gates."""
        return {
            "W": self.weight(features, count * units),
            "U": self.weight(units, count * units),
            "b": self.normal(count * units, scale=0.1),
        }


def loop(body: Callable[[Any], Callable], params: Any, init: Any, xs: Any) -> Loop:
    """The loop over `body(params)`, a function `(carry, x) -> (carry, y)`, in both versions."""

    def run(scan: Scan) -> Callable[[Any, Any, Any], Any]:
        return lambda params, init, xs: scan(body(params), init, xs)

    return Loop((params, init, xs), run(lax.scan), run(jaxrnn.scan))


def gradient_of(
    run: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Callable[..., list[Array]], tuple[list[Array], list[Array], list[Array]]]:
    """The gradient of a fixed random functional of all results, by all floating arguments.

    Args:
        run: the function whose results, final carry and outputs, enter the loss.
        arguments: its arguments.

    Returns:
        A function and the arguments to call it with: the floating leaves of `arguments`, the other
        leaves, and the weights of the loss.
    """
    leaves, tree = jax.tree.flatten(arguments)
    is_floating = [_floating(leaf) for leaf in leaves]
    floating = [leaf for leaf, yes in zip(leaves, is_floating, strict=True) if yes]
    others = [leaf for leaf, yes in zip(leaves, is_floating, strict=True) if not yes]
    results = jax.tree.leaves(jax.eval_shape(run, *arguments))
    draw = Draw(seed=1)
    weights = [draw.normal(*result.shape) for result in results if _floating(result)]

    def loss(floating: list[Array], others: list[Array], weights: list[Array]) -> Array:
        sources = {True: iter(floating), False: iter(others)}
        merged = jax.tree.unflatten(tree, [next(sources[yes]) for yes in is_floating])
        results = filter(_floating, jax.tree.leaves(run(*merged)))
        return sum(
            jnp.mean((result.real + result.imag if jnp.iscomplexobj(result) else result) * weight)
            for result, weight in zip(results, weights, strict=True)
        )

    return jax.grad(loss), (floating, others, weights)


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
