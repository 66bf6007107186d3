"""When each part of a scan body has to run: a *time* for every variable of it.

Most of a recurrent step does not lie on the way from the old carry to the new one, so it need not
run in the sequential loop. Of a body that maps `(consts, carry, x)` to `(carry, y)`, what has time

    -1      depends on consts alone: run once (loop-invariant)
     0      depends on the inputs: run per block, before the first loop (prologue)
     1      lies in the first loop (recurrence)
     2      depends on what the first loop yields and feeds nothing in it: run per block, after it
     3      lies in a second loop, and so on; the last even time is the epilogue

Odd times are loops, even ones are passes over a block. One loop is the rule. There are more where
a product stands between two recurrences, as between the layers of a stacked network written as one
step, or a readout and the output that a masked step holds: the product then leaves the loop too.
"""

from collections.abc import Callable, Container, Iterable, Sequence

from jaxrnn import _device
from jaxrnn._equations import (
    can_run_batched,
    is_heavy,
    is_slow,
    is_transcendental,
    multiply_adds,
    rows_of_each_matrix,
)
from jaxrnn._every_step import must_run_every_step
from jaxrnn._jaxpr import Atom, Equation, Program, Var, dependents, size, size_in_bytes, variables
from jaxrnn._primitives import ELEMENTWISE, FREE, TRIGONOMETRIC

# Rows of each of several matrices from which on to bring those of all steps together costs more.
_MANY_ROWS = 16


def schedule(body: Program, consts: int, carry: int, is_tangent: bool = False) -> dict[Var, int]:
    """The time of every variable: the earliest at which it can be had.

    In a tangent what has to run at each step, see `_every_step.py`, has a loop even if it is made
    of consts alone. Other bodies with such work are left to `lax.scan`. A matrix of each step that
    is made of one for all (a mask on the weights, say) stays in the loop of a tangent. Measured on
    a CPU: of 16 to 256 KiB gradients were 1.15 to 1.65 times as fast so, and 0.36 to 1.5 times by a
    pass, which makes those of all steps at once.
    """
    carries = body.invars[consts : consts + carry]
    depends = _depends(body, carries)
    feeds = feeds_carries(body, carry)
    reach = _reach([_union(depends, [new]) for new in body.outvars[:carry]])

    everything = {*body.invars, *(v for e in body.equations for v in e.outvars)}
    fixed = everything - dependents(body, body.invars[consts:])

    def in_a_cycle(equation: Equation) -> bool:
        fed = _union(feeds, equation.outvars)
        back = _bits(fed, reach)
        return bool(_union(depends, equation.invars) & (fed | back))

    stays = {id(e): not can_run_batched(e) for e in body.equations}
    if is_tangent:
        stays |= {id(e): True for e in _of_each_step(body, body.invars[:consts], fixed)}
    leaves_loop = {id(e): earns_a_pass(e, fixed) and not in_a_cycle(e) for e in body.equations}
    times: dict[Var, int] = dict.fromkeys(body.invars[:consts], -1)
    times |= dict.fromkeys(carries, 1)
    times |= dict.fromkeys(body.invars[consts + carry :], 0)
    while True:
        for equation in body.equations:
            time = max((times[v] for v in variables(equation.invars)), default=-1)
            if time >= 0 and (leaves_loop if is_a_loop(time) else stays)[id(equation)]:
                time += 1
            if time == -1 and is_tangent and must_run_every_step(equation):
                time = 1
            times |= dict.fromkeys(equation.outvars, time)
        late = {
            old: times[new] + 1 - times[new] % 2
            for old, new in zip(carries, body.outvars, strict=False)
            if isinstance(new, Var) and times[new] > times[old]
        }
        if not late:
            return times
        times |= late


def carry_times(body: Program, consts: int, carry: int, is_tangent: bool) -> list[int]:
    """The time of each carry: which loop runs it."""
    times = schedule(body, consts, carry, is_tangent)
    return [times[v] for v in body.invars[consts : consts + carry]]


def is_a_loop(time: int) -> bool:
    """Whether what has this time runs step by step."""
    return time > 0 and time % 2 == 1


def earns_a_pass(equation: Equation, fixed: set[Var]) -> bool:
    """Whether `equation` is worth running over a block of time at once.

    Products are if one side is `fixed`, the same at every step: many rows then meet one matrix.
    With a matrix for each sample or head the rows of all steps have to be brought together.
    Measured on a CPU: of 1 to 8 rows for each of them gradients were 1.2 to 2.6 times as fast so,
    of 16 and more 0.3 to 1.1 times.
    """
    if not (is_heavy(equation) and can_run_batched(equation)):
        return False
    if not multiply_adds(equation):
        return True
    rows = rows_of_each_matrix(equation, fixed.__contains__)
    return rows is not None and (rows < _MANY_ROWS or _device.gpu() is not None)


def equations_for(program: Program, wanted: Iterable[Var], known: Container[Var]) -> list[Equation]:
    """The equations that make what is `wanted` of what is `known`, in order."""
    needed, found = set(wanted), list[Equation]()
    for equation in reversed(program.equations):
        if any(v in needed and v not in known for v in equation.outvars):
            needed.update(variables(equation.invars))
            found.append(equation)
    return found[::-1]


def coming_into(
    program: Program, ends: Callable[[Equation], bool], passes_on: Callable[[Equation], bool]
) -> set[Var]:
    """What comes into an equation at which a way `ends`, by such as pass it on."""
    found: set[Var] = set()
    for equation in reversed(program.equations):
        on_the_way = passes_on(equation) and not found.isdisjoint(equation.outvars)
        if on_the_way or ends(equation):
            found.update(variables(equation.invars))
    return found


def feeds_carries(body: Program, carry: int) -> dict[Var, int]:
    """For each variable, the new carries of the same step that depend on it, as bits."""
    feeds: dict[Var, int] = {}
    for i, new in enumerate(body.outvars[:carry]):
        if isinstance(new, Var):
            feeds[new] = feeds.get(new, 0) | 1 << i
    for equation in reversed(body.equations):
        fed = _union(feeds, equation.outvars)
        for v in variables(equation.invars):
            feeds[v] = feeds.get(v, 0) | fed
    return feeds


def _depends(body: Program, carries: Iterable[Var]) -> dict[Var, int]:
    """For each variable, the carries of the same step that it depends on, as bits."""
    depends = dict.fromkeys(body.invars, 0)
    depends |= {v: 1 << i for i, v in enumerate(carries)}
    for equation in body.equations:
        depends |= dict.fromkeys(equation.outvars, _union(depends, equation.invars))
    return depends


def _reach(needs: list[int]) -> list[int]:
    """For each carry, the carries that it comes to feed over any number of steps, as bits.

    `needs[j]` are the carries that new carry j depends on.
    """
    count = len(needs)
    reach = [sum(1 << j for j in range(count) if needs[j] >> i & 1) for i in range(count)]
    for k in range(count):
        for i in range(count):
            if reach[i] >> k & 1:
                reach[i] |= reach[k]
    return reach


def _bits(mask: int, table: list[int]) -> int:
    """The union of the entries of `table` that `mask` selects."""
    return _or(row for i, row in enumerate(table) if mask >> i & 1)


def _union(table: dict[Var, int], atoms: Iterable[Atom]) -> int:
    return _or(table.get(v, 0) for v in variables(atoms))


def _or(masks: Iterable[int]) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result


def _of_each_step(body: Program, consts: Sequence[Var], fixed: set[Var]) -> list[Equation]:
    """What makes a matrix of each step of one among the `consts`."""
    matrices, found = set(filter(is_large_sum, consts)), list[Equation]()
    for equation in body.equations:
        made = equation.outvars[0]
        operands = matrices.intersection(variables(equation.invars))
        if equation.primitive in ELEMENTWISE | FREE and size(made) in map(size, operands):
            matrices.add(made)
            found += [equation] if made not in fixed else []
    return found


def is_large_sum(v: Var) -> bool:
    """Whether a loop had better add up a cotangent of this size than store it for each step."""
    return size_in_bytes(v) >= 1 << 14


def coefficients(body: Program, times: dict[Var, int], purpose: str) -> set[Var]:
    """What leaves the loops of a gradient although no product made it, see `fission`."""
    slow = {v for e in body.equations if is_slow(e) for v in e.outvars}
    if purpose != "tangent":
        return slow if purpose == "residuals" else set()
    if not any(is_heavy(e) and is_a_loop(times[e.outvars[0]]) for e in body.equations):
        return slow | {v for e in body.equations if is_transcendental(e) for v in e.outvars}
    angular = {v for e in body.equations if e.primitive in TRIGONOMETRIC for v in e.outvars}
    return slow | angular & _spread(body)


def _spread(body: Program) -> set[Var]:
    """What is repeated to make larger arrays, other than by products, at once or further on."""
    spread: set[Var] = set()
    for equation in reversed(body.equations):
        if not is_heavy(equation):
            outs = equation.outvars
            spread |= {
                v
                for v in variables(equation.invars)
                if any(out in spread or size(out) > size(v) for out in outs)
            }
    return spread
