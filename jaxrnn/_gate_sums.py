"""Columns of several arrays that are only added to each other: those of the sum of the arrays.

    split(a)[i] + split(b)[i] = split(a + b)[i]

A step adds its gates one by one, as it is written or as `_algebra.py` has rewritten it. But the
transpose of its tangent has to put the gates together again for every product: only once, and in
the loop that makes them, if the tangent adds first and splits then.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from jaxrnn._equations import column_ranges
from jaxrnn._jaxpr import Program, Var, dtype, shape, size, variables
from jaxrnn._primitives import add_any_p, add_p


class TakenApart(NamedTuple):
    """A sum of arrays, of which only ranges of the last axis are read.

    Attributes:
        terms: the arrays.
        cuts: the ranges, which make up the whole axis.
        outs: what each range of the sum is called in the program.
        unread: the ranges of the terms, which nothing else reads.
    """

    terms: tuple[Var, ...]
    cuts: tuple[tuple[int, int], ...]
    outs: tuple[Var, ...]
    unread: frozenset[Var]


def rejoined(program: Program, uses: Mapping[Var, int]) -> list[TakenApart]:
    """The sums that a program makes range by range, of two arrays or more.

    Args:
        program: the program.
        uses: how often each of its variables is read, or is a result.
    """
    found = {each.outs[0]: each for each in _taken_apart(program, uses)}
    while True:
        places = {
            v: (each, i) for each in found.values() for i, v in enumerate(each.outs) if uses[v] == 1
        }
        sums: dict[tuple[TakenApart, TakenApart], dict[int, Var]] = defaultdict(dict)
        for equation in program.equations:
            if equation.primitive in (add_p, add_any_p):
                operands = [places[v] for v in variables(equation.invars) if v in places]
                if len(operands) == 2 and _match(*operands):
                    (one, i), (other, _) = operands
                    sums[one, other][i] = equation.outvars[0]
        complete = [pair for pair, outs in sums.items() if len(outs) == len(pair[0].outs)]
        if not complete:
            return [each for each in found.values() if each.terms[1:]]
        for one, other in complete:
            del found[one.outs[0]], found[other.outs[0]]
            outs = tuple(v for _, v in sorted(sums[one, other].items()))
            unread = one.unread.union(other.unread, one.outs, other.outs)
            found[outs[0]] = TakenApart(one.terms + other.terms, one.cuts, outs, unread)


def _taken_apart(program: Program, uses: Mapping[Var, int]) -> list[TakenApart]:
    """The arrays of which nothing is read but ranges of the last axis, each column once."""
    parts: dict[Var, list[tuple[tuple[int, int], Var]]] = defaultdict(list)
    readers: Counter[Var] = Counter()
    for equation in program.equations:
        if (ranges := column_ranges(equation)) is not None:
            for v in variables(equation.invars):
                parts[v] += zip(ranges, equation.outvars, strict=True)
                readers[v] += 1
    every = []
    for v, made in parts.items():
        cuts, outs = zip(*sorted(made, key=lambda part: part[0]), strict=True)
        bounds = [0, *(stop for _, stop in cuts)]
        whole = bounds[:-1] == [start for start, _ in cuts] and bounds[-1] == shape(v)[-1]
        # Of few rows one array is sooner put together: measured on a CPU, one sample lost 4 %.
        if whole and readers[v] == uses[v] and size(v) >= 8 * bounds[-1]:
            every.append(TakenApart((v,), cuts, outs, frozenset()))
    return every


def _match(one: tuple[TakenApart, int], other: tuple[TakenApart, int]) -> bool:
    """Whether two ranges are the same range of two arrays that are alike."""
    (a, i), (b, k) = one, other
    v, w = a.terms[0], b.terms[0]
    alike = (shape(v), dtype(v)) == (shape(w), dtype(w))
    return a is not b and i == k and a.cuts == b.cuts and alike
