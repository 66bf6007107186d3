"""A pass: a part of a step, run for all steps of a block at once."""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._device import is_lone_cpu
from jaxrnn._equations import product_options
from jaxrnn._fission import Purpose
from jaxrnn._jaxpr import Atom, Equation, Literal, Program, Var, at, bind, read, shape
from jaxrnn._primitives import THREEFRY, dot_general_p
from jaxrnn._sharding import is_split
from jaxrnn._singleton_axes import bind_without_units
from jaxrnn._threefry import bind_spelled_out

Array = jax.Array

# Columns of a matrix from which its gradient is a fast product on a CPU, see `_matrix_product`.
WIDE = 128


def run_rows(
    program: Program,
    has_rows: Sequence[bool],
    length: int,
    purpose: Purpose,
    accumulated: frozenset[Var],
    *args: Any,
) -> list[Array]:
    """Runs `program` for many rows at once, like `jax.vmap`.

    Args:
        program: for one row.
        has_rows: which of `args` have a row for each run; the others are the same in all.
        length: the number of rows.
        purpose: what they are for.
        accumulated: the variables whose cotangents are sums over all rows.
        *args: the operands.

    Returns:
        The outputs, a row for each run.
    """
    env: dict[Atom, Any] = dict(zip(program.invars, args, strict=True))
    rows = {v for v, yes in zip(program.invars, has_rows, strict=True) if yes}

    def is_row(atom: Atom) -> bool:
        return not isinstance(atom, Literal) and atom in rows

    together = _columns_together(program, accumulated)
    for equation in program.equations:
        operands = [read(env, atom) for atom in equation.invars]
        axes = [0 if is_row(atom) else None for atom in equation.invars]
        if 0 not in axes:
            outs = bind(equation, operands)
        else:
            rows |= set(equation.outvars)
            columns = together.get(equation.outvars[0], 0)
            product = _matrix_product(equation, axes, columns, *operands)
            transposed = purpose == "tangent"
            run = functools.partial(bind_without_units, equation, transposed, axes, length)
            if equation.primitive in THREEFRY:
                run = functools.partial(bind_spelled_out, equation)
            outs = [product] if product is not None else jax.vmap(run, in_axes=(axes,))(operands)
        env |= zip(equation.outvars, outs, strict=True)
    return [
        env[v] if is_row(v) else jnp.broadcast_to(read(env, v), (length, *shape(v)))
        for v in program.outvars
    ]


def _matrix_product(
    equation: Equation, axes: Sequence[int | None], together: int, *operands: Any
) -> Any:
    """A product of rows `[L, ..., K]` as one of a matrix, or None where it is no such product.

    In the gradient of the matrix all rows are summed over. With several axes of rows XLA first
    transposes an operand, which can take as long as the product; with one axis it need not. On more
    than one device the axes may be split over them, and then cannot be merged; over a mesh with
    explicit axes JAX says that they are, be it in one piece.

    If the gradient of the matrix is a sum over rows, it is a product of the transpose of the rows
    and of what comes back. XLA on a CPU has a fast product for a transpose that lies ready: of 1024
    features and 4096 columns it made 148 GFLOP/s, and 70 otherwise; of 64 and 512 105 and 93; of
    512 and 512 87 and 98, for what there is to transpose is more beside the product. It is
    transposed once for all products of the same rows, which have so many columns `together`: with a
    product for each gate, gradients of GRU and LSTM were 1.00 to 1.07 times as fast so.
    """
    if equation.primitive is not dot_general_p or axes != [0, None]:
        return None
    if jax.device_count() > 1 or is_split(equation):
        return None
    lhs, rhs = operands
    (contracted, over), batch = equation.params["dimension_numbers"]
    free = lhs.ndim - len(contracted)
    if batch != ((), ()) or tuple(contracted) != tuple(range(free - 1, lhs.ndim - 1)):
        return None
    numbers = ((tuple(range(1, lhs.ndim - free + 1)), over), batch)
    params = equation.params | {"dimension_numbers": numbers}

    # So that `lhs` is kept for the gradient, which others may keep as well, and not its reshaping.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product(lhs: Array, rhs: Array) -> Array:
        merged = lhs.reshape(math.prod(lhs.shape[:free]), *lhs.shape[free:])
        with at(equation):
            if is_lone_cpu() and _is_wide(rhs, over, together):
                numbers = (((0,), over), ((), ()))
                across = lax.optimization_barrier(merged.T)
                out = lax.dot_general(
                    across, rhs, numbers, **product_options(equation, swapped=False)
                )
            else:
                out = equation.primitive.bind(merged, rhs, **params)
        return out.reshape(*lhs.shape[:free], *out.shape[1:])

    return product(lhs, rhs)


def _columns_together(program: Program, accumulated: frozenset[Var]) -> dict[Var, int]:
    """How many columns all products of the same rows have, for the result of each of them.

    Counted are products with a matrix whose gradient is a sum over all rows.
    """
    groups: dict[Var, list[Var]] = defaultdict(list)
    for equation in program.equations:
        if equation.primitive is dot_general_p:
            summed = [isinstance(a, Var) and a in accumulated for a in equation.invars]
            lhs, (out,) = equation.invars[0], equation.outvars
            if summed == [False, True] and isinstance(lhs, Var):
                groups[lhs].append(out)
    return {out: sum(sum(shape(v)[-1:]) for v in outs) for outs in groups.values() for out in outs}


def _is_wide(matrix: Array, over: Sequence[int], together: int) -> bool:
    """Whether a matrix has many columns, and with its likes more than rows, which are on `over`."""
    if matrix.ndim != 2 or len(over) != 1:
        return False
    (axis,) = over
    if not all(isinstance(n, int) for n in matrix.shape):
        return False
    return matrix.shape[1 - axis] >= WIDE and together > matrix.shape[axis]
