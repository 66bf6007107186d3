"""What a step asks for twice is computed once.

XLA sees to that by itself within a program. Of a step that is taken apart it sees pieces: what is
read in several of them would be rows written, kept and read several times over, and products that
are merged with different others are no longer alike.
"""

from collections.abc import Hashable

from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Literal,
    Program,
    Var,
    dtype,
    inner_functions,
    is_weak,
    variables,
)
from jaxrnn._primitives import rng_uniform_p


def without_repeats(program: Program) -> Program:
    """`program` with one equation for all that give the same.

    Those that call functions stay: a backward rule is for one cotangent, not for a sum of them.
    """
    used = set(variables([*program.outvars, *(a for e in program.equations for a in e.invars)]))
    same = dict[Var, Var]()
    made = dict[Hashable, Equation]()

    def now(atom: Atom) -> Atom:
        return atom if isinstance(atom, Literal) else same.get(atom, atom)

    for equation in program.equations:
        operands = list(map(now, equation.invars))
        key = _key(equation, operands) or id(equation)
        first = made.get(key, equation.replace(invars=operands))
        outs = list(first.outvars)
        for i, (old, new) in enumerate(zip(first.outvars, equation.outvars, strict=True)):
            if old in used:
                same[new] = old
            else:  # what nobody read before gets the name by which it is read now
                outs[i] = new
        made[key] = first.replace(outvars=outs)
    return program.cut(program.invars, map(now, program.outvars), made.values())


def _key(equation: Equation, operands: list[Atom]) -> Hashable:
    """What equations have in common that give the same; None for one that may not."""
    if equation.primitive is rng_uniform_p or equation.effects or inner_functions(equation):
        return None
    params = tuple(sorted(equation.params.items()))
    key = (equation.primitive, equation.ctx, params, *map(_operand, operands))
    try:
        hash(key)
    except TypeError:  # parameters of somebody else's primitive
        return None
    return key


def _operand(atom: Atom) -> Hashable:
    if isinstance(atom, Var):
        return atom
    return dtype(atom), is_weak(atom), repr(getattr(atom.val, "item", lambda: atom.val)())
