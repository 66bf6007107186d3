"""Short loops in a step, written out.

What a loop holds could not be moved: the substeps of a solver, a few passes over a state. Written
out, the products of all its rounds stand in the step like others, and the gradient of a weight is a
product over all rounds and timesteps. One long step also compiles no slower than a loop in a loop.
"""

from collections.abc import Sequence
from typing import Any

from jax import lax

from jaxrnn._checkpoints import is_checkpoint, under_checkpoint
from jaxrnn._equations import multiply_adds, with_inner
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Traced,
    at,
    bind,
    inline,
    inner_equations,
    parts,
    program_of,
    retraced,
    shape,
)
from jaxrnn._primitives import INLINED, dot_general_p, scan_p

# What takes more stays a loop: gradients would take more than twice as long to compile.
_MOST_PRODUCTS = 16
_MOST_EQUATIONS = 256


def without_inner_loops(traced: Traced, example: Sequence[Any]) -> Traced:
    """A step whose short loops that hold matmuls are written out.

    Measured on a CPU, a loop of four rounds over a state (Graves 2016, adaptive computation time):
    gradients were 1.7 to 2.8 times as fast as those of `lax.scan`, and 0.87 to 1.16 times with the
    loop left as it was.

    Args:
        traced: `program(*consts, *args)`.
        example: args to trace it at.

    Returns:
        The same step, its consts first as before; itself if it has no such loop.
    """
    if not any(map(_holds_short, traced.program.equations)):
        return traced
    return retraced(traced, example, _written_out)


def _holds_short(equation: Equation) -> bool:
    """Whether `equation` is a loop to be written out, or a `jit` or checkpoint around one."""
    if equation.primitive in INLINED or is_checkpoint(equation):
        return any(map(_holds_short, inner_equations(equation)))
    return _is_short(equation)


def _is_short(equation: Equation) -> bool:
    """Whether `equation` is a loop to be written out, where it is not itself in one."""
    if equation.primitive is not scan_p or equation.effects:
        return False
    rounds, inner = equation.params["length"], list(with_inner(inner_equations(equation)))
    products = sum(map(_is_matmul, inner))
    return 0 < rounds * products <= _MOST_PRODUCTS and rounds * len(inner) <= _MOST_EQUATIONS


def _is_matmul(equation: Equation) -> bool:
    """Whether rows meet one matrix: with a matrix for each sample no pass would gain."""
    if equation.primitive is not dot_general_p:
        return multiply_adds(equation) > 0
    _, (batch, _) = equation.params["dimension_numbers"]
    return not batch


def _written_out(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """The results of `equation`, if it is a short loop by one round after the other."""
    if is_checkpoint(equation) and _holds_short(equation):
        return under_checkpoint(equation, values, _written_out)
    if not _is_short(equation):
        return bind(equation, values)
    closed, rounds = equation.params["jaxpr"], range(equation.params["length"])
    step = program_of(closed.jaxpr)
    # Which operands are consts, carry and xs each version of JAX says in a way of its own.
    xs = _rows_among(equation.invars, step.invars[len(closed.consts) :])
    carry = len(step.outvars) - _rows_among(equation.outvars, step.outvars)
    fixed, state, rows = parts(values, len(values) - xs - carry, carry)
    ys = dict[int, list[Any]]()
    with at(equation):
        for i in reversed(rounds) if equation.params["reverse"] else rounds:
            x = [lax.index_in_dim(array, i, keepdims=False) for array in rows]
            state, ys[i] = parts(inline(step, *closed.consts, *fixed, *state, *x), carry)
        stacked = zip(*(ys[i] for i in rounds), strict=True)
        return [*state, *(lax.concatenate([y[None] for y in of_all], 0) for of_all in stacked)]


def _rows_among(outside: Sequence[Atom], inside: Sequence[Atom]) -> int:
    """How many of a loop's operands or results have a row for each round."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(shape(array)) > len(shape(row)) for array, row in pairs)
