"""The tangent of a body over blocks of time: a scan body again, and split like any other."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._algebra import simplify
from jaxrnn._block import (
    Axes,
    Steps,
    over_blocks,
    run_block,
    run_invariant,
    run_otherwise,
)
from jaxrnn._block_length import reads_in_place, tangent_block, tangent_unroll
from jaxrnn._equations import slope_by_output
from jaxrnn._fission import Loop, Plan, fission
from jaxrnn._jaxpr import (
    Equation,
    Program,
    Var,
    as_function_of,
    bind,
    dependents,
    is_inexact,
    parts,
    read,
    trace,
    variables,
)
from jaxrnn._residuals import Residuals, State, is_active, only_split
from jaxrnn._rows import InPlace, Writer, add, adds_in_place, block_of, one_row, row_of
from jaxrnn._samples_last import tangent_with_samples_last
from jaxrnn._sharding import empty_rows
from jaxrnn._time_axis import shifted, time_first, time_on

Array = jax.Array
PyTree = Any


class _Left(NamedTuple):
    """Rows of a block that a loop reads in place, and themselves, to be differentiated instead."""

    in_place: InPlace
    rows: Array


class Tangent:
    """The tangent of a body, as a body that is split again."""

    def __init__(
        self,
        program: Program,
        primals: Any,
        tangents: Any,
        axes: Axes,
        rows: Sequence[Array],
        held: Residuals,
    ):
        """Says what is known of each step.

        Args:
            program: the body.
            primals: its consts, its first carry, its xs.
            tangents: theirs.
            axes: the axis of time of each of the xs and of each of `rows`.
            rows: what the steps made, arrays with a row per step, ys first.
            held: what each of `rows` is.
        """
        consts, carry, xs = primals
        t_consts, t_carry, t_xs = tangents
        self.program, self.rows = program, rows
        self.kept = held.kept
        self.held = [*held.states, *(State(i, late=False) for i in held.kept.values())]
        self.splits = only_split(program)
        self.functions = {
            self.splits[v].outvars[0]: e
            for e in program.equations
            for v in e.outvars
            if v in self.splits
        }
        self.consts, self.carry, self.xs = list(consts), list(carry), list(xs)
        carries = program.invars[len(consts) : len(consts) + len(carry)]
        ys = program.outvars[len(carry) :]
        self.active_consts = [i for i, t in enumerate(t_consts) if is_active(t)]
        self.active_xs = [i for i, t in enumerate(t_xs) if is_active(t)]
        self.active_carry = [i for i, v in enumerate(carries) if v in held.active]
        self.active_ys = [i for i, v in enumerate(ys) if isinstance(v, Var) and v in held.active]
        self.t_consts = [t_consts[i] for i in self.active_consts]
        self.t_carry = [
            t_carry[i] if is_active(t_carry[i]) else jnp.zeros_like(carry[i])
            for i in self.active_carry
        ]
        self.t_xs = [t_xs[i] for i in self.active_xs]
        self.axes, self.t_axes = axes, [axes.xs[i] for i in self.active_xs]

    def run(self, steps: Steps, block: int) -> tuple[list[Array], list[Array]]:
        """The tangents of the last carry and of ys, of those among them that have one."""
        in_place = reads_in_place(steps)
        plan, consts, linear = self._split(in_place)
        block = tangent_block(plan, steps, block)
        steps = steps._replace(unroll=tangent_unroll(plan, steps))
        plan = tangent_with_samples_last(plan, steps)
        for stage in plan.stages:
            linear |= dependents(stage.program, [v for v in stage.program.invars if v in linear])
        left = self._left_in_place(plan) if in_place else [False] * len(self.held)

        invariant = run_invariant(plan, consts)
        t_rows = dict(enumerate(zip(self.t_xs, self.t_axes, strict=True)))
        sliced = {i: rows for i, rows in t_rows.items() if adds_in_place(rows[0])}
        blocked = {i: time_first(*rows) for i, rows in t_rows.items() if i not in sliced}
        outs = plan.body.outvars[plan.carry :]
        axes = [self.axes.ys[i] for i in self.active_ys]

        def run_one(state: PyTree, x: PyTree, steps: Steps) -> tuple[PyTree, PyTree]:
            # What is only arranged anew is not kept for the gradient beside what it is made of.
            @functools.partial(jax.checkpoint, prevent_cse=False)
            def tangents_of(
                carry: list[Array],
                whole: list[Array | None],
                t_xs: dict[int, Array],
                index: Array,
            ) -> tuple[PyTree, PyTree]:
                t_xs = t_xs | {i: block_of(*rows, index) for i, rows in sliced.items()}
                xs = [*(t_xs[i] for i in sorted(t_xs)), *self._known(index, steps, left)]
                writer = Writer(outs, whole, axes, index, add)
                of_loops = functools.partial(_run_loop, writer, linear)
                carry, ys = run_block(plan, invariant, carry, xs, steps, of_loops)
                writer.put_missing(ys)
                stacked = [y if w is None else None for y, w in zip(ys, whole, strict=True)]
                return (carry, writer.whole), stacked

            return tangents_of(*state, *x)

        # What is not first in time is read where it lies by the transpose, as are t_xs sliced.
        whole = [
            empty_rows(v.aval, steps.length, axis, 0) if axis and adds_in_place(v.aval) else None
            for v, axis in zip(outs, axes, strict=True)
        ]
        rows = (blocked, jnp.arange(steps.length))
        (last, whole), ys = over_blocks(run_one, (self.t_carry, whole), rows, steps, block, False)
        return last, [
            time_on(y, axis) if w is None else w for y, w, axis in zip(ys, whole, axes, strict=True)
        ]

    def _split(self, in_place: bool) -> tuple[Plan, list[Array], set[Var]]:
        """The tangent of one step after fission, its consts, and which variables are tangents."""
        consts = [*self.consts, *self.t_consts]
        values = [row_of(self.rows[i], self.axes.ys[i], 0) for i in self.kept.values()]
        t_xs, xs = (
            [row_of(rows, axis, 0) for rows, axis in zip(*group, strict=True)]
            for group in ((self.t_xs, self.t_axes), (self.xs, self.axes.xs))
        )
        example = [*consts, *self.t_carry, *t_xs, *xs, *self.carry, *values]
        traced = trace(self._step, *example)
        consts = [*traced.consts, *consts]
        count = len(self.t_carry)
        body = simplify(traced.program, len(consts), count, [*traced.consts, *example], True)
        consts = [*body.consts, *consts]
        end, inputs = len(consts), body.program.invars
        start, stop = end - len(self.t_consts), end + count + len(self.t_xs)
        accumulated = frozenset(inputs[start:end])
        plan = fission(body.program, end, count, "tangent", accumulated, in_place)
        return plan, consts, dependents(body.program, inputs[start:stop])

    def _left_in_place(self, plan: Plan) -> list[bool]:
        """Of the states and of what is kept, what can be read one step at a time where it lies.

        That is what no pass reads. Of a state that is kept as it is after each step, the rows that
        a loop reads have to be made.
        """
        in_blocks = set(variables([*plan.tail.invars, *plan.body.outvars]))
        in_blocks = in_blocks.union(*(stage.program.invars for stage in plan.stages))
        in_loops = {v for loop in plan.loops for v in loop.xs}
        inputs = plan.body.invars
        return [
            v not in in_blocks and not (state.late and v in in_loops)
            for v, state in zip(inputs[len(inputs) - len(self.held) :], self.held, strict=True)
        ]

    def _known(self, index: Array, steps: Steps, left: Sequence[bool]) -> list[Any]:
        """What is known of a block of steps: its xs, the carry before each, what is kept.

        All rows are cut but once. So their cotangent is added in place to that of all steps, and is
        not a sum of arrays of that size, one for each block.
        """
        xs = [block_of(x, axis, index) for x, axis in zip(self.xs, self.axes.xs, strict=True)]
        axes = self.axes.ys
        around = {
            i: _around(self.rows[state.rows], axes[state.rows], self.carry[i], index, steps)
            for i, state in enumerate(self.held)
            if state.late
        }
        after = {self.held[i].rows: rows for i, (_, rows) in around.items()}
        for place in {state.rows for state in self.held}.difference(after):
            after[place] = block_of(self.rows[place], axes[place], index)
        kept: list[Any] = []
        for i, (state, in_place) in enumerate(zip(self.held, left, strict=True)):
            whole, rows = self.rows[state.rows], after[state.rows]
            axis = axes[state.rows]
            if in_place and steps.length < whole.shape[axis]:
                kept.append(_Left(InPlace(whole, index, axis), rows))
            else:
                kept.append(around[i][0] if state.late else rows)
        return [*xs, *kept]

    def _step(self, *args: Array) -> list[Array]:
        """The tangents of one step's new carry and y, from everything that it may depend on."""
        consts, t_consts, t_carry, t_xs, xs, states, values = parts(
            args,
            len(self.consts),
            len(self.t_consts),
            len(self.t_carry),
            len(self.t_xs),
            len(self.xs),
            len(self.carry),
        )
        inputs = [*consts, *states, *xs]
        offset = len(consts)
        active = [
            *self.active_consts,
            *(offset + i for i in self.active_carry),
            *(offset + len(states) + i for i in self.active_xs),
        ]

        def outputs(*inputs: Array) -> list[Array]:
            env: dict[Var, Array] = dict(zip(self.program.invars, inputs, strict=True))
            known = dict(zip(self.kept, values, strict=True))
            for equation in self.program.equations:
                operands = [read(env, a) for a in equation.invars]
                results = self._results(equation, operands, known)
                env.update(zip(equation.outvars, results, strict=True))
            ys = [len(self.carry) + i for i in self.active_ys]
            outs = [self.program.outvars[i] for i in (*self.active_carry, *ys)]
            return [jnp.asarray(read(env, out)) for out in outs]

        primals = [inputs[i] for i in active]
        tangents = [*t_consts, *t_carry, *t_xs]
        return jax.jvp(as_function_of(active, outputs, inputs), primals, tangents)[1]

    def _results(
        self, equation: Equation, operands: list[Array], known: Mapping[Var, Array]
    ) -> list[Array]:
        """The results of `equation`; of those that are known only the derivative is made."""
        first = equation.outvars[0]
        if first in self.splits and known.keys() >= set(self.splits[first].outvars):
            return operands  # z, not f(z): what is known are the parts of f(z), by parts of z
        function = self.functions.get(first, equation)
        slope = slope_by_output(function) if known.keys() >= set(equation.outvars) else None
        by_output = slope is not None and function is equation
        origins = operands if by_output else bind(equation, operands)
        derived = {v for v in equation.outvars if v in known and is_inexact(v)}
        return [
            _with_slope(slope or _as_it_is, known[v], origin)
            if v in derived
            else known.get(v, origin)
            for v, origin in zip(equation.outvars, origins, strict=True)
        ]


def _run_loop(
    writer: Writer,
    linear: set[Var],
    loop: Loop,
    consts: list[Array],
    carry: list[Array],
    rows: list[Any],
    steps: Steps,
) -> tuple[list[Array], list[Array]]:
    """Runs a loop of a tangent, the variables `linear` of which are tangents.

    Rows of what its caller wants on another axis than the first are put there step by step.
    """
    if (done := run_otherwise(loop, consts, carry, rows, steps, linear)) is not None:
        return done
    given = [(row.in_place.indices, row.rows) if isinstance(row, _Left) else row for row in rows]
    # Transposition wants the linear inputs first.
    order = sorted(range(len(rows)), key=lambda i: loop.xs[i] not in linear)

    def step(carry: list[Array], x: list[Any]) -> tuple[list[Array], list[Array]]:
        xs = {i: _row(rows[i], value) for i, value in zip(order, x, strict=True)}
        return loop.program.step(consts, carry, [xs[i] for i in range(len(rows))])

    step = jax.checkpoint(step, prevent_cse=False)
    return writer.scan(loop, step, carry, [given[i] for i in order], steps.scan)


def _row(rows: Array | _Left, given: Any) -> Array:
    """The row of one step, from what the loop is given of them."""
    if not isinstance(rows, _Left):
        return given
    index, row = given
    return _differentiated_as(one_row(rows.in_place, index), row)


Slope = Callable[[Array, Array], Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_slope(_slope: Slope, value: Array, _origin: Array) -> Array:
    """`value`, whose derivative is `_slope(value, derivative of _origin)`."""
    return value


@_with_slope.defjvp
def _with_slope_jvp(slope: Slope, primals: Any, tangents: Any) -> Any:
    return primals[0], slope(primals[0], tangents[1])


def _around(
    rows: Array, axis: int, first: Array, index: Array, steps: Steps
) -> tuple[Array, Array]:
    """A carry before and after each step of a block, from the `first` and all that came after."""
    time, length, reverse = rows.shape[axis], len(index), steps.reverse
    if length == time:
        rows = time_first(rows, axis)
        return shifted(rows, first, reverse), rows
    block = block_of(rows, axis, index)
    previous = index[-1] + 1 if reverse else index[0] - 1
    is_first = (previous < 0) | (previous == time)
    edge = jnp.where(is_first, first, row_of(rows, axis, previous))
    # Rows and edge are one slice in what is differentiated. It takes a selection, which XLA does
    # not make as fast.
    start = jnp.clip(index[0] - (0 if reverse else 1), 0, time - length - 1)
    cut = lax.dynamic_slice_in_dim(rows, start, length + 1, axis, allow_negative_indices=False)
    cut = time_first(cut, axis)
    cut = jnp.where(is_first, shifted(cut, first, reverse), cut)
    before, after = (cut[1:], cut[:-1]) if reverse else (cut[:-1], cut[1:])
    earlier = shifted(block, edge, reverse)
    return _differentiated_as(earlier, before), _differentiated_as(block, after)


def _differentiated_as(value: Array, same: Array) -> Array:
    """`value`, which is differentiated as what is the `same` but computed otherwise.

    It must have the right derivative by itself, too: what the first derivative reads of it is
    differentiated as it is.
    """
    return _with_slope(_as_it_is, value, same)


def _as_it_is(_value: Array, tangent: Array) -> Array:
    return tangent
