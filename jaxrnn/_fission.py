"""Loop fission: a scan body cut into what must run step by step and what need not.

`_schedule.py` says when each equation has to run: once, in a pass over a whole block of timesteps,
where the products of all steps are one large product, or in a sequential loop. Here a body is cut
accordingly, and what crosses each cut is decided.

Only products and random bits move, with what they need or what follows; other work stays in place.
A value crosses a cut where it is small: what merely arranges data is repeated on the far side when
that carries fewer bytes. Nothing is executed here.
"""

import math
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jaxrnn._equations import (
    can_run_batched,
    is_arithmetic,
    is_free,
    is_heavy,
    is_slow,
    is_transcendental,
    multiply_adds,
)
from jaxrnn._every_step import has_backward_rule
from jaxrnn._jaxpr import Atom, Equation, Literal, Program, Var, size, size_in_bytes, variables
from jaxrnn._primitives import SUMS
from jaxrnn._samples_last_form import Form
from jaxrnn._schedule import (
    coefficients,
    earns_a_pass,
    feeds_carries,
    is_a_loop,
    is_large_sum,
    schedule,
)

# What a body makes: results alone, results and what a tangent needs, or a tangent.
Purpose = typing.Literal["results", "residuals", "tangent"]
# How recurrences are run: step by step, as one kernel each, or all steps of a block at once.
LoopMethod = typing.Literal["sequential", "fused", "parallel"]


class Loop(NamedTuple):
    """A recurrence: `program` maps consts, carry, xs to new carry, ys.

    Attributes:
        program: one step.
        consts: its first inputs, the same at every step.
        carry: which of the body's carries it runs; its next inputs and its first outputs.
        xs: its last inputs, a row per step.
        ys: its last outputs, the variables of the body that are needed outside, a row per step.
        form: how `program` takes and returns matrices among its carries, if not as they are.
    """

    program: Program
    consts: tuple[Var, ...]
    carry: tuple[int, ...]
    xs: tuple[Var, ...]
    ys: tuple[Var, ...]
    form: Form | None = None


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
        purpose: what the body is for.
        accumulated: what depends on the consts whose cotangents are added up over time.
    """

    body: Program
    consts: int
    carry: int
    invariant: Program
    stages: tuple[Stage, ...]
    unread: tuple[int, ...]
    tail: Program
    times: dict[Var, int]
    purpose: Purpose
    accumulated: frozenset[Var]

    @property
    def carries(self) -> tuple[Var, ...]:
        """The carries at the start of a step."""
        return self.body.invars[self.consts : self.consts + self.carry]

    @property
    def loops(self) -> list[Loop]:
        """The recurrences, in order."""
        return [stage.loop for stage in self.stages if stage.loop is not None]

    @property
    def in_passes(self) -> list[Equation]:
        """What runs per block, at once."""
        return [e for stage in self.stages for e in stage.program.equations]

    @property
    def in_loops(self) -> list[Equation]:
        """What runs step by step."""
        return [e for loop in self.loops for e in loop.program.equations]


def fission(
    body: Program,
    consts: int,
    carry: int,
    purpose: Purpose = "results",
    accumulated: frozenset[Var] = frozenset(),
    in_place: bool = False,
) -> Plan:
    """Splits a scan body.

    Args:
        body: `(consts, carry, x) -> (carry, y)`, everything flat, without effects.
        consts: number of consts.
        carry: number of carries.
        purpose: what it is for. In a gradient slow functions of what is known before a loop leave
            it. In a tangent exponentials and the like do as well unless it holds a product. They
            stand beside shifts and sums, into whose transposes XLA would copy them one by one. With
            a product only sines and the like do that are spread over larger arrays: XLA may compute
            them for each element.
        accumulated: consts whose cotangents a loop would have to add up step by step. What depends
            on them enters a loop a row per step, so that a pass over the block adds up instead.
        in_place: whether a loop reads rows where they lie. A pass would copy them block by block,
            so that large ones, such as a matrix for each sample, are left to the loop.

    Returns:
        The plan; its loops and passes together do the work of the body, equation by equation.
    """
    times = schedule(body, consts, carry, purpose == "tangent")
    return _Cut(body, consts, carry, times, purpose, accumulated, in_place).plan()


class _Cut:
    """Decides, from the last loop back to the first, what each needs and what crosses into it."""

    def __init__(
        self,
        body: Program,
        consts: int,
        carry: int,
        times: dict[Var, int],
        purpose: Purpose,
        accumulated: frozenset[Var],
        in_place: bool,
    ):
        self.body, self.consts, self.carry, self.times = body, consts, carry, times
        self.purpose = purpose
        self.carries = body.invars[consts : consts + carry]
        self.new = body.outvars[:carry]
        made = [v for e in body.equations for v in e.outvars]
        self.position = {v: i for i, v in enumerate([*body.invars, *made])}
        self.feeds = feeds_carries(body, carry)
        self.fixed = {v for v, time in times.items() if time == -1}
        self.cost: dict[Var, int] = {}
        self.heavy: set[Var] = set()
        self.accumulated: set[Var] = set(accumulated)
        self.in_place = in_place
        self.coefficients = coefficients(body, times, purpose)
        for equation in body.equations:
            self._weigh(equation)
        # What is still wanted of what has not been cut yet: a row per step, or one value for all.
        self.rows: set[Var] = set()
        self.once: set[Var] = set()

    def plan(self) -> Plan:
        unread = self._unread()
        tail = self._tail(unread)
        self._want(variables(self.body.outvars[self.carry :]))
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
        invariant = self._program(self._made(self.once), lambda time, _: time == -1)
        stages.reverse()
        return Plan(
            self.body,
            self.consts,
            self.carry,
            invariant,
            tuple(stages),
            unread,
            tail,
            self.times,
            self.purpose,
            frozenset(self.accumulated),
        )

    def _unread(self) -> tuple[int, ...]:
        """The carries that nothing reads and that need no loop."""
        read = set(variables(a for e in self.body.equations for a in e.invars))
        read |= set(variables(self.body.outvars[self.carry :]))
        for old, new in zip(self.carries, self.new, strict=True):
            read |= {new} if isinstance(new, Var) and new is not old else set()
        return tuple(
            i
            for i, (old, new) in enumerate(zip(self.carries, self.new, strict=True))
            if old not in read and new is not old and self._time(new) % 2 == 0
        )

    def _tail(self, unread: Sequence[int]) -> Program:
        """Work that is wanted of the last step alone; a last carry stands for a loop's last row."""
        # A pass makes the last step, too: a backward rule would be called twice, for a part each.
        wanted = [self.new[i] for i in unread]
        program = self._program(wanted, lambda time, e: time % 2 == 0 and not has_backward_rule(e))
        ends = variables(v for i, v in enumerate(self.new) if i not in unread)
        self._want(v for v in program.invars if v not in ends)
        return program

    def _loop(self, time: int, members: tuple[int, ...]) -> Loop | None:
        ys = self._in_order(v for v in self.rows if self.times[v] == time)
        if not members and not ys:
            return None
        self.rows -= set(ys)
        new = [self.new[i] for i in members]
        old = [self.carries[i] for i in members]
        program = self._program([*new, *ys], lambda t, _: t == time)
        taken = [v for v in program.invars if v not in old]
        consts = tuple(v for v in taken if self._is_const(v))
        xs = tuple(v for v in taken if not self._is_const(v))
        self._want(taken)
        step = self.body.cut([*consts, *old, *xs], program.outvars, program.equations)
        return Loop(step, consts, members, xs, ys)

    def _pass(self, time: int) -> Program:
        made = self._made(v for v in self.rows if self.times[v] == time)
        self.rows -= set(made)
        program = self._program(made, lambda t, _: t == time)
        self._want(program.invars)
        return program

    def _program(self, wanted: Sequence[Atom], own: Callable[[int, Equation], bool]) -> Program:
        """What makes `wanted`: equations whose time is `own`, and others where repeating pays."""
        missing, taken = set(variables(wanted)), set()
        equations = []
        for equation in reversed(self.body.equations):
            made = missing.intersection(equation.outvars)
            if not made:
                continue
            missing -= made
            if own(self._time(equation.outvars[0]), equation) or self._repeats(equation):
                equations.append(equation)
                missing |= set(variables(equation.invars))
            else:
                taken |= made
        return self.body.cut(self._in_order(taken | missing), wanted, reversed(equations))

    def _want(self, wanted: Iterable[Var]) -> None:
        for v in wanted:
            (self.once if self.times[v] == -1 else self.rows).add(v)

    def _weigh(self, equation: Equation) -> None:
        """Records what it costs to carry a result of `equation` over a cut, in bytes per step."""
        operands = variables(equation.invars)
        product = earns_a_pass(equation, self.fixed)
        changes = any(v not in self.fixed for v in equation.outvars)
        # A product of two rows, as an outer one, gains nothing by a pass.
        costly = product or (is_heavy(equation) and not can_run_batched(equation))
        cheap = is_free(equation) or (changes and not costly and not self._is_dear(equation))
        leaves = product or not self.coefficients.isdisjoint(equation.outvars)
        # What is fixed is there on the far side of a cut as well.
        to_carry = operands
        if changes:
            to_carry = [v for v in operands if v not in self.fixed or v in self.accumulated]
        source = sum(self.cost.get(v, size_in_bytes(v)) for v in to_carry)
        for v in equation.outvars:
            full = size_in_bytes(v)
            self.cost[v] = min(full, source) if cheap else full
            if leaves or (any(u in self.heavy for u in operands) and not self._shrinks(equation)):
                self.heavy.add(v)
            if any(u in self.accumulated for u in operands):
                self.accumulated.add(v)

    def _is_dear(self, equation: Equation) -> bool:
        """Whether `equation` makes exponentials or the like that a gradient had better store.

        Measured on a CPU, where a row of a product is spread over a matrix (a selective state space
        model of 1 to 8 samples): gradients were 1.03 to 1.1 times as fast by rows of 4 to 16 KiB,
        and as fast by 32 to 64 KiB. Results alone were up to 1.3 times as fast without.
        """
        small = size_in_bytes(equation.outvars[0]) <= 1 << 15
        dear = is_slow(equation) or (small and is_transcendental(equation))
        return dear and self.purpose != "results"

    def _repeats(self, equation: Equation) -> bool:
        """Whether to run `equation` again on the far side of a cut rather than carry its result.

        What makes more than it takes is repeated: a broadcast, an outer product. Other work on
        inputs is repeated too, that is, stays in the loop, unless it follows from a product: and
        even then if its operands are there anyway. Of a loop's work what feeds no carry up to it
        moves on to what wants it, if no more bytes do.
        """
        results = equation.outvars
        time = self._time(results[0])
        if has_backward_rule(equation):  # it would be called twice, see `_tail`
            return False
        if any(v in self.accumulated for v in results):
            return time % 2 == 0 and self._is_made_in_place(equation)
        if time % 2 == 0:
            follows = any(v in self.heavy for v in results)
            return self._expands(results) or not follows or self._is_at_hand(equation)
        if is_free(equation):
            return self._expands(results)
        carried = [v for v in variables(equation.invars) if is_a_loop(self.times[v])]
        return (
            time > 0
            and can_run_batched(equation)
            and not is_heavy(equation)
            and not any(self.feeds.get(v, 0) & self._carries_up_to(time) for v in results)
            and sum(map(size_in_bytes, carried)) <= sum(map(size_in_bytes, results))
        )

    def _is_made_in_place(self, equation: Equation) -> bool:
        """Whether a loop is to make by itself what depends on consts that must not be added up.

        That is, from rows: large ones, which a pass would copy, and what takes rows to make more of
        them, with sums of that. Measured on a CPU: sums over small matrices, one for each sample,
        for all steps at once took gradients of memories of 4 to 64 KiB up to 3 times as long.
        """
        operands, results = variables(equation.invars), equation.outvars
        if not self.in_place or any(v in self.accumulated and v in self.fixed for v in operands):
            return False
        expands = self._expands(operands if equation.primitive in SUMS else results)
        return self._shrinks(equation) or (expands and max(map(size_in_bytes, results)) >= 1 << 10)

    def _expands(self, values: Iterable[Var]) -> bool:
        """Whether some of `values` are large beside what they are made of."""
        return any(self.cost.get(v, math.inf) < size_in_bytes(v) for v in values)

    def _is_at_hand(self, equation: Equation) -> bool:
        """Whether `equation` is cheap and takes rows that are made anyway, for a tangent, say.

        Measured on a CPU: gradients of minGRU were 1.00 to 1.07 times as fast so, and of a random
        walk 1.05 to 1.4 times, in less memory.
        """
        rows = {v for v in variables(equation.invars) if v not in self.fixed}
        is_cheap = is_arithmetic(equation) and not is_transcendental(equation)
        return is_cheap and rows <= self.rows and self.rows.isdisjoint(equation.outvars)

    def _carries_up_to(self, time: int) -> int:
        """The carries that are run by loops up to a time, as bits."""
        return sum(1 << i for i, v in enumerate(self.carries) if self.times[v] <= time)

    def _shrinks(self, equation: Equation) -> bool:
        """Whether a product takes rows that are much larger than what it makes of them."""
        rows = [v for v in variables(equation.invars) if v not in self.fixed and _is_large(v)]
        return self.in_place and any(shrinks(equation, v) for v in rows)

    def _is_const(self, v: Var) -> bool:
        """Whether a loop takes `v` as it is; a matrix is cheaper added up than stored per step."""
        return v in self.fixed and (v not in self.accumulated or is_large_sum(v))

    def _time(self, atom: Atom) -> int:
        return -1 if isinstance(atom, Literal) else self.times[atom]

    def _made(self, wanted: Iterable[Var]) -> tuple[Var, ...]:
        """Those of `wanted` that some equation makes."""
        return self._in_order(v for v in wanted if v not in self.body.invars)

    def _in_order(self, wanted: Iterable[Var]) -> tuple[Var, ...]:
        """`wanted` in the order of the body, so that a plan is the same every time."""
        return tuple(sorted(set(wanted), key=self.position.__getitem__))


def shrinks(equation: Equation, v: Var) -> bool:
    """Whether `equation` is a product that makes far less of `v` than it is, as of a memory."""
    return multiply_adds(equation) > 0 and size(v) >= 16 * size(equation.outvars[0])


def _is_large(v: Var) -> bool:
    """Whether a loop had better read `v` step by step than a pass for a whole block.

    Measured on a CPU: memories of 32 KiB lost 6 % by that, and those of 256 KiB gained 10.
    """
    return size_in_bytes(v) > 1 << 16
