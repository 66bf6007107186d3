"""Rows of all steps: read where they lie, and written once, where they will stay."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._fission import Loop
from jaxrnn._jaxpr import Atom
from jaxrnn._sharding import zeros_of
from jaxrnn._time_axis import time_first, time_on

Array = jax.Array
PyTree = Any
Step = Callable[[PyTree, PyTree], tuple[PyTree, list[Array]]]


class InPlace(NamedTuple):
    """Rows of a block that only loops read, left among the rows of all steps.

    Attributes:
        whole: the rows of all steps.
        indices: which of them are the block's.
        axis: the axis of time of `whole`.
    """

    whole: Array
    indices: Array
    axis: int = 0


def given_rows(rows: Array | InPlace) -> Array:
    """What a loop is given of rows, step by step."""
    return rows.indices if isinstance(rows, InPlace) else rows


def one_row(rows: Array | InPlace, given: Array) -> Array:
    """The row of one step, from what the loop is given of them."""
    return row_of(rows.whole, rows.axis, given) if isinstance(rows, InPlace) else given


def row_of(rows: Array, axis: int, index: Array | int) -> Array:
    """The row of one step, from `rows` of which `axis` is time."""
    return lax.dynamic_index_in_dim(rows, index, axis, keepdims=False, allow_negative_indices=False)


def block_of(rows: Array, axis: int, index: Array) -> Array:
    """The rows of a block, those of `index`, from `rows` of which `axis` is time."""
    taken = lax.dynamic_slice_in_dim(rows, index[0], len(index), axis, allow_negative_indices=False)
    return time_first(taken, axis)


def write(whole: Array, rows: Array, start: Array, axis: int) -> Array:
    """`whole` with `rows` among its own from `start` on; `axis` is time in both."""
    return lax.dynamic_update_slice_in_dim(whole, rows, start, axis, allow_negative_indices=False)


def add(whole: Array, rows: Array, start: Array, axis: int) -> Array:
    """As `write`, but the sum, of which the transpose reads the rows where they lie.

    That of `write` would set them to zero behind itself.
    """
    return whole + write(zeros_of(jax.typeof(whole)), rows, start, axis)


def adds_in_place(rows: Any) -> bool:
    """Whether XLA makes of a sum with zeros around some rows an update of these alone.

    Not so for dtypes that it converts to a wider one first.
    """
    return rows.dtype in (jnp.float32, jnp.float64)


class Writer:
    """Puts rows of one block, those of `index`, among those of all steps."""

    def __init__(
        self,
        outs: Sequence[Atom],
        whole: Sequence[Array | None],
        axes: Sequence[int],
        index: Array,
        put: Callable[[Array, Array, Array, int], Array] = write,
    ):
        """Says where the rows belong.

        Args:
            outs: what has a row for each step of the block.
            whole: for each of them the rows of all steps, or None where they are not to be put.
            axes: the axis of time of each of `whole`.
            index: the numbers of the block's steps.
            put: puts rows among all, `write` or `add`.
        """
        self.outs, self.whole, self.axes, self.index = outs, list(whole), axes, index
        self.put = put
        self.missing = {place for place, rows in enumerate(whole) if rows is not None}

    def scan(
        self, loop: Loop, step: Step, init: PyTree, xs: PyTree, scan: Callable[..., Any]
    ) -> tuple[PyTree, list[Array]]:
        """`scan(step, init, xs)` of a loop, each step of which puts its rows where they belong."""
        places = [place for place in sorted(self.missing) if self.outs[place] in loop.ys]
        axes = [self.axes[place] for place in places]
        put = [self.outs[place] for place in places]
        others = [v for v in loop.ys if v not in put]

        def putting(state: PyTree, x: PyTree) -> tuple[PyTree, list[Array]]:
            (state, whole), (i, x) = state, x
            state, ys = step(state, x)
            row: dict[Atom, Array] = dict(zip(loop.ys, ys, strict=True))
            whole = [
                self.put(rows, jnp.expand_dims(row[v], axis), i, axis)
                for v, rows, axis in zip(put, whole, axes, strict=True)
            ]
            return (state, whole), [row[v] for v in others]

        start = (init, [self.whole[place] for place in places])
        (state, whole), ys = scan(putting, start, (self.index, xs))
        rows: dict[Atom, Array] = dict(zip(others, ys, strict=True))
        for place, v, axis, written in zip(places, put, axes, whole, strict=True):
            self.whole[place] = written
            rows[v] = block_of(written, axis, self.index)
        self.missing.difference_update(places)
        return state, [rows[v] for v in loop.ys]

    def put_missing(self, ys: Sequence[Array]) -> None:
        """Puts the rows that no loop has put, all at once."""
        for place in self.missing:
            axis, whole = self.axes[place], self.whole[place]
            assert whole is not None, "what is missing is to be put"
            self.whole[place] = self.put(whole, time_on(ys[place], axis), self.index[0], axis)
