"""What has to run at each step even if it is given the same at all of them.

Random bits are new ones each time. And a backward rule (`jax.custom_vjp`) is called with the
cotangent of each step by `lax.scan`, but with the sum of them where the function has run once. That
is the same only for a rule that is linear, as that of a straight-through estimator is, and not for
one that clips.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Literal,
    Program,
    Var,
    bind,
    dtype,
    inline,
    inner_equations,
    is_linear,
    trace,
    variables,
)
from jaxrnn._primitives import (
    PRODUCTS,
    custom_lin_p,
    custom_vjp_call_p,
    div_p,
    mul_p,
    rng_uniform_p,
    select_n_p,
)

Array = jax.Array


def has_backward_rule(equation: Equation) -> bool:
    """Whether `equation` calls a `custom_vjp` function."""
    inside = inner_equations(equation)
    return equation.primitive is custom_vjp_call_p or any(map(has_backward_rule, inside))


def is_anew(equation: Equation) -> bool:
    """Whether `equation` has to run at each step."""
    if equation.primitive is custom_vjp_call_p and not _has_linear_rule(equation):
        return True
    is_one = equation.primitive in (custom_lin_p, rng_uniform_p)
    return is_one or any(map(is_anew, inner_equations(equation)))


def _has_linear_rule(equation: Equation) -> bool:
    """Whether the backward rule of a `custom_vjp` function is linear, and has no effects."""
    outs, operands = equation.outvars, variables(equation.invars)
    moving = [v for v in operands if _is_inexact(v)]
    if not all(map(_is_inexact, outs)):
        return False

    def pulled_back(*args: Array) -> list[Array]:
        cotangents, values = list(args[: len(outs)]), args[len(outs) :]
        given = dict(zip(operands, values, strict=True))

        def call(*moved: Array) -> list[Array]:
            known = given | dict(zip(moving, moved, strict=True))
            return bind(
                equation, [a.val if isinstance(a, Literal) else known[a] for a in equation.invars]
            )

        return list(jax.vjp(call, *(given[v] for v in moving))[1](cotangents))

    types = [v.aval for v in (*outs, *operands)]
    try:
        rule = trace(pulled_back, *types)
        inlined = trace(lambda *args: inline(rule.program, *rule.consts, *args), *types)
    except Exception:  # a mistake in the rule, of which a derivative will tell
        return False
    start = len(inlined.consts)
    sources = inlined.program.invars[start : start + len(outs)]
    return not rule.has_effects and _is_linear_in(inlined.program, sources)


def _is_linear_in(program: Program, sources: Iterable[Var]) -> bool:
    """Whether all that `program` returns is linear in `sources`; so far as can be told."""
    linear = set(sources)  # and zeros

    def may_be_added(atom: Atom) -> bool:
        return bool(atom.val == 0) if isinstance(atom, Literal) else atom in linear

    for equation in program.equations:
        primitive, operands = equation.primitive, equation.invars
        moving = [a for a in operands if isinstance(a, Var) and a in linear]
        if primitive in PRODUCTS or primitive is mul_p:
            keeps = len(moving) == 1
        elif primitive is div_p:
            keeps = moving == operands[:1]
        elif primitive is select_n_p:
            keeps = operands[0] not in moving and all(map(may_be_added, operands[1:]))
        else:
            keeps = is_linear(equation) and all(map(may_be_added, operands))
        if keeps and all(map(_is_inexact, equation.outvars)):
            linear.update(equation.outvars)
        elif moving:
            return False
    return all(map(may_be_added, program.outvars))


def _is_inexact(v: Atom) -> bool:
    return bool(jnp.issubdtype(dtype(v), jnp.inexact))
