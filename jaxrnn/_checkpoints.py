"""Checkpoints in a step, `jax.checkpoint`, seen through.

Of what is under a checkpoint nothing could be moved. What its author wants is that nothing of it is
kept for the derivative. So its parts stand in the step like all others, with a mark, and what has
the mark is not kept: passes make it again, for all steps of a block at once.

The mark is a named scope, which JAX carries along whenever a program is rewritten.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxrnn._equations import hides_product, is_free
from jaxrnn._jaxpr import (
    Equation,
    Program,
    Traced,
    Var,
    at,
    bind,
    inline,
    inner_equations,
    program_of,
    retraced,
    scopes,
    variables,
)
from jaxrnn._primitives import INLINED, remat_p

_MARK = "jaxrnn.checkpoint"
_KEEPS_NOTHING = (None, jax.checkpoint_policies.nothing_saveable)
# They keep no less than `_residuals.py` does.
_KEEPS_PRODUCTS = (
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.everything_saveable,
)


def through_checkpoints(traced: Traced, example: Sequence[Any]) -> Traced | None:
    """A step without its checkpoints, or None if it has none that can be seen through.

    One that hides products, as in a loop, stays; and so does one with a policy of the user's own.
    All stay if a product is hidden anywhere else: then the step has no derivative of its own, by
    which something would not be kept.

    Args:
        traced: `program(*consts, *args)`.
        example: args to trace it at.

    Returns:
        The same step, its consts first as before.
    """
    if not any(map(_holds_open, traced.program.equations)):
        return None
    step = retraced(traced, example, _opened)
    if not_to_be_kept(step.program) and any(map(hides_product, step.program.equations)):
        return None
    return step


def not_to_be_kept(program: Program) -> set[Var]:
    """What a program without its checkpoints makes under one, but for the results of these."""
    marked: set[Var] = set()
    for equation in program.equations:
        operands = variables(equation.invars)
        arranged = is_free(equation) and operands and marked.issuperset(operands)
        if arranged or _MARK in scopes(equation):
            marked |= set(equation.outvars)
    return marked


def is_checkpoint(equation: Equation) -> bool:
    """Whether `equation` is a checkpoint, not yet differentiated."""
    return equation.primitive is remat_p and not equation.params["differentiated"]


def under_checkpoint(
    equation: Equation, values: Sequence[Any], apply: Callable[..., list[Any]]
) -> list[Any]:
    """The results of a checkpoint, under it as before, but run by `apply`."""
    inner = program_of(equation.params["jaxpr"])
    options = {name: equation.params[name] for name in ("prevent_cse", "policy")}
    with at(equation):
        return jax.checkpoint(functools.partial(inline, inner, apply=apply), **options)(*values)


def _holds_open(equation: Equation) -> bool:
    inside = inner_equations(equation) if equation.primitive in INLINED else []
    return _is_open(equation) or any(map(_holds_open, inside))


def _is_open(equation: Equation) -> bool:
    """Whether `equation` is a checkpoint to be seen through."""
    return _may_be_open(equation) and not any(map(_hides_product, inner_equations(equation)))


def _may_be_open(equation: Equation) -> bool:
    known = _KEEPS_NOTHING + _KEEPS_PRODUCTS
    return equation.primitive is remat_p and equation.params["policy"] in known


def _hides_product(equation: Equation) -> bool:
    """Whether `equation` holds a product that is not there once all is seen through.

    A checkpoint that stays closed is closed by such a product, too, and so need not be told apart.
    """
    if equation.primitive in INLINED or _may_be_open(equation):
        return any(map(_hides_product, inner_equations(equation)))
    return hides_product(equation)


def _opened(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """The results of `equation`, without itself if it is a checkpoint."""
    if not _is_open(equation):
        return bind(equation, values)
    inner = program_of(equation.params["jaxpr"])
    results = set(variables(inner.outvars))

    def marked(equation: Equation, values: Sequence[Any]) -> list[Any]:
        if not results.isdisjoint(equation.outvars):
            return _opened(equation, values)
        with jax.named_scope(_MARK):
            return _opened(equation, values)

    keeps = equation.params["policy"] in _KEEPS_PRODUCTS
    with at(equation):
        return inline(inner, *values, apply=_opened if keeps else marked)
