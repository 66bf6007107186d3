"""What a step keeps for its derivative.

All that the tangent of a step needs is kept by the steps, in rows: the states, and the sums that
products enter into (a nonlinear operation needs the sum, not its terms), or what a tanh or logistic
function makes of such a sum, where this tells its derivative; and few numbers made of many, such as
maxima and sums. The rest is computed again.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from jaxrnn._checkpoints import not_to_be_kept
from jaxrnn._equations import is_free, is_heavy, is_linear, is_slow, slope_by_output
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Program,
    Var,
    dependents_in_time,
    is_inexact,
    size,
    size_in_bytes,
    variables,
    with_derivative,
)
from jaxrnn._primitives import (
    COMPARISONS,
    EXTREMES,
    INDEXED,
    PRODUCTS,
    RANDOM,
    READS,
    REDUCTIONS,
    gather_p,
    mul_p,
    reduce_sum_p,
    select_n_p,
    split_p,
)
from jaxrnn._schedule import coming_into

# Terms of a sum that takes as long as to compute each of them again.
_MANY = 8


class State(NamedTuple):
    """Which rows hold a carry: before each step or, `late`, after it."""

    rows: int
    late: bool


class Residuals(NamedTuple):
    """What the steps of a body yield, once it is differentiated.

    Attributes:
        rows: first the ys of the body, then what is kept beside these.
        kept: the variables that need not be computed again, and which of `rows` holds each.
        states: which of `rows` holds each carry.
        active: the variables that have a tangent.
    """

    rows: tuple[Atom, ...]
    kept: Mapping[Var, int]
    states: tuple[State, ...]
    active: set[Var]


def residuals(program: Program, tangents: Any, forgets: bool = False) -> Residuals:
    """What to keep of each step of a body whose inputs have `tangents`: consts, carry, xs.

    The state before a step is what the step before it made, which may be a row already. A state
    that its step changes and then reads, such as a memory, is kept as it is read, unless what it
    was before is needed, too; of one that each step reads a small part of, such as a delay line,
    that part. Nothing but states is kept under a checkpoint, if the step `forgets` that.
    """
    consts, carry, _ = map(len, tangents)
    # What has no tangent at any step is not differentiated: a step may not even have a derivative
    # by it, or none that is finite.
    every = zip(program.invars, itertools.chain(*tangents), strict=True)
    sources = [v for v, tangent in every if is_active(tangent)]
    active = dependents_in_time(program, sources, consts, carry, through_tangents=True)
    old = program.invars[consts : consts + carry]
    new, ys = program.outvars[:carry], program.outvars[carry:]
    kept = _kept(program, program.invars[:consts], active)
    marked = not_to_be_kept(program) if forgets else set()
    kept = [v for v in kept if v not in marked]
    kept += _read_of(old, program, kept, active, marked)
    rows: list[Atom] = [*ys, *(v for v in kept if v not in ys)]
    for before, after in zip(old, new, strict=True):
        if before in rows or after in rows:
            continue
        if isinstance(after, Var) and _spares(before, after, program, kept, active):
            kept.append(after)
            rows.append(after)
        else:
            rows.append(before)
    states = [
        State(rows.index(after if before not in rows else before), before not in rows)
        for before, after in zip(old, new, strict=True)
    ]
    return Residuals(tuple(rows), {v: rows.index(v) for v in kept}, tuple(states), active)


def _read_of(
    states: Sequence[Var],
    program: Program,
    kept: Sequence[Var],
    active: set[Var],
    marked: set[Var],
) -> list[Var]:
    """Parts that a step reads of its `states`, if these need not be kept then, which are larger."""
    parts: set[Var] = set()
    arranged = set(states)
    for equation in program.equations:
        if arranged.intersection(variables(equation.invars)):
            if is_free(equation) or equation.primitive in INDEXED:
                arranged |= set(equation.outvars)
            if equation.primitive in READS:
                parts |= set(equation.outvars).difference(marked, kept)
    needed = _needed(program, kept, active)
    with_parts = _needed(program, [*kept, *parts], active)
    read = [v for e in program.equations for v in e.outvars if v in parts and v in with_parts]
    spared = [v for v in states if v in needed and v not in with_parts]
    return read if 2 * sum(map(size_in_bytes, read)) <= sum(map(size_in_bytes, spared)) else []


def _spares(
    before: Var, after: Var, program: Program, kept: Sequence[Var], active: set[Var]
) -> bool:
    """Whether the state before a step is not needed if it is kept as it is after it."""
    if not is_inexact(after):
        return False
    return before in _needed(program, kept, active) and before not in _needed(
        program, [*kept, after], active
    )


def _needed(program: Program, kept: Sequence[Var], active: set[Var]) -> set[Var]:
    """The variables whose values the tangent of a step has to have, if it has those of `kept`."""
    needed: set[Var] = set()
    known = set(kept)
    known |= {v for v, split in only_split(program).items() if known.issuperset(split.outvars)}
    for equation in reversed(program.equations):
        operands, results = equation.invars, equation.outvars
        if any(v in needed and v not in known for v in results):
            needed |= set(variables(operands))
        elif not any(v in active for v in results):
            continue
        elif is_linear(equation):
            needed |= set(variables(operands[:1] if equation.primitive is select_n_p else []))
        elif equation.primitive in INDEXED:
            needed |= {v for v in variables(operands) if not is_inexact(v)}
        elif equation.primitive in PRODUCTS or equation.primitive is mul_p:
            for one, other in (operands, reversed(operands)):
                needed |= set(variables([one] if active.intersection(variables([other])) else []))
        elif slope_by_output(equation) is None or not known.issuperset(results):
            needed |= set(variables(operands))
    return needed


def _kept(program: Program, consts: Sequence[Var], active: set[Var]) -> list[Var]:
    """The variables of a step that its derivative must not have to compute again.

    A sum of products is needed only where something nonlinear reads it; through linear equations
    the derivative passes without them. If that is one equation whose result tells its derivative,
    the result is kept instead. Of what is made from random bits, what meets the data is kept: a
    dropout mask, not the bits. What is looked up in a const is looked up again. Sums and maxima of
    many terms are kept as products are, but not what repeats them for each term; so are results of
    slow functions.

    The derivative of a maximum asks which of its terms equals it. Computed twice, in two places, a
    term may differ in its last digit, and none would: the terms are kept.
    """
    readers, splits = _readers(program), only_split(program)
    compared, differentiated = _compared(program), with_derivative(program, active)
    costly: set[Var] = set()
    reduced: set[Var] = set()  # those of `costly` that are few numbers made of many
    kept: dict[Var, None] = {}
    for equation in program.equations:
        read_here = [v for v in variables(equation.invars) if v in costly]
        is_active_here = equation.outvars[0] in active
        looked_up = equation.primitive is gather_p and equation.invars[0] in consts
        heavy = is_slow(equation) or (is_heavy(equation) and not looked_up)
        if equation.primitive in EXTREMES and equation.outvars[0] in differentiated:
            terms = set(variables(equation.invars)).difference(program.invars)
            kept |= dict.fromkeys(terms)
            continue
        if _reduces(equation) and not read_here and compared.isdisjoint(equation.outvars):
            costly |= set(equation.outvars)
            reduced |= set(equation.outvars)
            continue
        if read_here and not heavy and reduced.issuperset(read_here):
            if size(equation.outvars[0]) >= _MANY * max(map(size, read_here)):
                kept |= dict.fromkeys(read_here)
                continue
            reduced |= set(equation.outvars)
        # To draw random bits again costs more than to keep them.
        if heavy or equation.primitive in RANDOM or (read_here and not is_active_here):
            costly |= set(equation.outvars)
        elif read_here and (is_linear(equation) or _scales(equation, read_here, active)):
            costly |= set(equation.outvars)
            kept |= dict.fromkeys(v for v in read_here if v not in active)
            continue
        if is_active_here and read_here:
            by_output = slope_by_output(equation) and all(readers[v] == 1 for v in read_here)
            results = splits.get(equation.outvars[0], equation).outvars
            kept |= dict.fromkeys(results if by_output else read_here)
    return list(kept)


def _reduces(equation: Equation) -> bool:
    """Whether each result is the sum or the extreme of many numbers, which are not kept."""
    return (
        (equation.primitive is reduce_sum_p or equation.primitive in EXTREMES)
        and is_inexact(equation.outvars[0])
        and size(equation.invars[0]) >= _MANY * size(equation.outvars[0])
    )


def _compared(program: Program) -> set[Var]:
    """What is compared with other numbers: perhaps the very ones that it is the maximum of."""
    return coming_into(
        program,
        lambda equation: equation.primitive in COMPARISONS,
        lambda equation: not is_heavy(equation) and equation.primitive not in REDUCTIONS,
    )


def _scales(equation: Equation, costly: Sequence[Var], active: set[Var]) -> bool:
    """Whether `equation` multiplies what is `costly` by what has no tangent, number by number."""
    if equation.primitive is not mul_p:
        return False
    moved = [a for a in equation.invars if isinstance(a, Var) and a in active]
    return len(moved) == 1 and moved[0] in costly and size(moved[0]) == size(equation.outvars[0])


def only_split(program: Program) -> dict[Var, Equation]:
    """For results that tell their derivative and that one split alone reads, this split.

    Since `split(f(z)) = f(split(z))`, the parts tell the derivative as well.
    """
    readers = _readers(program)
    results = {e.outvars[0] for e in program.equations if slope_by_output(e) is not None}
    return {
        v: e
        for e in program.equations
        if e.primitive is split_p
        for v in variables(e.invars)
        if v in results and readers[v] == 1
    }


def _readers(program: Program) -> Counter[Var]:
    """For each variable, how many equations read it; being a result counts as one."""
    readers = Counter(a for e in program.equations for a in variables(e.invars))
    readers.update(variables(program.outvars))
    return readers


def is_active(tangent: Any) -> bool:
    """Whether a tangent, as a rule with symbolic zeros gets it, is more than a zero."""
    return not isinstance(tangent, SymbolicZero) and tangent.dtype != jax.dtypes.float0


def symbolic_zero(primal: jax.Array) -> Any:
    """A zero for a tangent of `primal` in a rule with symbolic zeros."""
    return zero_from_primal(primal, symbolic_zeros=True)
