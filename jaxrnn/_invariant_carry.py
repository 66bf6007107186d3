"""Carries that each step hands on as they are, such as weights, become constants of the step.

So they are not kept step by step for a gradient, and what meets them may leave the loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn._jaxpr import Atom, Traced, Var, weak_as

Array = jax.Array
PyTree = Any
Body = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


def old_and_new(traced: Traced, carry: int) -> list[tuple[Var, Atom]]:
    """The carry as a body gets it and as it gives it."""
    olds = traced.program.invars[len(traced.consts) :][:carry]
    return list(zip(olds, traced.program.outvars, strict=False))


class Varying(NamedTuple):
    """A body and its first carry without what is not changed; `whole` puts that into the last."""

    f: Body
    init: list[Any]
    whole: Callable[[Sequence[Array]], PyTree]


def without_unchanged(
    f: Body, init: PyTree, traced: Traced, first: Sequence[Array]
) -> Varying | None:
    """A body, traced with `first` for `init`, without such carries; None if there are none."""
    pairs = old_and_new(traced, len(first))
    stays = [old is new for old, new in pairs]
    if not any(stays):
        return None
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, init))

    def changing(values: Sequence[Any]) -> list[Any]:
        return [value for value, same in zip(values, stays, strict=True) if not same]

    def filled(changed: Sequence[Any], held: Sequence[Any]) -> PyTree:
        rest = iter(changed)
        both = zip(held, stays, strict=True)
        return jax.tree.unflatten(tree, [value if same else next(rest) for value, same in both])

    def varying(changed: list[Any], x: PyTree) -> tuple[list[Any], PyTree]:
        carry, y = f(filled(changed, leaves), x)
        return changing(jax.tree.leaves(carry)), y

    last = [weak_as(value, new) for value, (_, new) in zip(first, pairs, strict=True)]
    return Varying(varying, changing(leaves), lambda changed: filled(changed, last))
