"""What has to run at each step even if it is given the same at all of them.

`lax.rng_uniform` draws anew each time. And a backward rule (`jax.custom_vjp`) is called with the
cotangent of each step by `lax.scan`, but with the sum of them where the function has run once. That
is the same only for a rule that is linear, as that of a straight-through estimator is, and not for
one that clips. In a tangent the rule stands as `custom_lin`, of residuals and tangents.
"""

from collections.abc import Iterable

import jax

from jaxrnn._equations import is_linear, with_inner
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Literal,
    Program,
    Var,
    as_function_of,
    bind,
    dtype,
    inline,
    is_inexact,
    trace,
)
from jaxrnn._primitives import (
    PRODUCTS,
    convert_element_type_p,
    custom_lin_p,
    custom_vjp_call_p,
    div_p,
    mul_p,
    rng_uniform_p,
    select_n_p,
)

Array = jax.Array


def has_backward_rule(equation: Equation) -> bool:
    """Whether `equation` calls a `custom_vjp` function, or is the tangent of one."""
    return any(map(_is_rule, with_inner([equation])))


def must_run_every_step(equation: Equation) -> bool:
    """Whether `equation` has to run at each step."""
    return any(
        e.primitive is rng_uniform_p or (_is_rule(e) and not _has_linear_rule(e))
        for e in with_inner([equation])
    )


def _has_linear_rule(equation: Equation, deep: int = 2) -> bool:
    """Whether the backward rule in `equation` is linear, as far as can be told.

    Of rules that it calls itself, for second derivatives, those that lie so `deep` are asked, too;
    a function that is called by its own forward rule is met again and again.
    """
    outs, operands = equation.outvars, equation.invars
    is_tangent = equation.primitive is custom_lin_p
    start = equation.params["num_res"] if is_tangent else 0
    moving = [i for i, a in enumerate(operands) if i >= start and is_inexact(a)]
    # With symbolic zeros the rule may be another one where it is called.
    if equation.params["symbolic_zeros"] or not all(map(is_inexact, outs)):
        return False

    def pulled_back(*args: Array) -> list[Array]:
        cotangents, values = list(args[: len(outs)]), args[len(outs) :]
        call = as_function_of(moving, lambda *values: bind(equation, values), values)
        at = [values[i] for i in moving]
        transposed = jax.linear_transpose(call, *at) if is_tangent else jax.vjp(call, *at)[1]
        return list(transposed(cotangents))

    types = [v.aval for v in (*outs, *operands)]
    try:
        rule = trace(pulled_back, *types)
        inlined = trace(lambda *args: inline(rule.program, *rule.consts, *args), *types)
    except Exception:  # whatever a rule raises that is wrong, or not to be had here
        return False
    sources = inlined.program.invars[len(inlined.consts) :][: len(outs)]
    inside = list(with_inner(inlined.program.equations))
    return (
        not rule.has_effects
        and all(e.primitive is not rng_uniform_p for e in inside)
        and _is_linear_in(inlined.program, sources)
        and all(_has_linear_rule(e, deep - 1) for e in inside if deep and _is_rule(e))
    )


def _is_rule(equation: Equation) -> bool:
    return equation.primitive in (custom_vjp_call_p, custom_lin_p)


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
            keeps = keeps and not _narrows(equation)
        if keeps and all(map(is_inexact, equation.outvars)):
            linear.update(equation.outvars)
        elif moving:
            return False
    return all(map(may_be_added, program.outvars))


def _narrows(equation: Equation) -> bool:
    """Whether `equation` casts to fewer digits, by which small numbers may vanish that add up."""
    ends = *equation.invars, *equation.outvars
    if equation.primitive is not convert_element_type_p or not all(map(is_inexact, ends)):
        return False
    old, new = (dtype(v).itemsize for v in ends)
    return bool(new < old)
