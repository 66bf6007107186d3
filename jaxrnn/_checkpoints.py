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
    Program,
    Traced,
    bind,
    hides_product,
    inline,
    inner_equations,
    is_heavy,
    trace,
)
from jaxrnn._primitives import remat_p

_KEEPS_NOTHING = (None, jax.checkpoint_policies.nothing_saveable)


def through_checkpoints(traced: Traced, example: Sequence[Any]) -> Traced | None:
    """A step without its checkpoints, or None if it has none, other products beside them or hidden.

    Args:
        traced: `program(*consts, *args)`.
        example: args to trace it at.

    Returns:
        The same step, its consts first as before.
    """
    if not _has_one(traced.program.equations):
        return None
    under: list[Equation] = []
    beside: list[Equation] = []

    def apply(equation: Equation, values: Sequence[Any]) -> list[Any]:
        if not _keeps_nothing(equation):
            beside.extend([equation] if is_heavy(equation) else [])
            return bind(equation, values)
        under.append(equation)
        return inline(_inside(equation), *values, apply=_apply)

    step = trace(lambda *args: inline(traced.program, *args, apply=apply), *traced.consts, *example)
    if not under or beside or any(map(hides_product, step.program.equations)):
        return None
    consts = (*step.consts, *traced.consts)
    return step._replace(consts=consts, out_tree=traced.out_tree)


def _has_one(equations: Iterable[Equation]) -> bool:
    return any(_keeps_nothing(e) or _has_one(inner_equations(e)) for e in equations)


def _apply(equation: Equation, values: Sequence[Any]) -> list[Any]:
    if _keeps_nothing(equation):
        return inline(_inside(equation), *values, apply=_apply)
    return bind(equation, values)


def _keeps_nothing(equation: Equation) -> bool:
    """Whether `equation` is a checkpoint, and without a policy that has anything kept."""
    return equation.primitive is remat_p and equation.params["policy"] in _KEEPS_NOTHING


def _inside(equation: Equation) -> Program:
    """The function under a checkpoint."""
    jaxpr = equation.params["jaxpr"]
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    return Program(inputs, tuple(jaxpr.outvars), tuple(jaxpr.eqns), jaxpr)
