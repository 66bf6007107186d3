"""Recurrences affine in the state, run in parallel over time.

    h[t] = a[t] * h[t - 1] + b[t]

Affine functions put one after another are affine again, so that an associative scan has the states
of T steps in about 2 log2(T) rounds of elementwise work (Blelloch, 1990; Martin and Cundy, 2018).
The coefficients may be any function of inputs and parameters, a mask or a reset is a selection
between two of each, and several states may enter one another. States are run one after another
where they can be: what is known of some makes coefficients of others. What is read of states beside
is computed afterwards, for all steps at once. Loops over keys and counts alone stay loops.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._fission import Loop, Plan
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Program,
    Var,
    bind,
    dependents_in_time,
    dtype,
    read,
    shape,
    variables,
)
from jaxrnn._passes import shifted
from jaxrnn._placement import placed_as
from jaxrnn._primitives import (
    LINEAR_BY_ELEMENT,
    convert_element_type_p,
    div_p,
    mul_p,
    select_n_p,
)
from jaxrnn._schedule import equations_for

Array = jax.Array
Env = dict[Var, Any]
Matrix = list[list[Array]]
Sums = list[Array]


class _System(NamedTuple):
    """States that enter one another, and what makes the new ones of the old ones.

    Attributes:
        states: which of the loop's carries.
        old: their variables before a step.
        new: what stands for them after it.
        equations: from `old` and from what is known to `new`.
        moving: the variables that are affine in `old`.
    """

    states: tuple[int, ...]
    old: tuple[Var, ...]
    new: tuple[Atom, ...]
    equations: list[Equation]
    moving: set[Var]


def is_parallel(plan: Plan, method: str) -> bool:
    """Whether recurrences are to be run in parallel.

    Raises:
        ValueError: if this is asked for and one is not affine.
    """
    if method != "parallel":
        return False
    loops = list(filter(_has_floats, plan.loops))
    for loop in loops:
        _systems(loop)
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
        The last carry, and ys with a row per step; or None for a loop that may stay one.

    Raises:
        ValueError: if it must run step by step.
    """
    if not _has_floats(loop):
        return None
    program, count = loop.program, len(loop.consts)
    fixed: Env = dict(zip(program.invars, consts, strict=False))
    rows: Env = dict(zip(program.invars[count + len(carry) :], xs, strict=True))
    last: dict[int, Array] = {}
    for system in _systems(loop):
        first = [carry[i] for i in system.states]
        states = _run(system, fixed, rows, first, length, reverse)
        for i, old, new, start, after in zip(*system[:3], first, states, strict=True):
            last[i] = after[0 if reverse else -1]
            rows[old] = shifted(after, start, reverse)
            if isinstance(new, Var) and new not in fixed:
                rows.setdefault(new, after)
    outs = program.outvars[len(carry) :]
    missing = [v for v in variables(outs) if v not in rows]
    found = equations_for(program, missing, rows)
    given = _read_of(found, missing, rows)

    def rest(_: Array, *values: Any) -> list[Array]:
        return program.cut([*fixed, *given], missing, found).run(*fixed.values(), *values)

    made = jax.vmap(rest)(jnp.arange(length), *(rows[v] for v in given))
    rows |= dict(zip(missing, made, strict=True))
    return [last[i] for i in range(len(carry))], [read(rows, v) for v in outs]


def _run(
    system: _System, fixed: Env, rows: Env, first: Sequence[Array], length: int, reverse: bool
) -> list[Array]:
    """The states after each step, from the `first` ones and the `rows` of all that is known."""
    given = _read_of(system.equations, system.new, rows)
    start = length - 1 if reverse else 0

    def of_step(index: Array, *values: Any) -> tuple[Matrix, Sums]:
        slopes, sums = _coefficients(system, fixed | dict(zip(given, values, strict=True)))
        begun = [b + _product(row, first) for row, b in zip(slopes, sums, strict=True)]
        sums = [jnp.where(index == start, x, b) for x, b in zip(begun, sums, strict=True)]
        return slopes, sums

    functions = jax.vmap(of_step)(jnp.arange(length), *(rows[v] for v in given))
    if not system.moving.isdisjoint(variables(system.new)):
        functions = lax.associative_scan(_composed, functions, reverse=reverse)
    states: list[Array] = functions[1]
    return states


def _composed(first: tuple[Matrix, Sums], second: tuple[Matrix, Sums]) -> tuple[Matrix, Sums]:
    """One affine function after another."""
    (inner, before), (outer, after) = first, second
    columns = list(zip(*inner, strict=True))
    matrix = [[_product(row, column) for column in columns] for row in outer]
    return matrix, [b + _product(row, before) for row, b in zip(outer, after, strict=True)]


def _product(row: Sequence[Array], column: Sequence[Array]) -> Array:
    total, *others = (a * b for a, b in zip(row, column, strict=True))
    return sum(others, start=total)


def _coefficients(system: _System, env: Env) -> tuple[Matrix, Sums]:
    """How the new states of one step depend on the old ones, from all else that is known."""
    env = env | {v: _full(v, 0) for v in system.old}
    slopes = {v: {i: _full(v, 1)} for i, v in enumerate(system.old)}
    for equation in system.equations:
        operands = [read(env, atom) for atom in equation.invars]
        env |= zip(equation.outvars, bind(equation, operands), strict=True)
        if system.moving.isdisjoint(equation.outvars):
            continue
        parts = [slopes.get(a, {}) if isinstance(a, Var) else {} for a in equation.invars]
        (made,) = equation.outvars
        slopes[made] = {}
        for i in {i for part in parts for i in part}:
            terms = [
                part[i] if i in part else value if _scales(equation, k) else _full(atom, 0)
                for k, (part, value, atom) in enumerate(
                    zip(parts, operands, equation.invars, strict=True)
                )
            ]
            (slopes[made][i],) = bind(equation, terms)
    sums, matrix = [], []
    for new, old in zip(system.new, system.old, strict=True):
        found = slopes.get(new, {}) if isinstance(new, Var) else {}
        matrix.append([found[i] if i in found else _full(old, 0) for i in range(len(system.old))])
        sums.append(jnp.broadcast_to(read(env, new), shape(old)))
    return matrix, sums


def _has_floats(loop: Loop) -> bool:
    olds = loop.program.invars[len(loop.consts) :][: len(loop.carry)]
    return any(jnp.issubdtype(dtype(v), jnp.inexact) for v in olds)


def _systems(loop: Loop) -> list[_System]:
    """The states of a loop in an order in which they can be had."""
    program, consts, carry = loop.program, len(loop.consts), len(loop.carry)
    olds = program.invars[consts : consts + carry]
    if not all(jnp.issubdtype(dtype(v), jnp.number) for v in olds):
        raise _not_affine("a random key or a truth value")
    known = set(program.invars).difference(olds)
    systems = []
    for states in _groups(program, consts, carry):
        old = tuple(olds[i] for i in states)
        new = tuple(program.outvars[i] for i in states)
        equations = equations_for(program, variables(new), known)
        moving = set(old)
        for equation in equations:
            if not moving.isdisjoint(variables(equation.invars)):
                _check(equation, moving)
                moving.update(equation.outvars)
        systems.append(_System(states, old, new, equations, moving))
        known.update(old, variables(new))
    return systems


def _groups(program: Program, consts: int, carry: int) -> list[tuple[int, ...]]:
    """The carries in groups of such as enter one another, each after those that enter it."""
    olds = program.invars[consts : consts + carry]
    reached = [dependents_in_time(program, [old], consts, carry) for old in olds]
    reaches = [[i for i, old in enumerate(olds) if old in found] for found in reached]
    groups = {tuple(j for j in reaches[i] if i in reaches[j]) for i in range(carry)}
    return sorted(groups, key=lambda group: (sum(group[0] in found for found in reaches), group))


def _check(equation: Equation, moving: set[Var]) -> None:
    """Raises a ValueError if the results are not affine, element by element, in `moving`."""
    primitive = equation.primitive
    places = [k for k, a in enumerate(equation.invars) if isinstance(a, Var) and a in moving]
    fits = primitive in LINEAR_BY_ELEMENT
    if primitive is mul_p:
        fits = len(places) == 1
    elif primitive is div_p:
        fits = places == [0] and jnp.issubdtype(dtype(equation.outvars[0]), jnp.inexact)
    elif primitive is select_n_p:
        fits = 0 not in places
    elif primitive is convert_element_type_p:
        old, new = dtype(equation.invars[0]), dtype(equation.outvars[0])
        both = all(jnp.issubdtype(each, jnp.floating) for each in (old, new))
        fits = both or jnp.promote_types(old, new) == new
    if not fits:
        raise _not_affine(f"{primitive} of the state")


def _not_affine(what: str) -> ValueError:
    return ValueError(
        f"method='parallel': {what} is handed on from step to step. Expected states that are "
        f"scaled, added to and selected, element by element; run others with method='sequential'."
    )


def _scales(equation: Equation, place: int) -> bool:
    """Whether an operand that is the same for any state scales the others, and is no term."""
    return equation.primitive in (mul_p, div_p) or (equation.primitive is select_n_p and place == 0)


def _read_of(equations: Iterable[Equation], outs: Iterable[Atom], rows: Env) -> list[Var]:
    """The variables that have rows among those that are read."""
    read_of = variables([*(a for e in equations for a in e.invars), *outs])
    return [v for v in read_of if v in rows]


def _full(atom: Atom, value: int) -> Array:
    """An array of the atom's type, full of one value."""
    return placed_as(jnp.full(shape(atom), value, dtype(atom)), atom.aval)
