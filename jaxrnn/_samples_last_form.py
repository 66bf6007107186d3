"""How a loop holds arrays of samples, where that is not as the rest of the engine has them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Form(NamedTuple):
    """Arrays `[samples, units]` with the samples on the last axis.

    Even, an array is one row, `[1, units * samples]`. XLA on a CPU makes one long loop of what is
    done to rows, and does not fuse their concatenation with what makes its parts, which it then
    could not vectorise. But an array must be of the size of those that it meets, or an index has to
    be divided for each number. Uneven, it is the transpose, `[units, samples]`.

    Attributes:
        samples: their number.
        is_even: whether arrays are rows.
    """

    samples: int
    is_even: bool

    def hold(self, array: Array) -> Array:
        """`array` in this form; if it is a lone row of units, one for each of the samples."""
        if array.shape[0] == 1:
            array = jnp.broadcast_to(array, (self.samples, array.shape[1]))
        return array.T.reshape(1, -1) if self.is_even else array.T

    def release(self, held: Array) -> Array:
        """What was held, `[samples, units]`."""
        return (held.reshape(-1, self.samples) if self.is_even else held).T

    def ranges(self, units: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Ranges of units, as ranges of `axis`."""
        length = self.samples if self.is_even else 1
        return [(start * length, stop * length) for start, stop in units]

    @property
    def axis(self) -> int:
        """The axis on which the units lie."""
        return 1 if self.is_even else 0
