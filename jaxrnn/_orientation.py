"""Products the way round that the rest of the engine expects: rows of data on the left of a matrix.

Under `vmap`, `W @ x` is a product whose result lies `[units, samples]`, the other way round from
everything else; the gates of `einsum("bi,igh->bgh", x, W)` are no matrix product at all. Both are
made `rows @ matrix` here. A result that the body wants the other way round is transposed as late as
possible: elementwise work, sums, slices and splits are done before, and mostly another transpose
then undoes the first.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxrnn._equations import product_options
from jaxrnn._jaxpr import Equation, Literal, Program, Var, at, bind, dependents, read, shape
from jaxrnn._primitives import (
    ELEMENTWISE,
    dot_general_p,
    slice_p,
    split_p,
    squeeze_p,
    transpose_p,
)
from jaxrnn._sharding import is_split

Array = jax.Array


class _Turned(NamedTuple):
    """A value that is not transposed yet: `transpose(array, axes)`."""

    array: Array
    axes: tuple[int, ...]

    @property
    def value(self) -> Array:
        return lax.transpose(self.array, self.axes)


class Orientation:
    """One body, and which of its products are the wrong way round.

    Args:
        program: `(consts, carry, x) -> (carry, y)`.
        consts: number of consts.
    """

    def __init__(self, program: Program, consts: int):
        self.program = program
        varying = dependents(program, program.invars[consts:])
        made = [v for e in program.equations for v in e.outvars]
        self.fixed = {*program.invars, *made} - varying
        self.wrong = {
            id(e): weights for e in program.equations if (weights := self._wrong(e)) is not None
        }

    def run(self, *args: Array) -> list[Array]:
        """The body, with all its products the right way round."""
        env: dict[Var, Any] = dict(zip(self.program.invars, args, strict=True))
        for equation in self.program.equations:
            operands = [read(env, atom) for atom in equation.invars]
            results = None
            with at(equation):
                if id(equation) in self.wrong:
                    lhs, rhs = map(_plain, operands)
                    results = [_product(equation, lhs, rhs, self.wrong[id(equation)])]
                elif any(isinstance(x, _Turned) for x in operands):
                    results = self._turned(equation, operands)
            if results is None:
                results = bind(equation, [_plain(x) for x in operands])
            env.update(zip(equation.outvars, results, strict=True))
        return [_plain(read(env, atom)) for atom in self.program.outvars]

    def _wrong(self, equation: Equation) -> int | None:
        """Which operand of a product is its weights, if it is not `rows @ matrix` but could be."""
        if equation.primitive is not dot_general_p:
            return None
        fixed = [not isinstance(a, Literal) and a in self.fixed for a in equation.invars]
        if fixed[0] == fixed[1] or is_split(equation):
            return None
        weights = fixed.index(True)
        rows, matrix = (len(shape(equation.invars[i])) for i in (1 - weights, weights))
        contracted, batch = equation.params["dimension_numbers"]
        if any(batch) or tuple(contracted[1 - weights]) != (rows - 1,) or matrix < 2:
            return None
        is_right = (weights, matrix, tuple(contracted[weights])) == (1, 2, (0,))
        return None if is_right else weights

    def _turned(self, equation: Equation, operands: Sequence[Any]) -> list[Any] | None:
        """The results of an equation on operands not transposed yet; None if they have to be."""
        primitive, params = equation.primitive, equation.params
        axes = next(x.axes for x in operands if isinstance(x, _Turned))
        if primitive is transpose_p:
            return [_as_turned(operands[0].array, [axes[i] for i in params["permutation"]])]
        if primitive is split_p:
            outs = lax.split(operands[0].array, params["sizes"], axes[params["axis"]])
            return [_Turned(out, axes) for out in outs]
        if primitive is slice_p:
            names = ("start_indices", "limit_indices", "strides")
            starts, limits, strides = (_inner(params[name], axes) for name in names)
            return [_Turned(lax.slice(operands[0].array, starts, limits, strides), axes)]
        if primitive is squeeze_p:
            gone = [axes[i] for i in params["dimensions"]]
            left = [a for a in axes if a not in gone]
            order = sorted(left)
            squeezed = lax.squeeze(operands[0].array, gone)
            return [_as_turned(squeezed, [order.index(a) for a in left])]
        if primitive in ELEMENTWISE:
            alike = [
                self._lying(a, x, axes) for a, x in zip(equation.invars, operands, strict=True)
            ]
            if all(x is not None for x in alike):
                return [_Turned(out, axes) for out in bind(equation, alike)]
        return None

    def _lying(self, atom: Any, operand: Any, axes: tuple[int, ...]) -> Any:
        """An operand as it lies before `axes` are transposed, if it does or is easily made to."""
        if isinstance(operand, _Turned):
            return operand.array if operand.axes == axes else None
        if not shape(atom):
            return operand
        if isinstance(atom, Literal) or atom in self.fixed:
            return lax.transpose(operand, [axes.index(i) for i in range(len(axes))])
        return None


def _product(equation: Equation, lhs: Array, rhs: Array, weights: int) -> Any:
    """A product of rows and weights as `rows @ matrix`, the matrix as it is read: row by row."""
    rows, matrix = (rhs, lhs) if weights == 0 else (lhs, rhs)
    contracted, _ = equation.params["dimension_numbers"]
    (axis,) = contracted[weights]
    others = [i for i in range(matrix.ndim) if i != axis]
    free = [matrix.shape[i] for i in others]
    matrix = lax.transpose(matrix, [axis, *others]) if axis else matrix
    matrix = lax.reshape(matrix, (len(matrix), math.prod(free))) if free[1:] else matrix
    options = product_options(equation, swapped=weights == 0)
    out = lax.dot_general(rows, matrix, (((rows.ndim - 1,), (0,)), ((), ())), **options)
    out = lax.reshape(out, (*rows.shape[:-1], *free)) if free[1:] else out
    if weights == 1:
        return out
    outer = rows.ndim - 1
    return _as_turned(out, [*range(outer, out.ndim), *range(outer)])


def _as_turned(array: Array, axes: Sequence[int]) -> Any:
    in_place = list(axes) == list(range(len(axes)))
    return array if in_place else _Turned(array, tuple(axes))


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Turned) else value


def _inner(numbers: Sequence[int] | None, axes: Sequence[int]) -> Any:
    """A number for each axis after a transpose, for the axes before it."""
    return numbers and [numbers[axes.index(i)] for i in range(len(axes))]
