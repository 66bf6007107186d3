"""How often to measure, and one measurement."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from time import perf_counter
from typing import TypeVar

Candidate = TypeVar("Candidate")

# What goes before a call (another candidate, in this process or the next) leaves caches cold and
# threads asleep; calls shorter than this are warmed up before they count.
WARM_UP_BELOW_S = 0.02

MIN_ROUNDS = 5

# How often a candidate is compiled; like all that is timed, in turns with the others.
COMPILATIONS = 3


def in_turns(candidates: Iterable[Candidate], turns: Iterable[int]) -> Iterator[Candidate]:
    """All candidates in every turn, whose numbers are `turns`, in alternating direction."""
    forwards = list(candidates)
    for turn in turns:
        yield from forwards if turn % 2 == 0 else reversed(forwards)


def time_calls(call: Callable[[], object], repeats: int, warm_up: bool) -> float:
    """Median seconds of a call that returns when its work is done."""
    if warm_up:
        call()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return median(seconds)


def plan(
    estimates: Sequence[float], *, budget_s: float, visit_s: float, max_rounds: int
) -> tuple[int, list[int]]:
    """Rounds for a group of candidates, and how often each repeats its call in a round.

    Args:
        estimates: seconds of one call, for each candidate.
        budget_s: what the slowest candidate may take in all rounds together; the least number of
            rounds is kept even so.
        visit_s: how long a candidate's turn should last, at least.
        max_rounds: enough for the shortest calls.
    """
    turns = [max(estimate, visit_s) for estimate in estimates]
    rounds = min(max_rounds, max(MIN_ROUNDS, int(budget_s / max(turns))))
    return rounds, [max(1, round(visit_s / estimate)) for estimate in estimates]
