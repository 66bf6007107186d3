"""Rewrites a scan body so that fission finds more to move. Values change by rounding alone.

Users add, concatenate and split where it reads best; what can leave the loop then hides behind what
cannot. Four identities bring it forward:

    (a + h) + b               = (a + b) + h                  terms ready early are added first
    split(f(a + h))           = f(split(a) + split(h))       a gate's input is stored by itself
    concat([x, h]) @ K        = x @ K[:D] + h @ K[D:]        the input's part leaves the loop
    h @ U, h @ V              = split(h @ concat([U, V]))    products of one state become one

and, for a product that leaves the loop anyway and to which nothing is added there,
`split(x @ W) = x @ split(W)`, whose results need no copy to be contiguous. (A slice of a slice of
time, fused into the gates, keeps XLA's CPU compiler from vectorising them.) In a tangent, where it
is the other way round, `_gate_sums.py` finds what is to be split last.

The body is run once by an interpreter whose values may be sums, concatenations and products that
are not computed yet; what it computes is traced to the new body.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxrnn import _deferred, _device
from jaxrnn._common_subexpressions import without_repeats
from jaxrnn._equations import cut_axis, is_arithmetic, take_ranges
from jaxrnn._gate_sums import TakenApart, rejoined
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Literal,
    Program,
    Traced,
    Var,
    at,
    bind,
    differentiable,
    dtype,
    inline,
    is_inexact,
    shape,
    size,
    size_in_bytes,
    trace,
    variables,
)
from jaxrnn._orientation import Orientation
from jaxrnn._passes import WIDE
from jaxrnn._primitives import (
    add_any_p,
    add_p,
    concatenate_p,
    dot_general_p,
    reshape_p,
    slice_p,
    split_p,
    squeeze_p,
)
from jaxrnn._schedule import carry_times
from jaxrnn._sharding import explicit_sharding
from jaxrnn._singleton_axes import bind_without_units

Array = Any

# Values that wait for one another are computed by recursion: so many at most.
_DEEPEST = 32


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

    def apply(equation: Equation, values: Sequence[Any]) -> list[Any]:
        return bind_without_units(equation, to_be_transposed, [0] * len(values), 1, values)

    def traced(run: Callable[..., list[Any]], *more: Array) -> Traced:
        made = trace(run, *more, *example)
        return made._replace(program=without_repeats(made.program), consts=(*made.consts, *more))

    inlined = traced(functools.partial(inline, program, apply=apply))
    orientation = Orientation(inlined.program, len(inlined.consts) + consts)
    if orientation.wrong:
        inlined = traced(orientation.run, *inlined.consts)
    held = len(inlined.consts) + consts
    rewriter = _Rewriter(inlined.program, held, carry, to_be_transposed)
    return traced(rewriter.run, *inlined.consts)


class _Rewriter:
    """One body, and what has to be known of all of it before the first equation is rewritten."""

    def __init__(self, program: Program, consts: int, carry: int, to_be_transposed: bool):
        self.program, self.to_be_transposed = program, to_be_transposed
        carry_at = carry_times(program, consts, carry, to_be_transposed)
        xs = len(program.invars) - consts - carry
        self.in_times = [-1] * consts + carry_at + [0] * xs
        self.times = dict(zip(program.invars, self.in_times, strict=True))
        for equation in program.equations:
            time = max((self.times[v] for v in variables(equation.invars)), default=-1)
            self.times |= dict.fromkeys(equation.outvars, time)
        # Constants first: a product that is merged with a later one needs the weights of both.
        self.equations = sorted(
            program.equations, key=lambda e: any(self.times[v] >= 0 for v in e.outvars)
        )
        self.uses = Counter(
            a for e in program.equations for a in e.invars if not isinstance(a, Literal)
        )
        self.uses.update(a for a in program.outvars if not isinstance(a, Literal))
        self.gets_more = {
            v
            for e in program.equations
            if e.primitive in (add_p, add_any_p) and any(self._time(a) <= 0 for a in e.invars)
            for v in variables(e.invars)
        }
        self.only_sliced = self._only_sliced()
        self.only_cut = self._only_cut()
        self.groups = self._groups()
        sums = rejoined(program, self.uses) if to_be_transposed else []
        self.rejoined = {v: each for each in sums for v in each.outs}
        self.unread = frozenset[Var]().union(*(each.unread for each in sums))

    def run(self, *args: Array) -> list[Array]:
        """The body, rewritten."""
        env: dict[Var, _deferred.Value] = {
            v: _deferred.Value(time, arg)
            for v, time, arg in zip(self.program.invars, self.in_times, args, strict=True)
        }
        for equation in self.equations:
            first = equation.outvars[0]
            if first in env or first in self.unread:
                continue
            if first in self.rejoined:
                self._fill_rejoined(self.rejoined[first], equation, env)
            else:
                results = self._apply(equation, env)
                env |= zip(equation.outvars, results, strict=True)
        return [self._array(env, atom) for atom in self.program.outvars]

    def _apply(self, equation: Equation, env: dict[Var, _deferred.Value]) -> list[_deferred.Value]:
        rewritten = self._rewritten(equation, env)
        if rewritten is not None:
            return [
                _deferred.Value(value.time, value.array) if value.depth > _DEEPEST else value
                for value in rewritten
            ]
        time = max((env[v].time for v in variables(equation.invars)), default=-1)
        outs = bind(equation, [self._array(env, atom) for atom in equation.invars])
        return [_deferred.Value(time, out) for out in outs]

    def _rewritten(
        self, equation: Equation, env: dict[Var, _deferred.Value]
    ) -> list[_deferred.Value] | None:
        primitive = equation.primitive
        operands = [self._read(env, atom) for atom in equation.invars]
        if primitive in (add_p, add_any_p) and is_inexact(equation.outvars[0]):
            late = operands[0].time != operands[1].time
            if late or any(isinstance(value, _deferred.Sum) for value in operands):
                return [_deferred.Sum(self._lone(equation, operands), equation)]
        elif primitive is concatenate_p:
            return [_deferred.Concatenation(operands, equation.params["dimension"])]
        elif primitive in _LAYOUT:
            (source,) = equation.invars
            splits = not isinstance(source, Literal) and self.only_sliced[source]
            if splits and not self._stays_whole(equation, operands[0]):
                return operands[0].arranged(equation)
        elif primitive is dot_general_p and _is_matrix_product(equation):
            group = self.groups.get(id(equation), [equation])
            if operands[1].time == -1:
                return (
                    self._merged(group, env) if group[1:] else [self._product(equation, operands)]
                )
        elif is_arithmetic(equation) and self._splits_later(equation, operands):
            return [_deferred.Map(self._lone(equation, operands), equation)]
        return None

    def _product(self, equation: Equation, operands: Sequence[_deferred.Value]) -> _deferred.Value:
        lhs, rhs = operands
        if self.to_be_transposed and lhs.time > 0:
            return _deferred.Value(lhs.time, _turned(equation, lhs.array, rhs.array))
        # The gradient of a matrix of fewer columns is a slow product, see `_passes.py`.
        return _deferred.product(lhs, rhs.array, equation, WIDE if self.to_be_transposed else 0)

    def _lone(
        self, equation: Equation, operands: Sequence[_deferred.Value]
    ) -> list[_deferred.Value]:
        """The operands; one that others read too is computed now, or it would be more than once."""
        return [
            value if self._uses(atom) == 1 else _deferred.Value(value.time, value.array)
            for atom, value in zip(equation.invars, operands, strict=True)
        ]

    def _uses(self, atom: Atom) -> int:
        return 1 if isinstance(atom, Literal) else self.uses[atom]

    def _splits_later(self, equation: Equation, operands: Sequence[_deferred.Value]) -> bool:
        """Whether the split that follows `equation` had better come before it.

        Not if a whole product is added: then the sum is as contiguous as its parts, and one array
        of all gates is faster to compute and to keep than an array for each.
        """
        return self.only_cut[equation.outvars[0]] and any(
            isinstance(value, _deferred.Map)
            or (
                isinstance(value, _deferred.Sum)
                and value.parts[0].time <= 0 < value.time
                and not isinstance(value.parts[-1], _deferred.Product)
            )
            for value in self._lone(equation, operands)
        )

    def _stays_whole(self, equation: Equation, value: _deferred.Value) -> bool:
        """Whether a sum is better computed before it is split by `equation`.

        In a tangent the early part of the sum is a row per step that the transpose has to write:
        better one array than one per gate. Not if the early part of a gate is still to come.
        """
        return (
            self.to_be_transposed
            and isinstance(value, _deferred.Sum)
            and self.gets_more.isdisjoint(equation.outvars)
        )

    def _merged(
        self, group: Sequence[Equation], env: dict[Var, _deferred.Value]
    ) -> list[_deferred.Value]:
        """The product of one state with all its weights; fills `env` for the later ones."""
        first = group[0]
        weights = [self._read(env, e.invars[1]).array for e in group]
        axis = 1 - first.params["dimension_numbers"][0][1][0]
        whole = _deferred.product(
            self._read(env, first.invars[0]), lax.concatenate(weights, axis), first
        )
        sizes = [w.shape[axis] for w in weights]
        last = len(shape(first.outvars[0])) - 1
        split = trace(lambda z: lax.split(z, sizes, last), whole.array).program.equations[0]
        parts = whole.arranged(split)
        for equation, part in zip(group[1:], parts[1:], strict=True):
            env[equation.outvars[0]] = part
        return parts[:1]

    def _fill_rejoined(
        self, apart: TakenApart, equation: Equation, env: dict[Var, _deferred.Value]
    ) -> None:
        """Adds arrays and takes the sum apart."""
        total = _deferred.Sum([env[v] for v in apart.terms], equation)
        parts = take_ranges(total.array, apart.cuts, total.array.ndim - 1)
        env |= {
            v: _deferred.Value(total.time, part) for v, part in zip(apart.outs, parts, strict=True)
        }

    def _read(self, env: dict[Var, _deferred.Value], atom: Atom) -> _deferred.Value:
        return (
            _deferred.Value(-1, jnp.asarray(atom.val, dtype(atom)))
            if isinstance(atom, Literal)
            else env[atom]
        )

    def _array(self, env: dict[Var, _deferred.Value], atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom].array

    def _groups(self) -> dict[int, list[Equation]]:
        """Products of one state, or of one concatenation with a state, with different weights.

        Not a narrow one beside wide ones: it gains little, and its columns put theirs out of line.
        Nor one that has no derivative beside those that have: its weights may be infinite.
        """
        differentiated = differentiable(self.program)
        groups: dict[Any, list[Equation]] = defaultdict(list)
        for equation in self.equations:
            if equation.primitive is dot_general_p and _is_matrix_product(equation):
                lhs, rhs = equation.invars
                if self._time(lhs) > 0 and self._time(rhs) == -1:
                    has_one = equation.outvars[0] in differentiated
                    groups[lhs, dtype(rhs), str(equation.params), has_one].append(equation)
        alike = []
        for group in groups.values():
            widest = max(size(e.outvars[0]) for e in group)
            alike.append([e for e in group if 8 * size(e.outvars[0]) >= widest])
        return {id(group[0]): group for group in alike if len(group) > 1}

    def _only_sliced(self) -> dict[Var, bool]:
        """Whether a variable is only ever arranged, and no part of it more than once."""
        parts: Counter[Var] = Counter()
        others: Counter[Var] = Counter(
            a for a in self.program.outvars if not isinstance(a, Literal)
        )
        for equation in self.equations:
            layout = equation.primitive in _LAYOUT
            for v in variables(equation.invars):
                if layout:
                    parts[v] += sum(size_in_bytes(out) for out in equation.outvars)
                else:
                    others[v] += 1
        return defaultdict(
            bool, {v: not others[v] and n <= size_in_bytes(v) for v, n in parts.items()}
        )

    def _only_cut(self) -> dict[Var, bool]:
        """Whether only ranges of a variable are read, directly or through elementwise work."""
        only: dict[Var, bool] = defaultdict(bool)
        for equation in reversed(self.equations):
            for v in variables(equation.invars):
                if cut_axis(equation) is not None:
                    only[v] = self.only_sliced[v] and (v not in only or only[v])
                elif self.uses[v] == 1 and is_arithmetic(equation):
                    (out,) = equation.outvars
                    only[v] = only[out] and shape(v) == shape(out)
                else:
                    only[v] = False
        return only

    def _time(self, atom: Atom) -> int:
        return -1 if isinstance(atom, Literal) else self.times[atom]


_LAYOUT = frozenset({reshape_p, slice_p, split_p, squeeze_p})


def _turned(equation: Equation, lhs: Array, rhs: Array) -> Array:
    """The product of `equation`, from the transpose of `rhs`.

    On a GPU the transpose of one row's product is faster from `rhs`: it is no product there, but
    sums over the rows of a matrix, of which many can be made at once.
    """
    params = dict(equation.params)
    (contract_lhs, (axis,)), batch = params.pop("dimension_numbers")
    dimensions = ((contract_lhs, (1 - axis,)), batch)
    with at(equation):
        if _device.gpu() is not None and lhs.size == rhs.shape[axis]:
            return lax.dot_general(lhs, rhs, equation.params["dimension_numbers"], **params)
        return lax.dot_general(lhs, rhs.T, dimensions, **params)


def _is_matrix_product(equation: Equation) -> bool:
    """Whether rows of any array are multiplied with a matrix, without batch axes.

    One that is split over an explicit mesh is left alone: its parts may not lie like the whole.
    """
    (contract_lhs, _), (batch, _) = equation.params["dimension_numbers"]
    rhs = equation.invars[1]
    rank = len(shape(rhs))
    return (
        len(contract_lhs) == 1 and not batch and rank == 2 and explicit_sharding(rhs.aval) is None
    )
