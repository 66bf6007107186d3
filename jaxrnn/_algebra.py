"""Rewrites a scan body so that fission finds more to move. Values change by rounding alone.

Users add, concatenate and split where it reads best; what can leave the loop then hides behind what
cannot. Four identities bring it forward:

    (a + h) + b               = (a + b) + h                  terms ready early are added first
    split(a + h)              = split(a) + split(h)          a gate's input is stored by itself
    concat([x, h]) @ K        = x @ K[:D] + h @ K[D:]        the input's part leaves the loop
    h @ U, h @ V              = split(h @ concat([U, V]))    products of one state become one

and, for a product that leaves the loop anyway, `split(x @ W) = x @ split(W)`, whose results need no
copy to be contiguous. (A slice of a slice of time, fused into the gates, keeps XLA's CPU compiler
from vectorising them.)

The body is run once by an interpreter whose values may be sums, concatenations and products that
are not computed yet; what it computes is traced to the new body.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxrnn._fission import carry_times
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Literal,
    Program,
    Traced,
    Var,
    add_any_p,
    add_p,
    bind,
    concatenate_p,
    dot_general_p,
    dtype,
    inline,
    reshape_p,
    shape,
    size_in_bytes,
    slice_p,
    split_p,
    squeeze_p,
    trace,
    variables,
)

Array = Any


def simplify(
    program: Program,
    consts: int,
    carry: int,
    example: Sequence[Array],
    to_be_transposed: bool = False,
) -> Traced:
    """Inlines and rewrites a scan body.

    Args:
        program: `(consts, carry, x) -> (carry, y)`.
        consts: number of consts.
        carry: number of carries.
        example: arguments to trace it at.
        to_be_transposed: whether the body is a tangent, whose transpose is what will run: weights
            are then stored so that its products, not those of the body, read them in order.

    Returns:
        The new body, `program(*consts, *arguments of the old one)`.
    """
    inlined = trace(functools.partial(inline, program), *example)
    added = len(inlined.consts)
    rewriter = _Rewriter(inlined.program, added + consts, carry, to_be_transposed)
    traced = trace(rewriter.run, *inlined.consts, *example)
    return traced._replace(consts=(*traced.consts, *inlined.consts))


class _Value:
    """A value of the interpreter, `stage` being the time at which it can be known."""

    def __init__(self, stage: int, array: Array | None = None):
        self.stage, self._array = stage, array

    @property
    def array(self) -> Array:
        """The value itself, computed at the first call."""
        if self._array is None:
            self._array = self._compute()
        return self._array

    def _compute(self) -> Array:
        raise NotImplementedError

    def arranged(self, equation: Equation) -> list["_Value"]:
        """The results of a layout operation on this value.

        As a part of a sum the value may have axes of size 1 for longer ones of the operand.
        """
        columns, whole = _columns(equation), shape(equation.invars[0])
        if columns is not None and self.array.shape[-1:] == whole[-1:]:
            outs = _take_columns(self.array, columns)
        else:
            outs = bind(equation, [jnp.broadcast_to(self.array, whole)])
        return [_Value(self.stage, out) for out in outs]


class _Sum(_Value):
    """A sum with at most one part for each stage, the earliest first."""

    def __init__(self, parts: Sequence[_Value]):
        by_stage: dict[int, _Value] = {}
        for part in parts:
            other = by_stage.get(part.stage)
            by_stage[part.stage] = (
                part if other is None else _Value(part.stage, other.array + part.array)
            )
        self.parts = [by_stage[stage] for stage in sorted(by_stage)]
        super().__init__(self.parts[-1].stage)

    def _compute(self) -> Array:
        return functools.reduce(
            lambda total, part: total + part.array, self.parts[1:], self.parts[0].array
        )

    def arranged(self, equation: Equation) -> list[_Value]:
        return [
            _Sum(outs) for outs in zip(*(p.arranged(equation) for p in self.parts), strict=True)
        ]


class _Concatenation(_Value):
    def __init__(self, parts: Sequence[_Value], axis: int):
        super().__init__(max(part.stage for part in parts))
        self.parts, self.axis = parts, axis

    def _compute(self) -> Array:
        return lax.concatenate([part.array for part in self.parts], self.axis)


class _Product(_Value):
    """`lhs @ rhs` for an `rhs` that no step changes, by `equation`, a `dot_general`."""

    def __init__(self, lhs: _Value, rhs: Array, equation: Equation):
        super().__init__(lhs.stage)
        self.lhs, self.rhs, self.equation = lhs, rhs, equation

    def _compute(self) -> Array:
        return bind(self.equation, [self.lhs.array, self.rhs])[0]

    def arranged(self, equation: Equation) -> list[_Value]:
        """A part of the columns is a product with a part of `rhs`, where that is worth it."""
        columns = _columns(equation)
        if self.stage > 0 or columns is None:
            return super().arranged(equation)
        axis = 1 - self.equation.params["dimension_numbers"][0][1][0]
        return [
            _Product(self.lhs, lax.slice_in_dim(self.rhs, start, stop, axis=axis), self.equation)
            for start, stop in columns
        ]


class _Rewriter:
    """One body, and what has to be known of all of it before the first equation is rewritten."""

    def __init__(self, program: Program, consts: int, carry: int, to_be_transposed: bool):
        self.program, self.to_be_transposed = program, to_be_transposed
        carry_stages = carry_times(program, consts, carry)
        xs = len(program.invars) - consts - carry
        self.in_stages = [-1] * consts + carry_stages + [0] * xs
        self.stages = dict(zip(program.invars, self.in_stages, strict=True))
        for equation in program.equations:
            stage = max((self.stages[v] for v in variables(equation.invars)), default=-1)
            self.stages |= dict.fromkeys(equation.outvars, stage)
        # Constants first: a product that is merged with a later one needs the weights of both.
        self.equations = sorted(
            program.equations, key=lambda e: any(self.stages[v] >= 0 for v in e.outvars)
        )
        self.uses = Counter(
            a for e in program.equations for a in e.invars if not isinstance(a, Literal)
        )
        self.uses.update(a for a in program.outvars if not isinstance(a, Literal))
        self.only_sliced = self._only_sliced()
        self.groups = self._groups()

    def run(self, *args: Array) -> list[Array]:
        """The body, rewritten."""
        env: dict[Var, _Value] = {
            v: _Value(stage, arg)
            for v, stage, arg in zip(self.program.invars, self.in_stages, args, strict=True)
        }
        for equation in self.equations:
            if equation.outvars[0] not in env:
                results = self._apply(equation, env)
                env |= zip(equation.outvars, results, strict=True)
        return [self._read(env, atom).array for atom in self.program.outvars]

    def _apply(self, equation: Equation, env: dict[Var, _Value]) -> list[_Value]:
        operands = [self._read(env, atom) for atom in equation.invars]
        primitive = equation.primitive
        if primitive in (add_p, add_any_p) and _is_float(equation):
            if operands[0].stage != operands[1].stage or any(
                isinstance(value, _Sum) for value in operands
            ):
                return [self._sum(equation, operands)]
        elif primitive is concatenate_p:
            return [_Concatenation(operands, equation.params["dimension"])]
        elif primitive in _LAYOUT or primitive is split_p():
            (source,) = equation.invars
            if not isinstance(source, Literal) and self.only_sliced[source]:
                return operands[0].arranged(equation)
        elif primitive is dot_general_p and _is_matrix_product(equation):
            group = self.groups.get(id(equation))
            if group is not None:
                return self._merged(group, env)
            if operands[1].stage == -1:
                return [self._product(equation, operands)]
        stage = max((value.stage for value in operands), default=-1)
        return [_Value(stage, out) for out in bind(equation, [v.array for v in operands])]

    def _sum(self, equation: Equation, operands: Sequence[_Value]) -> _Value:
        parts: list[_Value] = []
        for atom, value in zip(equation.invars, operands, strict=True):
            lone = isinstance(atom, Literal) or self.uses[atom] == 1
            if isinstance(value, _Sum) and lone:
                parts += value.parts
            elif isinstance(value, _Product) and lone:
                parts.append(value)
            else:
                parts.append(_Value(value.stage, value.array))
        return _Sum(parts)

    def _product(self, equation: Equation, operands: Sequence[_Value]) -> _Value:
        lhs, rhs = operands
        if self.to_be_transposed and lhs.stage > 0:
            return _Value(lhs.stage, _turned(equation, lhs.array, rhs.array))
        return _product(lhs, rhs.array, equation)

    def _merged(self, group: Sequence[Equation], env: dict[Var, _Value]) -> list[_Value]:
        """The product of one state with all its weights; fills `env` for the later ones."""
        first = group[0]
        weights = [self._read(env, e.invars[1]).array for e in group]
        axis = 1 - first.params["dimension_numbers"][0][1][0]
        whole = _product(self._read(env, first.invars[0]), lax.concatenate(weights, axis), first)
        sizes = [w.shape[axis] for w in weights]
        last = len(shape(first.outvars[0])) - 1
        split = trace(lambda z: lax.split(z, sizes, last), whole.array).program.equations[0]
        parts = whole.arranged(split)
        for equation, part in zip(group[1:], parts[1:], strict=True):
            env[equation.outvars[0]] = part
        return parts[:1]

    def _read(self, env: dict[Var, _Value], atom: Atom) -> _Value:
        return (
            _Value(-1, jnp.asarray(atom.val, dtype(atom)))
            if isinstance(atom, Literal)
            else env[atom]
        )

    def _groups(self) -> dict[int, list[Equation]]:
        """Products of one state, or of one concatenation with a state, with different weights."""
        groups: dict[Any, list[Equation]] = defaultdict(list)
        for equation in self.equations:
            if equation.primitive is dot_general_p and _is_matrix_product(equation):
                lhs, rhs = equation.invars
                if self._stage(lhs) > 0 and self._stage(rhs) == -1:
                    groups[lhs, dtype(rhs), str(equation.params)].append(equation)
        return {id(group[0]): group for group in groups.values() if len(group) > 1}

    def _only_sliced(self) -> dict[Var, bool]:
        """Whether a variable is only ever arranged, and no part of it more than once."""
        parts: Counter[Var] = Counter()
        others: Counter[Var] = Counter(
            a for a in self.program.outvars if not isinstance(a, Literal)
        )
        for equation in self.equations:
            layout = equation.primitive in _LAYOUT or equation.primitive is split_p()
            for v in variables(equation.invars):
                if layout:
                    parts[v] += sum(size_in_bytes(out) for out in equation.outvars)
                else:
                    others[v] += 1
        return defaultdict(
            bool, {v: not others[v] and n <= size_in_bytes(v) for v, n in parts.items()}
        )

    def _stage(self, atom: Atom) -> int:
        return -1 if isinstance(atom, Literal) else self.stages[atom]


_LAYOUT = frozenset({reshape_p, slice_p, squeeze_p})


def _product(lhs: _Value, rhs: Array, equation: Equation) -> _Value:
    (contract_lhs,), (contract_rhs,) = equation.params["dimension_numbers"][0]
    if not isinstance(lhs, _Concatenation) or lhs.axis != contract_lhs:
        return _Product(lhs, rhs, equation)
    products, start = [], 0
    for part in _joined(lhs):
        stop = start + part.array.shape[lhs.axis]
        rows = lax.slice_in_dim(rhs, start, stop, axis=contract_rhs)
        products.append(_Product(part, rows, equation))
        start = stop
    return _Sum(products) if len(products) > 1 else products[0]


def _turned(equation: Equation, lhs: Array, rhs: Array) -> Array:
    """The product of `equation`, from the transpose of `rhs`."""
    params = dict(equation.params)
    (contract_lhs, (axis,)), batch = params.pop("dimension_numbers")
    dimensions = ((contract_lhs, (1 - axis,)), batch)
    return lax.dot_general(lhs, rhs.T, dimensions, **params)


def _joined(concatenation: _Concatenation) -> list[_Value]:
    """The parts of a concatenation, neighbours of the same stage in one."""
    joined: list[list[_Value]] = []
    for part in concatenation.parts:
        if joined and joined[-1][0].stage == part.stage:
            joined[-1].append(part)
        else:
            joined.append([part])
    return [_Concatenation(run, concatenation.axis) if len(run) > 1 else run[0] for run in joined]


def _is_float(equation: Equation) -> bool:
    return bool(jnp.issubdtype(dtype(equation.outvars[0]), jnp.inexact))


def _is_matrix_product(equation: Equation) -> bool:
    """Whether rows of any array are multiplied with a matrix, without batch axes."""
    (contract_lhs, _), (batch, _) = equation.params["dimension_numbers"]
    return len(contract_lhs) == 1 and not batch and len(shape(equation.invars[1])) == 2


def _take_columns(array: Array, columns: Sequence[tuple[int, int]]) -> list[Array]:
    """Ranges of the last axis; by one split if possible, whose transpose is one concatenation."""
    axis, stops = array.ndim - 1, [stop for _, stop in columns]
    if [0, *stops[:-1]] == [start for start, _ in columns] and stops[-1] == array.shape[axis]:
        return list(lax.split(array, [stop - start for start, stop in columns], axis))
    return [lax.slice_in_dim(array, start, stop, axis=axis) for start, stop in columns]


def _columns(equation: Equation) -> list[tuple[int, int]] | None:
    """The ranges of the last axis that a slice or split takes, if it cuts no other axis."""
    whole = shape(equation.invars[0])
    params = equation.params
    if equation.primitive is split_p() and params["axis"] == len(whole) - 1:
        stops = [sum(params["sizes"][: i + 1]) for i in range(len(params["sizes"]))]
        return list(zip([0, *stops[:-1]], stops, strict=True))
    if equation.primitive is slice_p and params["strides"] is None:
        starts, stops = params["start_indices"], params["limit_indices"]
        if all(s == 0 for s in starts[:-1]) and tuple(stops[:-1]) == whole[:-1]:
            return [(starts[-1], stops[-1])]
    return None
