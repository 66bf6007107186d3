"""Whether the derivative of a step is finite at every state.

A masked step is computed and thrown away: its derivative, which may be anything finite, is
multiplied by zero. That is safe where no operation has a singular point, and where values grow no
faster than the states do: a state that fits its dtype may have a square that does not.
"""

from collections.abc import Sequence

from jaxrnn._jaxpr import Atom, Program, Var, program_of
from jaxrnn._primitives import BOUNDED, FINITE_SLOPE, INLINED, PRODUCTS, mul_p

_MULTIPLYING = PRODUCTS | {mul_p}


def has_finite_gradient(step: Program, states: int) -> bool:
    """Whether that is so for a step whose last inputs are its states, so many arrays."""
    inputs = len(step.invars) - states
    return _degrees(step, [0] * inputs + [1] * states) is not None


def _degrees(program: Program, of_inputs: Sequence[int]) -> list[int] | None:
    """With what power of the states, at most, each output grows; None if one may not be finite."""
    known: dict[Var, int] = dict(zip(program.invars, of_inputs, strict=True))

    def degree(atom: Atom) -> int:
        return known.get(atom, 0) if isinstance(atom, Var) else 0

    for equation in program.equations:
        primitive, operands = equation.primitive, [*map(degree, equation.invars)]
        if primitive in INLINED:
            function = program_of(equation.params[INLINED[primitive]].jaxpr)
            consts = len(function.invars) - len(operands)
            inner = _degrees(function, [0] * consts + operands)
            if inner is None:
                return None
            known |= zip(equation.outvars, inner, strict=True)
            continue
        if primitive not in FINITE_SLOPE:
            return None
        grows = sum(operands) if primitive in _MULTIPLYING else max(operands, default=0)
        if grows > 1:
            return None
        known |= dict.fromkeys(equation.outvars, 0 if primitive in BOUNDED else grows)
    return [degree(atom) for atom in program.outvars]
