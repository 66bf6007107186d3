"""A step under `jax.checkpoint`, seen through.

Under a checkpoint nothing of a step can be moved. Of a step whose products are all under one, its
author wants nothing kept but the states. From these the rest is made again by passes, all steps of
a block at once: no step has to be run again.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jaxrnn._jaxpr import (
    Equation,
    Traced,
    bind,
    hides_product,
    inline,
    inner_equations,
    program_of,
    trace,
)
from jaxrnn._primitives import HEAVY, remat_p

_KEEPS_NOTHING = (None, jax.checkpoint_policies.nothing_saveable)


def through_checkpoints(traced: Traced, example: Sequence[Any]) -> Traced | None:
    """A step without its checkpoints, or None if it has none, other products beside them or hidden.

    Args:
        traced: `program(*consts, *args)`.
        example: args to trace it at.

    Returns:
        The same step, its consts first as before.
    """
    equations = traced.program.equations
    if not _has_one(equations) or any(map(_is_beside, equations)):
        return None
    step = trace(
        lambda *args: inline(traced.program, *args, apply=_apply), *traced.consts, *example
    )
    if any(map(hides_product, step.program.equations)):
        return None
    consts = (*step.consts, *traced.consts)
    return step._replace(consts=consts, out_tree=traced.out_tree)


def _has_one(equations: Iterable[Equation]) -> bool:
    return any(_keeps_nothing(e) or _has_one(inner_equations(e)) for e in equations)


def _is_beside(equation: Equation) -> bool:
    """Whether `equation` is or holds a product, or the like, that is under no checkpoint."""
    if _keeps_nothing(equation):
        return False
    return equation.primitive in HEAVY or any(map(_is_beside, inner_equations(equation)))


def _apply(equation: Equation, values: Sequence[Any]) -> list[Any]:
    if _keeps_nothing(equation):
        return inline(program_of(equation.params["jaxpr"]), *values, apply=_apply)
    return bind(equation, values)


def _keeps_nothing(equation: Equation) -> bool:
    """Whether `equation` is a checkpoint, and without a policy that has anything kept."""
    return equation.primitive is remat_p and equation.params["policy"] in _KEEPS_NOTHING
