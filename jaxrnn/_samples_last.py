"""Recurrences whose samples lie on the last axis: `W @ h` for `h @ W`.

For a product of a few rows and a large matrix, XLA on a CPU first brings the matrix into the order
in which it will read it, at every step anew. A matrix on the left is read as it lies. So a loop
with such products holds its states transposed, and all that it makes of them.

Then products of few rows are fast, too, and passes over blocks gain nothing any more: results are
made in one loop over all time. The loop of a tangent stays one among passes, for these are the
gradients of the weights. What a pass hands to it is transposed for a block at once, what it hands
on is transposed step by step.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._block import Steps
from jaxrnn._choice import samples_last_pay
from jaxrnn._equations import column_ranges, multiply_adds, product_options, take_ranges
from jaxrnn._fission import Loop, Plan, Purpose, Stage
from jaxrnn._gains import take_all_cores
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Program,
    Var,
    at,
    bind,
    dependents,
    dtype,
    is_weak,
    parts,
    read,
    shape,
    size,
    size_in_bytes,
    trace,
    variables,
)
from jaxrnn._kernel import without_calls
from jaxrnn._primitives import (
    ELEMENTWISE,
    PRODUCTS,
    REDUCTIONS,
    broadcast_in_dim_p,
    concatenate_p,
    dot_general_p,
    transpose_p,
)
from jaxrnn._samples_last_form import Form
from jaxrnn._sharding import is_placed

Array = jax.Array


class _CannotTransposeError(Exception):
    """A loop does what its values would have to be transposed for."""


class _Derived(NamedTuple):
    """A variable that is made of another one."""

    source: Var
    equations: tuple[Equation, ...]
    variable: Var


class _Turning(NamedTuple):
    """A loop with the samples last, and what it takes that is new."""

    loop: Loop
    consts: list[_Derived]
    rows: list[_Derived]


def with_samples_last(plan: Plan, steps: Steps) -> Plan | None:
    """`plan` without a pass before its one loop, with the samples last in that, if this pays.

    Beside a readout results alone gain less: it would wait for the loop, and run block by block.
    """
    with_loop = [i for i, stage in enumerate(plan.stages) if stage.loop is not None]
    if steps.loop_method != "sequential" or not steps.adapts or with_loop != [0]:
        return None
    (program, loop), *after = plan.stages
    assert loop is not None
    times, count = plan.times, len(loop.consts)
    states = loop.program.invars[count : count + len(loop.carry)]
    read = {*variables(plan.body.outvars), *plan.tail.invars}
    read |= {v for stage in after for v in stage.program.invars}
    made = [v for v in variables(program.outvars) if v in read]
    taken = [
        v
        for v in dict.fromkeys([*program.invars, *loop.consts, *loop.xs])
        if v not in program.outvars
    ]
    consts = tuple(v for v in taken if times[v] == -1)
    xs = tuple(v for v in taken if times[v] != -1)
    step = program.cut(
        [*consts, *states, *xs],
        [*loop.program.outvars, *made],
        [*program.equations, *loop.program.equations],
    )
    # Whoever differentiates does so by a rule of the whole: those of inner functions do not count.
    spelled_out = without_calls(step)
    if spelled_out is None:
        return None
    ys = (*loop.ys, *made)
    whole = loop._replace(program=spelled_out, consts=consts, xs=xs, ys=ys)
    readouts = [e for stage in after for e in stage.program.equations if multiply_adds(e)]
    has_pass = take_all_cores(program.equations) or (plan.purpose == "results" and bool(readouts))
    turned = _turned(whole, plan.purpose, has_pass)
    if turned is None:
        return None
    return plan._replace(
        invariant=_with(plan.invariant, turned.consts),
        stages=(Stage(program.cut((), (), ()), turned.loop), *after),
        times=times | _times(turned, 1),
    )


def tangent_with_samples_last(plan: Plan, steps: Steps) -> Plan:
    """`plan` of a tangent, with the samples last in those of its loops where that pays."""
    if steps.loop_method != "sequential":
        return plan
    stages, times, invariant = [], dict(plan.times), plan.invariant
    for stage in plan.stages:
        turned = _turned(stage.loop, "tangent") if stage.loop is not None else None
        if turned is None:
            stages.append(stage)
            continue
        assert stage.loop is not None
        when = max(times[v] for v in variables(stage.loop.program.outvars))
        times |= _times(turned, when)
        invariant = _with(invariant, turned.consts)
        stages.append(Stage(_with(stage.program, turned.rows), turned.loop))
    return plan._replace(invariant=invariant, stages=tuple(stages), times=times)


def _times(turned: _Turning, when: int) -> dict[Var, int]:
    """The times of what is new with a loop that runs at `when`."""
    program, count = turned.loop.program, len(turned.loop.consts)
    inside = [*program.invars, *(v for e in program.equations for v in e.outvars)]
    new = dict.fromkeys(inside, when) | dict.fromkeys(program.invars[:count], -1)
    new |= {each.variable: -1 for each in turned.consts}
    return new | {each.variable: when - 1 for each in turned.rows}


def _with(program: Program, derived: Sequence[_Derived]) -> Program:
    """`program`, which also makes what is `derived` of its variables or of others."""
    known = {*program.invars, *(v for e in program.equations for v in e.outvars)}
    return program.cut(
        [*program.invars, *(each.source for each in derived if each.source not in known)],
        [*program.outvars, *(each.variable for each in derived)],
        [*program.equations, *(e for each in derived for e in each.equations)],
    )


def _turned(loop: Loop, purpose: Purpose, has_pass: bool = False) -> _Turning | None:
    """A loop with the samples last, if that fits and pays."""
    for is_even in (True, False):
        samples = _samples(loop, purpose, is_even, has_pass)
        if samples is None:
            return None
        try:
            return _in_form(loop, Form(samples, is_even), purpose == "tangent")
        except _CannotTransposeError:
            continue
    return None


def _in_form(loop: Loop, form: Form, is_tangent: bool) -> _Turning:
    """A loop that holds its arrays in a form.

    Raises:
        _CannotTransposeError: if it cannot.
    """
    n, m = len(loop.consts), len(loop.consts) + len(loop.carry)
    inputs = loop.program.invars
    states = [v for v in inputs[n:m] if len(shape(v)) == 2]
    weights = variables(e.invars[1] for e in loop.program.equations if e.primitive is dot_general_p)
    met = variables(
        a
        for e in loop.program.equations
        if e.primitive not in (dot_general_p, transpose_p)
        for a in e.invars
        if len(shape(a)) == 2 and shape(a)[1] > 1
    )
    fixed = [v for v in inputs[:n] if v in met and shape(v)[0] in (1, form.samples)]
    moved = [v for v in inputs[m:] if v in met and shape(v)[0] == form.samples and is_tangent]
    outside = dict(zip([*inputs[:n], *inputs[m:]], [*loop.consts, *loop.xs], strict=True))
    consts = [
        *(_derived(outside[v], jnp.transpose) for v in weights),
        *(_derived(outside[v], form.hold) for v in fixed),
    ]
    rows = [_derived(outside[v], form.hold) for v in moved]
    taken = dict(zip(moved, (each.variable for each in rows), strict=True))

    def step(*args: Array) -> list[Array]:
        given, across, others, varying = parts(args, n, len(weights), len(fixed))
        env: dict[Atom, Any] = dict(zip(inputs, [*given, *varying], strict=True))
        env |= {v: _Held(env[v]) for v in [*states, *moved]}
        env |= {v: _Held(x) for v, x in zip(fixed, others, strict=True)}
        return _Step(form, is_tangent, env, dict(zip(weights, across, strict=True))).run(loop)

    types = [
        *map(_type, [*inputs[:n], *(each.variable for each in consts)]),
        *(jax.eval_shape(form.hold, _type(v)) if v in states else _type(v) for v in inputs[n:m]),
        *(_type(taken.get(v, v)) for v in inputs[m:]),
    ]
    traced = trace(step, *types)
    if traced.consts:
        raise _CannotTransposeError
    turned = loop._replace(
        program=traced.program,
        consts=(*loop.consts, *(each.variable for each in consts)),
        xs=tuple(taken.get(old, v) for old, v in zip(inputs[m:], loop.xs, strict=True)),
        form=form,
    )
    return _Turning(turned, consts, rows)


class _Held(NamedTuple):
    """A value `[samples, units]`, as the loop holds it."""

    array: Array


class _Step:
    """One step of a loop, on values that are held in a form as long as possible."""

    def __init__(
        self, form: Form, is_tangent: bool, env: dict[Atom, Any], across: Mapping[Var, Array]
    ):
        """Says what the step is given.

        Args:
            form: how arrays are held.
            is_tangent: whether the step will be transposed by JAX.
            env: the values of the inputs.
            across: the transposes of the matrices that states are multiplied with.
        """
        self.form, self.is_tangent, self.env, self.across = form, is_tangent, env, across

    def run(self, loop: Loop) -> list[Array]:
        """The new carry and ys."""
        for equation in loop.program.equations:
            operands = [read(self.env, atom) for atom in equation.invars]
            with at(equation):
                results = self._results(equation, operands)
            self.env.update(zip(equation.outvars, results, strict=True))
        count = len(loop.carry)
        outs = [read(self.env, atom) for atom in loop.program.outvars]
        new = [
            self._held(atom, x) if len(shape(atom)) == 2 else x
            for atom, x in zip(loop.program.outvars, outs[:count], strict=False)
        ]
        return [*new, *map(self._plain, loop.program.outvars[count:], outs[count:])]

    def _results(self, equation: Equation, operands: list[Any]) -> list[Any]:
        primitive, params, form = equation.primitive, equation.params, self.form
        if primitive is dot_general_p:
            return [self._product(equation, *operands)]
        if primitive is broadcast_in_dim_p and self._is_whole(equation.outvars[0]):
            return [self._broadcast(equation, operands[0])]
        if not any(isinstance(x, _Held) for x in operands):
            return bind(equation, operands)
        if primitive in ELEMENTWISE:
            results = bind(equation, self._alike(equation, operands))
        elif (cuts := column_ranges(equation)) is not None:
            results = take_ranges(operands[0].array, form.ranges(cuts), form.axis)
        elif primitive is concatenate_p and params["dimension"] == 1:
            held = [self._held(a, x) for a, x in zip(equation.invars, operands, strict=True)]
            results = [lax.concatenate(held, form.axis)]
        elif primitive is transpose_p and self._is_whole(equation.invars[0]):
            return [form.release(operands[0].array).T]
        elif primitive in REDUCTIONS and self._is_whole(equation.invars[0]) and not form.is_even:
            axes = tuple(1 - axis for axis in params["axes"])
            return [primitive.bind(operands[0].array, **(params | {"axes": axes}))]
        else:
            raise _CannotTransposeError
        return list(map(_Held, results))

    def _product(self, equation: Equation, rows: Any, matrix: Array) -> _Held:
        """`matrix.T @ rows.T`, written as a product of rows: XLA sees through the transposes.

        What runs reads the matrix as it lies: this product, or that of a tangent's transpose.
        """
        rows = self._plain(equation.invars[0], rows)
        (_, (axis,)), _ = equation.params["dimension_numbers"]
        wanted = 0 if self.is_tangent else 1
        matrix = matrix if axis == wanted else read(self.across, equation.invars[1])
        numbers = (((1,), (wanted,)), ((), ()))
        options = product_options(equation, swapped=False)
        return _Held(self.form.hold(lax.dot_general(rows, matrix, numbers, **options)))

    def _broadcast(self, equation: Equation, operand: Any) -> _Held:
        """One number, or one for each sample or unit, for all of them."""
        places, lengths = (equation.params[name] for name in ("broadcast_dimensions", "shape"))
        if isinstance(operand, _Held) and shape(equation.invars[0])[1] == lengths[1]:
            return operand
        if not self.form.is_even:
            plain = self._plain(equation.invars[0], operand)
            return _Held(lax.broadcast_in_dim(plain, lengths, places).T)
        if places:
            raise _CannotTransposeError
        return _Held(jnp.broadcast_to(operand, (1, math.prod(lengths))))

    def _alike(self, equation: Equation, operands: Sequence[Any]) -> list[Array]:
        """The operands of elementwise work, as they are held."""
        held = [self._held(a, x) for a, x in zip(equation.invars, operands, strict=True)]
        whole = size(equation.outvars[0])
        if self.form.is_even and any(jnp.size(x) not in (1, whole) for x in held):
            raise _CannotTransposeError
        return held

    def _held(self, atom: Atom, operand: Any) -> Array:
        if isinstance(operand, _Held):
            return operand.array
        if not shape(atom):
            return operand
        if self._is_whole(atom):
            return self.form.hold(operand)
        if len(shape(atom)) != 2 or self.form.is_even:
            raise _CannotTransposeError
        return operand.T

    def _is_whole(self, atom: Atom) -> bool:
        """Whether an array has a row of units for each of the samples."""
        return len(shape(atom)) == 2 and shape(atom)[0] == self.form.samples and shape(atom)[1] > 1

    def _plain(self, atom: Atom, value: Any) -> Array:
        if not isinstance(value, _Held):
            return value
        released = self.form.release(value.array)
        is_lone = shape(atom)[0] == 1  # and held for each of the samples
        return released[:1] if is_lone else released


def _samples(loop: Loop, purpose: Purpose, is_even: bool, has_pass: bool) -> int | None:
    """The number of samples of a loop, if they had better be last."""
    n = len(loop.consts)
    consts = loop.program.invars[:n]
    states = [v for v in loop.program.invars[n : n + len(loop.carry)] if shape(v)]
    products = [e for e in loop.program.equations if e.primitive in PRODUCTS]
    if not products or not all(_is_rows_times_matrix(e, consts) for e in products):
        return None
    if any(is_placed(v.aval) for v in loop.program.invars):
        return None
    rows = {shape(v)[0] for v in [*states, *(e.invars[0] for e in products)]}
    if len(rows) > 1 or any(len(shape(v)) > 2 for v in states):
        return None
    (samples,) = rows
    weights = sum(map(size_in_bytes, variables(e.invars[1] for e in products)))
    recurrent = dependents(loop.program, states)
    of_states = [e for e in products if e.invars[0] in recurrent]
    taken = sum(shape(e.invars[0])[1] for e in of_states)
    has_gates = 2 * sum(shape(e.outvars[0])[1] for e in of_states) >= 3 * taken > 0
    pays = samples_last_pay(samples, weights, has_gates, purpose, is_even, has_pass)
    return samples if pays else None


def _is_rows_times_matrix(equation: Equation, consts: Sequence[Var]) -> bool:
    if equation.primitive is not dot_general_p:
        return False
    lhs, rhs = equation.invars
    (contracted, over), (batch, _) = equation.params["dimension_numbers"]
    return (
        rhs in consts
        and (len(shape(lhs)), len(shape(rhs))) == (2, 2)
        and (batch, tuple(contracted), len(over)) == ((), (1,), 1)
        and all(isinstance(n, int) and n > 1 for n in shape(rhs))
    )


def _derived(v: Var, f: Callable[[Array], Array]) -> _Derived:
    """`f(v)` as a variable."""
    # A function of its own, or JAX would give the same variables again for another `v` alike.
    program = trace(functools.partial(f), _type(v)).program
    (old,), (out,) = program.invars, program.outvars
    assert isinstance(out, Var)
    equations = tuple(
        e.replace(invars=[v if a is old else a for a in e.invars]) for e in program.equations
    )
    return _Derived(v, equations, out)


def _type(v: Var) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape(v), dtype(v), weak_type=is_weak(v))
