"""Shifted states, made at the end of a step and not at the start of the next one.

    h = f(h, shift(h))      runs as      h = f(h, shifted); shifted = shift(h)

What is padded or put together from parts XLA makes on a CPU within the kernel that reads it, number
by number with a branch for each, and all else in that kernel is no faster then. Where that holds
exponentials or the like, it is worth an array more in the loop: the forward variable of CTC, which
meets itself shifted by one and by two labels, took half the time so, a stencil with a tangent
hyperbolic 0.64 to 1.08 times as long. A stencil without one took 0.96 to 1.28 times as long.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxrnn._device import is_lone_cpu
from jaxrnn._equations import is_heavy, is_transcendental
from jaxrnn._jaxpr import Equation, Program, Var, inline, inner_equations, variables
from jaxrnn._primitives import broadcast_in_dim_p, concatenate_p, pad_p, slice_p
from jaxrnn._schedule import coming_into, equations_for
from jaxrnn._threefry import bind_spelled_out

# What puts numbers elsewhere and changes none.
_ARRANGING = frozenset({broadcast_in_dim_p, concatenate_p, pad_p, slice_p})

Array = jax.Array
Step = Callable[[Sequence[Array], Sequence[Any]], tuple[list[Array], list[Array]]]


def carried(
    program: Program, consts: Sequence[Array], carry: Sequence[Array]
) -> tuple[list[Array], Step]:
    """What a loop over `program` carries, and its step, `(carried, xs) -> (carried, ys)`.

    Args:
        program: `(consts, carry, xs) -> (carry, ys)`, flat.
        consts: the same at every step.
        carry: the first carry, which is what comes first in what is carried.
    """
    end = len(carry)
    shift = _shift(program, len(consts), end)
    before, shifted = shift.invars, variables(shift.outvars)
    rest = program.cut(
        (*before, *shifted, *program.invars[len(before) :]),
        program.outvars,
        (e for e in program.equations if not set(shifted).intersection(e.outvars)),
    )

    def with_shifted(carry: Sequence[Array]) -> list[Array]:
        return [*carry, *shift.run(*consts, *carry)] if shifted else list(carry)

    def step(state: Sequence[Array], x: Sequence[Any]) -> tuple[list[Array], list[Array]]:
        outs = inline(rest, *consts, *state, *x, apply=bind_spelled_out)
        return with_shifted(outs[:end]), outs[end:]

    return with_shifted(carry), step


def _shift(program: Program, consts: int, carry: int) -> Program:
    """What is to be made a step early, `(consts, carry) -> (shifted, ...)`."""
    before = program.invars[: consts + carry]
    known, of_state = set(before), set(before[consts:])
    costly = coming_into(program, _is_costly, lambda equation: not is_heavy(equation))
    shifted: list[Var] = []
    for equation in program.equations if is_lone_cpu() else ():
        operands = variables(equation.invars)
        if equation.primitive in _ARRANGING and known.issuperset(operands):
            (made,) = equation.outvars
            known.add(made)
            if of_state.intersection(operands):
                of_state.add(made)
                if equation.primitive in (pad_p, concatenate_p) and made in costly:
                    shifted.append(made)
    return program.cut(before, shifted, equations_for(program, shifted, before))


def _is_costly(equation: Equation) -> bool:
    return is_transcendental(equation) or any(map(_is_costly, inner_equations(equation)))
