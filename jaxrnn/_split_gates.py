"""A step rewritten so that nothing in it is cut in pieces.

The compiler of kernels cannot cut an array. So a product that is split into gates becomes a product
per gate, with a part of the weights each, and what is split after elementwise work is split before
it.
"""

from typing import Any

import jax
from jax import lax

from jaxrnn._equations import column_ranges
from jaxrnn._jaxpr import Atom, Equation, Literal, Program, Var, bind, read, shape, variables
from jaxrnn._primitives import (
    IN_KERNELS,
    broadcast_in_dim_p,
    concatenate_p,
    copy_p,
    dot_general_p,
)

Array = jax.Array


# A cut is moved up by recursion, through so many operations at most.
_DEEPEST = 100


class KernelMisfitError(ValueError):
    """Why a recurrence fits no kernel."""


def in_columns(program: Program, *args: Array) -> list[Array]:
    """Runs `program` with every cut along the last axis moved up to products and inputs.

    Raises:
        KernelMisfitError: where it can't be moved.
    """
    if _depth(program) > _DEEPEST:
        raise KernelMisfitError(f"more than {_DEEPEST} operations of it wait for one another")
    env: dict[Atom, Any] = dict(zip(program.invars, args, strict=True))
    made = {v: e for e in program.equations for v in e.outvars}
    known: dict[tuple[Var, int, int], Array] = {}

    def columns(v: Var, start: int, stop: int) -> Array:
        if (v, start, stop) not in known:
            known[v, start, stop] = _columns(v, start, stop)
        return known[v, start, stop]

    def _columns(v: Var, start: int, stop: int) -> Array:  # noqa: PLR0911  a case per operation
        equation, width = made.get(v), shape(v)[-1]
        if (start, stop) == (0, width):
            return env[v]
        if equation is None:
            return lax.slice_in_dim(env[v], start, stop, axis=-1)
        if cuts := column_ranges(equation):
            (source,), (first, _) = variables(equation.invars), cuts[equation.outvars.index(v)]
            return columns(source, first + start, first + stop)
        if equation.primitive is dot_general_p:
            lhs, rhs = _product_operands(equation, env)
            return _product(equation, lhs, lax.slice_in_dim(rhs, start, stop, axis=1))

        def part(atom: Atom) -> Any:
            if isinstance(atom, Literal) or shape(atom)[-1:] != (width,):
                return read(env, atom)
            return columns(atom, start, stop)

        if equation.primitive in IN_KERNELS:
            return bind(equation, [part(a) for a in equation.invars])[0]
        if equation.primitive is broadcast_in_dim_p and len(equation.invars) == 1:
            [atom], axes = equation.invars, equation.params["broadcast_dimensions"]
            last = bool(axes) and axes[-1] == len(shape(v)) - 1
            size = (*shape(v)[:-1], stop - start)
            return lax.broadcast_in_dim(part(atom) if last else read(env, atom), size, axes)
        if (
            equation.primitive is concatenate_p
            and equation.params["dimension"] == len(shape(v)) - 1
        ):
            offset = 0
            for atom in equation.invars:
                end = offset + shape(atom)[-1]
                if offset <= start and stop <= end and isinstance(atom, Var):
                    return columns(atom, start - offset, stop - offset)
                offset = end
        raise KernelMisfitError(f"it cuts the result of '{equation.primitive}' in pieces")

    for equation in program.equations:
        if cuts := column_ranges(equation):
            (source,) = variables(equation.invars)
            results = [columns(source, *cut) for cut in cuts]
        elif equation.primitive is copy_p:
            results = [read(env, equation.invars[0])]
        elif equation.primitive is dot_general_p:
            results = [_product(equation, *_product_operands(equation, env))]
        else:
            results = bind(equation, [read(env, a) for a in equation.invars])
        env.update(zip(equation.outvars, results, strict=True))
    return [read(env, a) for a in program.outvars]


def _depth(program: Program) -> int:
    """The number of operations of which each waits for the one before."""
    depths: dict[Atom, int] = {}
    for equation in program.equations:
        depth = 1 + max((depths.get(v, 0) for v in variables(equation.invars)), default=0)
        depths |= dict.fromkeys(equation.outvars, depth)
    return max(depths.values(), default=0)


def _product_operands(equation: Equation, env: dict[Atom, Any]) -> tuple[Array, Array]:
    """The operands of a product of rows and a matrix, the matrix as `[in, out]`."""
    ((lhs_in, rhs_in), batch), (rows, matrix) = (
        equation.params["dimension_numbers"],
        (read(env, a) for a in equation.invars),
    )
    if batch != ((), ()) or tuple(lhs_in) != (1,) or rows.ndim != 2 or matrix.ndim != 2:
        raise KernelMisfitError(
            f"a product of arrays {list(rows.shape)} and {list(matrix.shape)} is none of samples "
            "with a matrix"
        )
    return rows, matrix if tuple(rhs_in) == (0,) else matrix.T


def _product(equation: Equation, rows: Array, matrix: Array) -> Array:
    params = {k: equation.params[k] for k in ("precision", "preferred_element_type")}
    return lax.dot_general(rows, matrix, (((1,), (0,)), ((), ())), **params)
