"""Values of the rewriting interpreter that are not computed yet: sums, products, and their parts.

What makes them worth the wait is `arranged`: a slice or a split of a sum is the sum of the slices,
of an elementwise result the result of the slices, of a product with a matrix a product with some of
its columns.
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxrnn._equations import column_ranges, cut_axis, take_ranges
from jaxrnn._jaxpr import Equation, at, bind, shape, size_in_bytes

Array = Any


class Value:
    """A value of the interpreter, `time` being when it can be known.

    `depth` is how many values wait for one another, at most, until this one is computed.
    """

    def __init__(self, time: int, array: Array | None = None, waits_for: Sequence["Value"] = ()):
        self.time, self._array = time, array
        self.depth: int = 1 + max(value.depth for value in waits_for) if waits_for else 0

    @property
    def array(self) -> Array:
        """The value itself, computed at the first call."""
        if self._array is None:
            self._array = self._compute()
        return self._array

    def _compute(self) -> Array:
        raise NotImplementedError

    def arranged(self, equation: Equation) -> list["Value"]:
        """The results of a layout operation on this value.

        As a part of a sum the value may have axes of size 1 for longer ones of the operand.
        """
        cuts, whole = column_ranges(equation), shape(equation.invars[0])
        if cuts is not None and self.array.shape[-1:] == whole[-1:]:
            outs = take_ranges(self.array, cuts, self.array.ndim - 1)
        else:
            outs = bind(equation, [jnp.broadcast_to(self.array, whole)])
        return [Value(self.time, out) for out in outs]


class Sum(Value):
    """A sum with at most one part for each time, the earliest first, as `equation` wants it."""

    parts: list[Value]

    def __init__(self, terms: Sequence[Value], equation: Equation):
        self.equation = equation
        by_time: dict[int, Value] = {}
        for part in itertools.chain(*(t.parts if isinstance(t, Sum) else [t] for t in terms)):
            other = by_time.get(part.time)
            by_time[part.time] = (
                part if other is None else Value(part.time, self._total([other, part]))
            )
        self.parts = [by_time[time] for time in sorted(by_time)]
        super().__init__(self.parts[-1].time, waits_for=self.parts)

    def _compute(self) -> Array:
        return self._total(self.parts)

    def _total(self, parts: Sequence[Value]) -> Array:
        arrays = [part.array for part in parts]
        with at(self.equation):
            return functools.reduce(operator.add, arrays)

    def arranged(self, equation: Equation) -> list[Value]:
        """What is ready before the first loop is added up first, and then arranged at once."""
        parts = [*self._early, *(part for part in self.parts if part.time > 0)]
        columns = zip(*(part.arranged(equation) for part in parts), strict=True)
        return [Sum(column, self.equation) for column in columns]

    @functools.cached_property
    def _early(self) -> list[Value]:
        early = [part for part in self.parts if part.time <= 0]
        return [Value(early[-1].time, self._total(early))] if early[1:] else early


class Concatenation(Value):
    def __init__(self, parts: Sequence[Value], axis: int):
        super().__init__(max(part.time for part in parts), waits_for=parts)
        self.parts, self.axis = parts, axis

    def _compute(self) -> Array:
        return lax.concatenate([part.array for part in self.parts], self.axis)


class Map(Value):
    """An elementwise operation on a sum of early and late parts, of which only ranges are read."""

    def __init__(self, operands: Sequence[Value], equation: Equation):
        super().__init__(max(value.time for value in operands), waits_for=operands)
        self.operands, self.equation = operands, equation

    def _compute(self) -> Array:
        return bind(self.equation, [value.array for value in self.operands])[0]

    def arranged(self, equation: Equation) -> list[Value]:
        axis = cut_axis(equation)
        if axis is None:
            return super().arranged(equation)
        length = shape(self.equation.outvars[0])[axis]
        taken = [
            value.arranged(equation)
            if shape(atom)[axis : axis + 1] == (length,)
            else [value] * len(equation.outvars)
            for atom, value in zip(self.equation.invars, self.operands, strict=True)
        ]
        return [Map(column, self.equation) for column in zip(*taken, strict=True)]


class Product(Value):
    """`lhs @ rhs` for an `rhs` that no step changes, by `equation`, a `dot_general`.

    It is not made in parts of fewer columns than `least`.
    """

    def __init__(self, lhs: Value, rhs: Array, equation: Equation, least: int = 0):
        super().__init__(lhs.time, waits_for=[lhs])
        self.lhs, self.rhs, self.equation, self.least = lhs, rhs, equation, least

    def _compute(self) -> Array:
        return bind(self.equation, [self.lhs.array, self.rhs])[0]

    def arranged(self, equation: Equation) -> list[Value]:
        """A part of the columns is a product with a part of `rhs`, where that is worth it.

        Not if the whole is small, at most 32 KiB a step: then one array is sooner made and read.
        """
        cuts = column_ranges(equation)
        is_small = size_in_bytes(equation.invars[0]) <= 1 << 15
        is_narrow = any(stop - start < self.least for start, stop in cuts or ())
        axis = 1 - self.equation.params["dimension_numbers"][0][1][0]
        is_repeated = self.rhs.shape[axis] != shape(equation.invars[0])[-1]
        if self.time > 0 or cuts is None or is_small or is_narrow or is_repeated:
            return super().arranged(equation)
        parts = take_ranges(self.rhs, cuts, axis)
        return [Product(self.lhs, part, self.equation, self.least) for part in parts]


def product(lhs: Value, rhs: Array, equation: Equation, least: int = 0) -> Value:
    (contract_lhs,), (contract_rhs,) = equation.params["dimension_numbers"][0]
    if not isinstance(lhs, Concatenation) or lhs.axis != contract_lhs:
        return Product(lhs, rhs, equation, least)
    products, start = [], 0
    for part in _joined(lhs):
        stop = start + part.array.shape[lhs.axis]
        rows = lax.slice_in_dim(rhs, start, stop, axis=contract_rhs)
        products.append(Product(part, rows, equation, least))
        start = stop
    return Sum(products, equation) if len(products) > 1 else products[0]


def _joined(concatenation: Concatenation) -> list[Value]:
    """The parts of a concatenation, neighbours of the same time in one."""
    joined: list[list[Value]] = []
    for part in concatenation.parts:
        if joined and joined[-1][0].time == part.time:
            joined[-1].append(part)
        else:
            joined.append([part])
    return [Concatenation(run, concatenation.axis) if len(run) > 1 else run[0] for run in joined]
