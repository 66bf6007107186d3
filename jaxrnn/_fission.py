"""Loop fission: a scan body cut into what must run step by step and what need not.

A scan body maps `(consts, carry, x)` to `(carry, y)`. Most of a recurrent step does not lie on the
way from the old carry to the new one, so it need not run in the sequential loop: it can run over a
whole block of timesteps at once, as large products. Which equation goes where is a matter of
*time*, a number for every variable of the body:

    -1      depends on consts alone: run once (loop-invariant)
     0      depends on the inputs: run per block, before the first loop (prologue)
     1      lies in the first loop (recurrence)
     2      depends on what the first loop yields and feeds nothing in it: run per block, after it
     3      lies in a second loop, and so on; the last even time is the epilogue

Odd times are loops, even ones are passes over a block. One loop is the rule. There are more where
a product stands between two recurrences, as between the layers of a stacked network written as one
step, or a readout and the output that a masked step holds: the product then leaves the loop too.

Only products move, and what they need or what follows from them; other work stays where it is. A
value crosses a cut where it is small: what merely arranges data is repeated on the far side when
that carries fewer bytes. Nothing is executed here.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Literal,
    Program,
    Var,
    is_free,
    is_heavy,
    is_movable,
    size_in_bytes,
    variables,
)


class Loop(NamedTuple):
    """A recurrence: `program` maps consts, carry, xs to new carry, ys.

    Attributes:
        program: one step.
        consts: its first inputs, the same at every step.
        carry: which of the body's carries it runs; its next inputs and its first outputs.
        xs: its last inputs, a row per step.
        ys: its last outputs, the variables of the body that are needed outside, a row per step.
    """

    program: Program
    consts: tuple[Var, ...]
    carry: tuple[int, ...]
    xs: tuple[Var, ...]
    ys: tuple[Var, ...]


class Stage(NamedTuple):
    """A pass over a block, from `program.invars` to `program.outvars`, and the loop after it."""

    program: Program
    loop: Loop | None


class Plan(NamedTuple):
    """A scan body after fission.

    Attributes:
        body: the scan body, `(consts, carry, x) -> (carry, y)`.
        consts: number of its consts.
        carry: number of its carries.
        invariant: what runs once; its inputs are consts.
        stages: what runs per block, in order.
        unread: carries that no step reads and no loop runs: only their last value counts.
        tail: the last values of `unread`, from the last rows of a block.
        times: the time of every variable.
    """

    body: Program
    consts: int
    carry: int
    invariant: Program
    stages: tuple[Stage, ...]
    unread: tuple[int, ...]
    tail: Program
    times: dict[Var, int]


def fission(
    body: Program,
    consts: int,
    carry: int,
    accumulated: frozenset[Var] = frozenset(),
) -> Plan:
    """Splits a scan body.

    Args:
        body: `(consts, carry, x) -> (carry, y)`, everything flat, without effects.
        consts: number of consts.
        carry: number of carries.
        accumulated: consts whose cotangents a loop would have to add up step by step. What depends
            on them enters a loop a row per step, so that a pass over the block adds up instead.

    Returns:
        The plan; its loops and passes together do the work of the body, equation by equation.
    """
    times = _times(body, consts, carry)
    return _Cut(body, consts, carry, times, accumulated).plan()


def carry_times(body: Program, consts: int, carry: int) -> list[int]:
    """The time of each carry: which loop runs it."""
    times = _times(body, consts, carry)
    return [times[v] for v in body.invars[consts : consts + carry]]


def _times(body: Program, consts: int, carry: int) -> dict[Var, int]:
    carries = body.invars[consts : consts + carry]
    depends = _depends(body, carries)
    feeds = _feeds(body, carry)
    reach = _reach([_union(depends, [new]) for new in body.outvars[:carry]])

    def in_a_cycle(equation: Equation) -> bool:
        fed = _union(feeds, equation.outvars)
        back = _bits(fed, reach)
        return bool(_union(depends, equation.invars) & (fed | back))

    leaves_loop = {
        id(e): is_heavy(e) and is_movable(e) and not in_a_cycle(e) for e in body.equations
    }
    times: dict[Var, int] = dict.fromkeys(body.invars[:consts], -1)
    times |= dict.fromkeys(carries, 1)
    times |= dict.fromkeys(body.invars[consts + carry :], 0)
    while True:
        for equation in body.equations:
            time = max((times[v] for v in variables(equation.invars)), default=-1)
            if time % 2 == 1 and time > 0 and leaves_loop[id(equation)]:
                time += 1
            elif time % 2 == 0 and not is_movable(equation):
                time += 1
            times |= dict.fromkeys(equation.outvars, time)
        late = {
            old: times[new] + 1 - times[new] % 2
            for old, new in zip(carries, body.outvars, strict=False)
            if isinstance(new, Var) and times[new] > times[old]
        }
        if not late:
            return times
        times |= late


def _depends(body: Program, carries: Iterable[Var]) -> dict[Var, int]:
    """For each variable, the carries of the same step that it depends on, as bits."""
    depends = dict.fromkeys(body.invars, 0)
    depends |= {v: 1 << i for i, v in enumerate(carries)}
    for equation in body.equations:
        depends |= dict.fromkeys(equation.outvars, _union(depends, equation.invars))
    return depends


def _feeds(body: Program, carry: int) -> dict[Var, int]:
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


class _Cut:
    """Decides, from the last loop back to the first, what each needs and what crosses into it."""

    def __init__(
        self,
        body: Program,
        consts: int,
        carry: int,
        times: dict[Var, int],
        accumulated: frozenset[Var],
    ):
        self.body, self.consts, self.carry, self.times = body, consts, carry, times
        self.carries = body.invars[consts : consts + carry]
        self.carry_index = {v: i for i, v in enumerate(self.carries)}
        self.new = body.outvars[:carry]
        self.time_of = {
            id(e): max((times[v] for v in e.outvars), default=-1) for e in body.equations
        }
        self.cost: dict[Var, int] = {}
        self.heavy: set[Var] = set()
        self.accumulated: set[Var] = set(accumulated)
        for equation in body.equations:
            self._weigh(equation)

    def plan(self) -> Plan:
        body, new = self.body, self.new
        read = set(variables(a for e in body.equations for a in e.invars))
        read |= set(variables(body.outvars[self.carry :]))
        read |= {v for i, v in enumerate(new) if isinstance(v, Var) and v is not self.carries[i]}
        unread = tuple(
            i
            for i, v in enumerate(self.carries)
            if v not in read and new[i] is not v and self._time(new[i]) % 2 == 0
        )
        # Variables that a pass, a loop or the caller wants a row per step of, or once.
        self.rows = set(variables(body.outvars[self.carry :]))
        self.once: set[Var] = set()
        tail = self._tail([new[i] for i in unread])
        self._keep_times()

        last = max([*self.times.values(), 0])
        stages: list[Stage] = []
        for time in range(last + last % 2, -1, -2):
            members = tuple(
                i
                for i, v in enumerate(self.carries)
                if self.times[v] == time + 1 and i not in unread
            )
            loop = self._loop(time + 1, members)
            program = self._pass(time)
            if loop is not None or program.outvars:
                stages.append(Stage(program, loop))
        invariant = self._invariant()
        return Plan(
            body,
            self.consts,
            self.carry,
            invariant,
            tuple(reversed(stages)),
            unread,
            tail,
            self.times,
        )

    def _tail(self, wanted: list[Atom]) -> Program:
        """Work that is wanted of the last step alone; a last carry stands for a loop's last row."""
        equations, taken = self._collect(
            set(variables(wanted)),
            lambda e: self.time_of[id(e)] % 2 == 0,
            lambda e: self.time_of[id(e)] == -1 and self._repeats(e),
        )
        self.rows |= {v for v in taken if v not in self.new}
        return self.body.cut(self._in_order(taken), wanted, equations)

    def _keep_times(self) -> None:
        """What is wanted a row per step but does not change is wanted once."""
        self.once |= {v for v in self.rows if self.times[v] == -1}
        self.rows -= self.once

    def _time(self, atom: Atom) -> int:
        return -1 if isinstance(atom, Literal) else self.times[atom]

    def _weigh(self, equation: Equation) -> None:
        """Records what it costs to carry a result of `equation` over a cut, in bytes per step."""
        operands = variables(equation.invars)
        product = is_heavy(equation) and is_movable(equation)
        source = sum(self.cost.get(v, size_in_bytes(v)) for v in operands)
        for v in equation.outvars:
            size = size_in_bytes(v)
            self.cost[v] = min(size, source) if is_free(equation) else size
            if product or any(u in self.heavy for u in operands):
                self.heavy.add(v)
            if any(u in self.accumulated for u in operands):
                self.accumulated.add(v)

    def _repeats(self, equation: Equation) -> bool:
        """Whether to run `equation` again on the far side of a cut rather than carry its result."""
        results = [v for v in equation.outvars]
        if any(v in self.accumulated for v in results):
            return False
        if not is_free(equation):
            return self.time_of[id(equation)] >= 0 and not any(v in self.heavy for v in results)
        cheaper = any(self.cost[v] < size_in_bytes(v) for v in results)
        return cheaper or (
            self.time_of[id(equation)] >= 0 and not any(v in self.heavy for v in results)
        )

    def _collect(
        self,
        wanted: set[Var],
        here: Callable[[Equation], bool],
        repeats: Callable[[Equation], bool],
    ) -> tuple[list[Equation], set[Var]]:
        """The equations that make `wanted`, and the variables that they take from elsewhere."""
        wanted, taken, equations = set(wanted), set(), []
        for equation in reversed(self.body.equations):
            made = wanted.intersection(equation.outvars)
            if not made:
                continue
            if here(equation) or repeats(equation):
                equations.append(equation)
                wanted |= set(variables(equation.invars))
            else:
                taken |= made
            wanted -= made
        return equations[::-1], taken | wanted

    def _loop(self, time: int, members: tuple[int, ...]) -> Loop | None:
        own = {v for v in self.rows if self.times[v] == time}
        if not members and not own:
            return None
        self.rows -= own
        new = [self.new[i] for i in members]
        wanted = {v for v in variables(new)} | own
        equations, taken = self._collect(
            wanted,
            lambda e: self.time_of[id(e)] == time,
            lambda e: (
                self.time_of[id(e)] % 2 == 0
                and self._repeats(e)
                or self.time_of[id(e)] == -1
                and self._repeats(e)
            ),
        )
        old = [self.carries[i] for i in members]
        taken -= set(old)
        consts = self._in_order(v for v in taken if self._is_const(v))
        xs = self._in_order(v for v in taken if not self._is_const(v))
        ys = self._in_order(own)
        self.once |= set(v for v in taken if self.times[v] == -1)
        self.rows |= set(xs) - self.once
        program = self.body.cut([*consts, *old, *xs], [*new, *ys], equations)
        return Loop(program, consts, members, xs, ys)

    def _is_const(self, v: Var) -> bool:
        return self.times[v] == -1 and v not in self.accumulated

    def _pass(self, time: int) -> Program:
        made = {v for v in self.rows if self.times[v] == time and v not in self.body.invars}
        self.rows -= made
        equations, taken = self._collect(
            made,
            lambda e: self.time_of[id(e)] == time,
            lambda e: (
                self.time_of[id(e)] % 2 == 1
                and self.time_of[id(e)] != time
                and self._moves_up(e)
                or self.time_of[id(e)] == -1
                and self._repeats(e)
            ),
        )
        self.once |= {v for v in taken if self.times[v] == -1}
        self.rows |= {v for v in taken if self.times[v] >= 0}
        return self.body.cut(self._in_order(taken), self._in_order(made), equations)

    def _moves_up(self, equation: Equation) -> bool:
        """Whether a pass makes a result of an earlier loop itself, from less than it is."""
        return is_free(equation) and any(self.cost[v] < size_in_bytes(v) for v in equation.outvars)

    def _invariant(self) -> Program:
        made = {v for v in self.once if v not in self.body.invars}
        equations, taken = self._collect(made, lambda e: self.time_of[id(e)] == -1, lambda e: False)
        return self.body.cut(self._in_order(taken), self._in_order(made), equations)

    def _in_order(self, wanted: Iterable[Var]) -> tuple[Var, ...]:
        """`wanted` in the order of the body, so that a plan is the same every time."""
        if not hasattr(self, "_position"):
            order = [*self.body.invars, *(v for e in self.body.equations for v in e.outvars)]
            self._position = {v: i for i, v in enumerate(order)}
        return tuple(sorted(set(wanted), key=self._position.__getitem__))
