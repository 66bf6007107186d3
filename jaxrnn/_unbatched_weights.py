"""Weights that `vmap` has copied for every sample are shared again.

Where each sample has a predicate of its own, `vmap` makes of a `cond` or `switch` a selection among
the results of all branches. What a branch reads is copied for every sample, weights too, and their
products become products per sample. And so that a sample has no derivative through a branch that it
does not take, a selection stands before all that the branch reads:

    select(taken, stop_gradient(v), v)

Here copies and selections wait until a product of rows and copied weights has become one of all
rows and the weights, or what samples look up in a copied table comes from that table; the selection
is then made among the rows. They wait for linear operations alone: others may have an infinite
derivative, and that has to be behind the selection. And as the weights' gradient is now a sum over
all samples, where whatever a sample has computed counts, the rows of those that do not take the
branch are zeros, if it is certain that nobody reads theirs. So are those of one factor where both
are a sample's own, or an infinite one would come into the gradient of the other.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._by_sample import is_by_sample, keeps_first_axis
from jaxrnn._equations import product_options
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Literal,
    Program,
    Traced,
    Var,
    at,
    bind,
    dtype,
    inner_equations,
    is_inexact,
    read,
    retraced,
    shape,
    size,
    trace,
    variables,
    weak_as,
)
from jaxrnn._primitives import (
    LINEAR_ELEMENTWISE,
    broadcast_in_dim_p,
    dot_general_p,
    eq_p,
    gather_p,
    select_n_p,
    stop_gradient_p,
)
from jaxrnn._sharding import is_split

Array = jax.Array

# A boolean per sample, and what it is for those that have a derivative.
Gate = tuple[Var, bool]


def share(traced: Traced, args: Sequence[Any]) -> Traced:
    """`traced`, a function of `args`, without products per sample of weights that all share."""
    if not any(map(_reads_by_sample, traced.program.equations)):
        return traced
    inlined = retraced(traced, args)
    # What is the same for all samples is not split over an explicit mesh as they are.
    if any(map(is_split, inlined.program.equations)):
        return traced
    sharing = _Sharing(inlined.program)
    shared = trace(sharing.run, *inlined.consts, *args)
    if not sharing.found:
        return traced
    return traced._replace(program=shared.program, consts=(*shared.consts, *inlined.consts))


def _reads_by_sample(equation: Equation) -> bool:
    """Whether samples are multiplied with an array for each, or look up something in one."""
    if equation.primitive is dot_general_p:
        _, (batch, _) = equation.params["dimension_numbers"]
        return bool(batch)
    if equation.primitive is gather_p:
        return bool(equation.params["dimension_numbers"].operand_batching_dims)
    return any(map(_reads_by_sample, inner_equations(equation)))


class _Waiting(NamedTuple):
    """A value `[samples, ...]` of which only some samples have a derivative.

    The first axis of `array` is 1 if it is the same for all of them.
    """

    array: Array
    samples: int
    gates: tuple[Gate, ...]

    @property
    def is_copied(self) -> bool:
        return len(self.array) != self.samples


class _Sharing:
    """One function, and where it can wait."""

    def __init__(self, program: Program):
        self.program = program
        self.made_by = {v: e for e in program.equations for v in e.outvars}
        gates = ((id(e), self._gate(e)) for e in program.equations)
        self.gates = {name: gate for name, gate in gates if gate is not None}
        self.equal: dict[Any, list[Var]] = defaultdict(list)
        for equation in program.equations:
            if equation.primitive is eq_p:
                index, number = equation.invars
                if isinstance(index, Var) and isinstance(number, Literal) and _is_index(index):
                    self.equal[index, int(number.val)] += equation.outvars
        self.behind, self.ahead = self._behind(), self._ahead()
        self.found = False

    def run(self, *args: Array) -> list[Array]:
        """The function; `found` is whether a product was waited for."""
        self.env: dict[Var, Any] = dict(zip(self.program.invars, args, strict=True))
        self.computed: dict[Var, Array] = {}
        for equation in self.program.equations:
            with at(equation):
                results = self._waiting(equation)
                if results is None:
                    results = bind(equation, [self._value(atom) for atom in equation.invars])
            self.env.update(zip(equation.outvars, results, strict=True))
        return [weak_as(self._value(atom), atom) for atom in self.program.outvars]

    def _gate(self, equation: Equation) -> Gate | None:
        """The samples that keep their derivative, if all that `equation` selects is that."""
        if equation.primitive is not select_n_p or len(equation.invars) != 3:
            return None
        which, *cases = equation.invars
        by_sample = self._by_sample(which)
        for kept in (False, True):
            stops = self._made(cases[not kept], stop_gradient_p)
            if by_sample is not None and stops is not None and stops.invars[0] is cases[kept]:
                return by_sample, kept
        return None

    def _by_sample(self, which: Atom) -> Var | None:
        """What `which` is for each sample, `[samples]`, if it is the same all along a row."""
        spread = self._made(which, broadcast_in_dim_p)
        if spread is not None and spread.params["broadcast_dimensions"] == (0,):
            (which,) = spread.invars
        return which if isinstance(which, Var) and len(shape(which)) == 1 else None

    def _made(self, atom: Atom, primitive: Any) -> Equation | None:
        """The equation that made `atom`, if it is one of `primitive`."""
        equation = None if isinstance(atom, Literal) else self.made_by.get(atom)
        return equation if equation is not None and equation.primitive is primitive else None

    def _behind(self) -> dict[Var, frozenset[Gate]]:
        """For each variable the gates that its derivative passes, whichever way it takes."""
        every = frozenset(self.gates.values())
        behind: dict[Var, frozenset[Gate]] = dict.fromkeys(self.program.invars, frozenset())
        for equation in self.program.equations:
            passed = every.intersection(
                *(
                    behind[atom] if is_by_sample(equation, i) else frozenset()
                    for i, atom in enumerate(equation.invars)
                    if isinstance(atom, Var) and is_inexact(atom)
                )
            )
            if equation.primitive is stop_gradient_p:
                passed = every
            elif id(equation) in self.gates:
                passed |= {self.gates[id(equation)]}
            behind |= {v: passed if is_inexact(v) else every for v in equation.outvars}
        return behind

    def _ahead(self) -> dict[Var, frozenset[Gate]]:
        """For each variable the gates outside of which no sample's row of it is read."""
        every = frozenset(self.gates.values())
        results = variables(self.program.outvars)
        ahead: dict[Var, frozenset[Gate]] = defaultdict(lambda: every)
        ahead |= dict.fromkeys(results, frozenset())
        for equation in reversed(self.program.equations):
            passed = every.intersection(*(ahead[v] for v in equation.outvars))
            for i, atom in enumerate(equation.invars):
                if not isinstance(atom, Literal):
                    by_sample = is_by_sample(equation, i)
                    ahead[atom] &= passed | self._taken(equation, i) if by_sample else frozenset()
        return ahead

    def _taken(self, equation: Equation, operand: int) -> frozenset[Gate]:
        """The gates that are open where `equation`, a selection by sample, takes an operand."""
        if equation.primitive is not select_n_p or not operand:
            return frozenset()
        which, case = self._by_sample(equation.invars[0]), operand - 1
        if which is None:
            return frozenset()
        if _is_index(which):
            return frozenset((v, True) for v in self.equal[which, case])
        return frozenset({(which, bool(case))})

    def _waiting(self, equation: Equation) -> list[Any] | None:
        """The results of `equation`, if they can wait."""
        operands = [read(self.env, atom) for atom in equation.invars]
        if id(equation) in self.gates:
            gate = self.gates[id(equation)]
            value = operands[1 + gate[1]]
            if not isinstance(value, _Waiting):
                value = _Waiting(value, len(value), ())
            return [value._replace(gates=(*value.gates, gate))]
        if _copies(equation):
            array = self._value(equation.invars[0])[None]
            return [_Waiting(array, shape(equation.outvars[0])[0], ())]
        waiting = [x for x in operands if isinstance(x, _Waiting)]
        gates = tuple(dict.fromkeys(gate for x in waiting for gate in x.gates))
        if not waiting or not all(
            self.behind[v].issuperset(gates) for v in variables(equation.invars) if is_inexact(v)
        ):
            return None
        samples = shape(equation.outvars[0])[0]
        if equation.primitive is dot_general_p:
            outs = self._product(equation, operands, gates)
        elif equation.primitive is gather_p:
            outs = self._lookup(equation, operands)
        elif all(isinstance(x, _Waiting) and x.is_copied for x in operands):
            outs = _row_by_row(equation, [x.array for x in operands], 1)
        else:
            outs = _row_by_row(equation, list(map(_repeated, operands)), samples)
        return None if outs is None else [_Waiting(out, samples, gates) for out in outs]

    def _product(
        self, equation: Equation, operands: Sequence[Any], gates: Sequence[Gate]
    ) -> list[Array] | None:
        """A product per sample; if one factor is copied and one is not, as a product of all."""
        contracted, batch = equation.params["dimension_numbers"]
        copied = [isinstance(x, _Waiting) and x.is_copied for x in operands]
        is_read_by_others = not self.ahead[equation.outvars[0]].issuperset(gates)
        if copied[0] == copied[1]:
            both_own = not any(copied)
            if batch[0][:1] != (0,) or batch[1][:1] != (0,) or (both_own and is_read_by_others):
                return None
            self.found |= bool(gates)
            factors = list(map(_repeated, operands))
            if both_own:
                less = int(size(equation.invars[1]) < size(equation.invars[0]))
                factors[less] = self._or_zeros(factors[less], gates)
            return bind(equation, factors)
        rows, weights = copied.index(False), copied.index(True)
        if batch[weights][:1] != (0,) or (gates and batch[rows][0] != 0) or is_read_by_others:
            return None
        self.found = True
        lhs = self._or_zeros(_repeated(operands[rows]), gates)
        rhs = lax.squeeze(operands[weights].array, (0,))
        sample = batch[rows][0]
        kept = [(i, j - 1) for i, j in zip(batch[rows], batch[weights], strict=True) if j]
        dimensions = (
            (contracted[rows], [j - 1 for j in contracted[weights]]),
            ([i for i, _ in kept], [j for _, j in kept]),
        )
        options = product_options(equation, swapped=weights == 0)
        out = lax.dot_general(lhs, rhs, dimensions, **options)

        free = [
            [(side, i) for i in range(ndim) if i not in (*contracted[side], *batch[side])]
            for side, ndim in enumerate(len(shape(atom)) for atom in equation.invars)
        ]
        ours = sorted([*free[rows], (rows, sample)])
        made = [*((rows, i) for i, _ in kept), *ours, *free[weights]]
        wanted = [*((rows, i) for i in batch[rows]), *free[0], *free[1]]
        return [lax.transpose(out, [made.index(axis) for axis in wanted])]

    def _lookup(self, equation: Equation, operands: Sequence[Any]) -> list[Array] | None:
        """What samples look up, if it is in copies of one table, from that table."""
        table, indices = operands
        params = dict(equation.params)
        numbers = params["dimension_numbers"]
        by_sample = is_by_sample(equation, 0) and len(numbers.operand_batching_dims) == 1
        if not (isinstance(table, _Waiting) and table.is_copied and by_sample):
            return None
        self.found = True
        params["dimension_numbers"] = lax.GatherDimensionNumbers(
            offset_dims=numbers.offset_dims,
            collapsed_slice_dims=tuple(axis - 1 for axis in numbers.collapsed_slice_dims),
            start_index_map=tuple(axis - 1 for axis in numbers.start_index_map),
        )
        params["slice_sizes"] = params["slice_sizes"][1:]
        params |= {"indices_are_sorted": False, "unique_indices": False}
        array = lax.squeeze(table.array, (0,))
        return bind(equation.replace(params=params), [array, _repeated(indices)])

    def _value(self, atom: Atom) -> Any:
        """The value of an atom, which waits no longer."""
        value = read(self.env, atom)
        if isinstance(atom, Literal) or not isinstance(value, _Waiting):
            return value
        if atom not in self.computed:
            array = _repeated(value)
            for gate in value.gates:
                array = self._select(gate, array, lax.stop_gradient(array))
            self.computed[atom] = array
        return self.computed[atom]

    def _or_zeros(self, rows: Array, gates: Sequence[Gate]) -> Array:
        for gate in gates:
            rows = self._select(gate, rows, jnp.zeros_like(rows))
        return rows

    def _select(self, gate: Gate, opened: Array, closed: Array) -> Array:
        """The rows of one array where a gate is open, of the other where it is not."""
        predicate, kept = gate
        which = lax.broadcast_in_dim(self._value(predicate), opened.shape, (0,))
        return lax.select_n(which, *((closed, opened) if kept else (opened, closed)))


def _copies(equation: Equation) -> bool:
    """Whether `equation` repeats an array along a new first axis."""
    if equation.primitive is not broadcast_in_dim_p or isinstance(equation.invars[0], Literal):
        return False
    rank, whole = len(shape(equation.invars[0])), shape(equation.outvars[0])
    axes = tuple(equation.params["broadcast_dimensions"])
    stays = shape(equation.invars[0]) == whole[1:] and axes == tuple(range(1, rank + 1))
    return rank > 0 and stays and isinstance(whole[0], int) and whole[0] > 1


def _repeated(value: Any) -> Any:
    """The array that waits, with a row for each sample; anything else as it is."""
    if not isinstance(value, _Waiting):
        return value
    return jnp.broadcast_to(value.array, (value.samples, *value.array.shape[1:]))


def _row_by_row(equation: Equation, operands: Sequence[Array], samples: int) -> list[Array] | None:
    """A linear `equation` on arrays of so many rows, if it leaves the first axis as it is."""
    if equation.primitive not in LINEAR_ELEMENTWISE and not keeps_first_axis(equation):
        return None
    params = dict(equation.params)
    for name in {"limit_indices", "new_sizes"} & params.keys():
        params[name] = (samples, *params[name][1:])
    return bind(equation.replace(params=params), operands)


def _is_index(atom: Atom) -> bool:
    """Whether it may be the index of a `switch`, rather than a boolean."""
    return bool(jnp.issubdtype(dtype(atom), jnp.integer))
