"""Recurrences affine in the state, run in parallel over time.

    h[t] = a[t] * h[t - 1] + b[t]

Affine functions put one after another are affine again, so that an associative scan has the states
of T steps in about 2 log2(T) rounds of elementwise work (Blelloch, 1990; Martin and Cundy, 2018).
The coefficients may be any function of inputs and parameters, a mask or a reset is a selection
between two of each, and several states may enter one another. States are run one after another
where they can be: what is known of some makes coefficients of others. What is read of states beside
is computed afterwards, for all steps at once. Keys, flags and counts that are not affine are handed
on in a loop of their own.

Zero times infinity is NaN. So beside its coefficient goes, where states are selected or of several
some do not enter each other, whether a state is kept at all: a reset forgets NaN and infinity, too.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._equations import can_run_batched
from jaxrnn._fission import Loop, Plan
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Program,
    Var,
    bind,
    dependents_in_time,
    dtype,
    is_inexact,
    read,
    shape,
    variables,
)
from jaxrnn._primitives import (
    LINEAR_ELEMENTWISE,
    convert_element_type_p,
    div_p,
    mul_p,
    select_n_p,
)
from jaxrnn._schedule import equations_for
from jaxrnn._sharding import placed_as
from jaxrnn._time_axis import shifted

Array = jax.Array
Env = dict[Var, Any]


class _Slope(NamedTuple):
    """The coefficient of a state, and whether it is kept, element by element; None: always."""

    value: Array
    kept: Array | None


Matrix = list[list[_Slope]]
Sums = list[Array]


class NotAffineError(ValueError):
    """Why a recurrence has to run step by step."""

    def __init__(self, what: str):
        """Says it to the user."""
        super().__init__(
            f"method='parallel': {what}. Expected states that are scaled, added to and selected, "
            f"element by element; run others with method='sequential'."
        )


class _System(NamedTuple):
    """States that enter one another, and what makes the new ones of the old ones.

    Attributes:
        program: the loop's.
        states: which of the loop's carries.
        old: their variables before a step.
        new: what stands for them after it.
        equations: from `old` and from what is known to `new`.
        affine: the variables that are affine in `old`; none if the states have to run in order.
    """

    program: Program
    states: tuple[int, ...]
    old: tuple[Var, ...]
    new: tuple[Atom, ...]
    equations: list[Equation]
    affine: set[Var]


class _Parts(NamedTuple):
    """The states of a loop in an order in which they can be had, and what makes the `rest`."""

    systems: list[_System]
    rest: list[Var]
    equations: list[Equation]


def is_parallel(plan: Plan, method: str) -> bool:
    """Whether recurrences are to be run in parallel.

    Raises:
        ValueError: if this is asked for and one is not affine.
    """
    if method != "parallel":
        return False
    loops = list(filter(_has_floats, plan.loops))
    for loop in loops:
        _parts(loop)
    return bool(loops)


def run_affine(
    loop: Loop,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    length: int,
    reverse: bool,
) -> tuple[list[Array], list[Array]] | None:
    """Runs a loop in parallel over time; JAX differentiates it as it is.

    Args:
        loop: the recurrence.
        consts: the same at every step.
        carry: the first carry.
        xs: arrays with a row per step.
        length: the number of steps.
        reverse: whether the last step comes first.

    Returns:
        The last carry, and ys with a row per step; or None for a loop that has to be one.
    """
    if not _has_floats(loop):
        return None
    try:
        parts = _parts(loop)
    except NotAffineError:  # only what came of a recurrence that is affine, its tangent perhaps
        return None
    program, count = loop.program, len(loop.consts)
    fixed: Env = dict(zip(program.invars, consts, strict=False))
    rows: Env = dict(zip(program.invars[count + len(carry) :], xs, strict=True))
    last: dict[int, Array] = {}
    for system in parts.systems:
        first = [carry[i] for i in system.states]
        run = _run_at_once if system.affine else _run_in_order
        states = run(system, fixed, rows, first, length, reverse)
        variables_of = zip(system.states, system.old, system.new, strict=True)
        for (i, old, new), start, after in zip(variables_of, first, states, strict=True):
            last[i] = after[0 if reverse else -1]
            rows[old] = shifted(after, start, reverse)
            if isinstance(new, Var) and new not in fixed:
                rows.setdefault(new, after)
    given = _read_of(parts.equations, parts.rest, rows)

    def rest(_: Array, *values: Any) -> list[Array]:
        made = program.cut([*fixed, *given], parts.rest, parts.equations)
        return made.run(*fixed.values(), *values)

    made = jax.vmap(rest)(jnp.arange(length), *(rows[v] for v in given))
    rows |= dict(zip(parts.rest, made, strict=True))
    outs = program.outvars[len(carry) :]
    return [last[i] for i in range(len(carry))], [read(rows, v) for v in outs]


def _run_in_order(
    system: _System, fixed: Env, rows: Env, first: Sequence[Array], length: int, reverse: bool
) -> list[Array]:
    """The states after each step, by a loop over them alone."""
    given = _read_of(system.equations, system.new, rows)
    step = system.program.cut([*fixed, *system.old, *given], system.new, system.equations)

    def run(states: list[Array], values: list[Array]) -> tuple[list[Array], list[Array]]:
        new = step.run(*fixed.values(), *states, *values)
        return new, new

    return lax.scan(run, list(first), [rows[v] for v in given], length, reverse)[1]


def _run_at_once(
    system: _System, fixed: Env, rows: Env, first: Sequence[Array], length: int, reverse: bool
) -> list[Array]:
    """The states after each step, from the `first` ones and the `rows` of all that is known."""
    given = _read_of(system.equations, system.new, rows)
    start = length - 1 if reverse else 0

    def of_step(index: Array, *values: Any) -> tuple[Matrix, Sums]:
        slopes, sums = _coefficients(system, fixed | dict(zip(given, values, strict=True)))
        begun = _applied(slopes, first, sums)
        return slopes, [jnp.where(index == start, x, b) for x, b in zip(begun, sums, strict=True)]

    with jax.numpy_dtype_promotion("standard"):  # states may have several dtypes
        functions = jax.vmap(of_step)(jnp.arange(length), *(rows[v] for v in given))
        if not system.affine.isdisjoint(variables(system.new)):
            functions = lax.associative_scan(_composed, functions, reverse=reverse)
    states: list[Array] = functions[1]
    return states


def _composed(first: tuple[Matrix, Sums], second: tuple[Matrix, Sums]) -> tuple[Matrix, Sums]:
    """One affine function after another."""
    (inner, before), (outer, after) = first, second
    columns = list(zip(*inner, strict=True))
    matrix = [[_after(row, column) for column in columns] for row in outer]
    return matrix, _applied(outer, before, after)


def _after(row: Sequence[_Slope], column: Sequence[_Slope]) -> _Slope:
    """An element of the product of two matrices."""
    pairs = list(zip(row, column, strict=True))
    terms = [a.value * b.value for a, b in pairs]
    both = [a.kept & b.kept for a, b in pairs if a.kept is not None and b.kept is not None]
    if both:
        terms = [_where(kept, term) for kept, term in zip(both, terms, strict=True)]
    value = functools.reduce(operator.add, terms).astype(row[0].value.dtype)
    return _Slope(value, functools.reduce(operator.or_, both) if both else None)


def _applied(matrix: Matrix, column: Sequence[Array], sums: Sums) -> Sums:
    """A matrix times a column, and `sums`. States of several dtypes keep theirs."""
    return [
        functools.reduce(operator.add, map(_scaled, row, column), b).astype(b.dtype)
        for row, b in zip(matrix, sums, strict=True)
    ]


def _scaled(slope: _Slope, state: Array) -> Array:
    product = slope.value * state
    return product if slope.kept is None else _where(slope.kept, product)


def _where(kept: Array, value: Array) -> Array:
    return jnp.where(kept, value, jnp.zeros_like(value))


def _coefficients(system: _System, env: Env) -> tuple[Matrix, Sums]:
    """How the new states of one step depend on the old ones, from all else that is known."""
    affine, count = system.affine, len(system.old)
    env = env | {v: _full(v, 0) for v in system.old}
    slopes = {v: {i: _Slope(_full(v, 1), _full(v, True, bool))} for i, v in enumerate(system.old)}
    for equation in system.equations:
        operands = [read(env, atom) for atom in equation.invars]
        env |= zip(equation.outvars, bind(equation, operands), strict=True)
        if affine.isdisjoint(equation.outvars):
            continue
        parts = [slopes.get(a, {}) if isinstance(a, Var) else {} for a in equation.invars]
        (made,) = equation.outvars
        slopes[made] = {
            i: _slope(equation, operands, parts, i)
            for i in range(count)
            if any(i in part for part in parts)
        }
    # Without selections each of them is kept for good, if all enter one another.
    selects = any(e.primitive is select_n_p for e in system.equations)
    is_kept = count == 1 and not selects and not affine.isdisjoint(variables(system.new))
    sums, matrix = [], []
    for new, old in zip(system.new, system.old, strict=True):
        found = slopes.get(new, {}) if isinstance(new, Var) else {}
        none = _Slope(_full(old, 0), _full(old, False, bool))
        row = [found.get(i, none) for i in range(count)]
        matrix.append([_Slope(slope.value, None) for slope in row] if is_kept else row)
        sums.append(jnp.broadcast_to(read(env, new), shape(old)))
    return matrix, sums


def _slope(
    equation: Equation, operands: Sequence[Any], parts: Sequence[dict[int, _Slope]], state: int
) -> _Slope:
    """How what an equation makes depends on a state, from how its operands do."""
    values, flags = [], []
    for k, (part, operand, atom) in enumerate(zip(parts, operands, equation.invars, strict=True)):
        other = operand if _scales(equation, k) else _full(atom, 0)
        values.append(part[state].value if state in part else other)
        flag = part[state].kept if state in part else None
        flags.append(_full(equation.outvars[0], False, bool) if flag is None else flag)
    (value,) = bind(equation, values)
    if equation.primitive is select_n_p:
        return _Slope(value, lax.select_n(operands[0], *flags[1:]))
    return _Slope(value, functools.reduce(operator.or_, flags))


def _has_floats(loop: Loop) -> bool:
    olds = loop.program.invars[len(loop.consts) :][: len(loop.carry)]
    return any(is_inexact(v) for v in olds)


def _parts(loop: Loop) -> _Parts:
    """How a loop is run, most of it for all steps at once.

    Raises:
        NotAffineError: if it must run step by step.
    """
    program, consts, carry = loop.program, len(loop.consts), len(loop.carry)
    olds = program.invars[consts : consts + carry]
    known = set(program.invars).difference(olds)
    systems = []
    for states in _groups(program, consts, carry):
        old = tuple(olds[i] for i in states)
        new = tuple(program.outvars[i] for i in states)
        equations = equations_for(program, variables(new), known)
        try:
            affine = _affine_in(equations, old)
        except NotAffineError:
            if any(is_inexact(v) for v in old):
                raise
            affine = set()
        systems.append(_System(program, states, old, new, equations, affine))
        known.update(old, variables(new))
    rest = [v for v in variables(program.outvars[carry:]) if v not in known]
    equations = equations_for(program, rest, known)
    _check_batched(equations)
    return _Parts(systems, rest, equations)


def _affine_in(equations: Sequence[Equation], old: Sequence[Var]) -> set[Var]:
    """The variables affine in `old` among those that the equations make."""
    if not all(jnp.issubdtype(dtype(v), jnp.number) for v in old):
        raise NotAffineError("a random key or a truth value is handed on from step to step")
    _check_batched(equations)
    affine = set(old)
    for equation in equations:
        if not affine.isdisjoint(variables(equation.invars)):
            _check(equation, affine)
            affine.update(equation.outvars)
    return affine


def _check_batched(equations: Iterable[Equation]) -> None:
    """Raises a NotAffineError if one of the equations is not to be run for all steps at once."""
    for equation in equations:
        if not can_run_batched(equation):
            raise NotAffineError(f"{equation.primitive} is not run for many steps at once")


def _groups(program: Program, consts: int, carry: int) -> list[tuple[int, ...]]:
    """The carries in groups of such as enter one another, each after those that enter it."""
    olds = program.invars[consts : consts + carry]
    reached = [dependents_in_time(program, [old], consts, carry) for old in olds]
    reaches = [[i for i, old in enumerate(olds) if old in found] for found in reached]
    groups = {tuple(j for j in reaches[i] if i in reaches[j]) for i in range(carry)}
    return sorted(groups, key=lambda group: (sum(group[0] in found for found in reaches), group))


def _check(equation: Equation, affine: set[Var]) -> None:
    """Raises a NotAffineError if the results are not affine, element by element, in `affine`."""
    primitive = equation.primitive
    places = [k for k, a in enumerate(equation.invars) if isinstance(a, Var) and a in affine]
    fits = primitive in LINEAR_ELEMENTWISE
    if primitive is mul_p:
        fits = len(places) == 1
    elif primitive is div_p:
        fits = places == [0] and is_inexact(equation.outvars[0])
    elif primitive is select_n_p:
        fits = 0 not in places
    elif primitive is convert_element_type_p:
        old, new = dtype(equation.invars[0]), dtype(equation.outvars[0])
        both = all(jnp.issubdtype(each, jnp.floating) for each in (old, new))
        with jax.numpy_dtype_promotion("standard"):
            fits = both or jnp.promote_types(old, new) == new
    if not fits:
        raise NotAffineError(f"{primitive} of the state is handed on from step to step")


def _scales(equation: Equation, place: int) -> bool:
    """Whether an operand that is the same for any state scales the others, and is no term."""
    return equation.primitive in (mul_p, div_p) or (equation.primitive is select_n_p and place == 0)


def _read_of(equations: Iterable[Equation], outs: Iterable[Atom], rows: Env) -> list[Var]:
    """The variables that have rows among those that are read."""
    read_of = variables([*(a for e in equations for a in e.invars), *outs])
    return [v for v in read_of if v in rows]


def _full(atom: Atom, value: int, of: Any = None) -> Array:
    """An array of the atom's type, full of one value; or of another dtype, that of `of`."""
    return placed_as(jnp.full(shape(atom), value, of or dtype(atom)), atom.aval)
