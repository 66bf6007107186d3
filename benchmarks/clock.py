"""How often to measure, one measurement, and which ones count."""

import os
from collections.abc import Callable, Sequence
from statistics import fmean, median
from time import perf_counter
from typing import NamedTuple, TypeVar

import psutil

Candidate = TypeVar("Candidate")

# What goes before a call (another candidate, in this process or the next) leaves caches cold and
# threads asleep; calls shorter than this are warmed up before they count.
WARM_UP_BELOW_S = 0.02

MIN_ROUNDS = 5

# How often a candidate is compiled: once before it runs, then in turns with the others.
COMPILATIONS = 3

# A virtual machine's cores are lent to others now and then. That is noticed where work is shared
# out among all cores and not in a loop on one of them: with a quarter of the time taken, 1.4 times
# as fast became 0.94 times. This share of the time is little enough.
STOLEN = 0.01
# How long to go on, in seconds, where more is taken, if that is longer than twice as many rounds.
PATIENCE_S = 3


class Rounds(NamedTuple):
    """What one candidate after the other took, round by round.

    Attributes:
        seconds: for each candidate one number per round.
        stolen: the share of the cores' time that was lent to others in these rounds.
    """

    seconds: list[list[float]]
    stolen: float


def measure(
    candidates: Sequence[Candidate], count: int, visit: Callable[[Candidate], float]
) -> Rounds:
    """The seconds that `visit` tells of each candidate, in `count` rounds in which all take turns.

    Every other round goes through them backwards. Rounds in which a virtual machine lost more than
    `STOLEN` of its time are measured again, within limits; those that lost least count.
    """
    rounds: list[list[float]] = []
    shares: list[float] = []
    began = perf_counter()
    while sum(share <= STOLEN for share in shares) < count and (
        len(rounds) < 2 * count or perf_counter() - began < PATIENCE_S
    ):
        start, before = perf_counter(), _stolen_s()
        order = range(len(candidates))[:: -1 if len(rounds) % 2 else 1]
        seconds = {i: visit(candidates[i]) for i in order}
        rounds.append([seconds[i] for i in sorted(order)])
        lent = (_stolen_s() - before) / (perf_counter() - start)
        shares.append(lent / (os.cpu_count() or 1))
    counted = sorted(sorted(range(len(rounds)), key=shares.__getitem__)[:count])
    columns = zip(*(rounds[i] for i in counted), strict=True)
    return Rounds(list(map(list, columns)), fmean(shares[i] for i in counted))


def _stolen_s() -> float:
    """Seconds of its cores' time that this machine has lost to others, where it is told so."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


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
