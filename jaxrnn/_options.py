"""The options of `scan`, and whether they make sense."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any

METHODS = ("auto", "fused", "parallel", "sequential", "lax")


class ScanOptions(NamedTuple):
    """The arguments of `scan` that are fixed when it is traced."""

    length: Any
    reverse: bool
    unroll: int | bool
    chunk: int | str | None
    remat: bool
    method: str

    @property
    def is_hashable(self) -> bool:
        """Whether they can be looked up; a mistake may not be."""
        try:
            hash(self)
        except TypeError:
            return False
        return True


def as_int(length: Any) -> Any:
    """A length as a Python number, if it is a whole one."""
    try:
        return operator.index(length)
    except TypeError:
        return int(length) if isinstance(length, float) and length.is_integer() else length


def check_options(chunk: Any, remat: Any, method: Any) -> None:
    """Raises the ValueError that a wrong option of the engine deserves."""
    is_count = isinstance(chunk, int) and not isinstance(chunk, bool) and chunk >= 1
    is_auto = isinstance(chunk, str) and chunk == "auto"
    if not (chunk is None or is_auto or is_count):
        raise ValueError(
            f"chunk is {chunk!r}; expected 'auto', None, or a number of timesteps n >= 1."
        )
    if not isinstance(remat, bool):
        raise ValueError(f"remat is {remat!r}; expected True or False.")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(map(repr, METHODS))}.")


def time_of(xs: PyTree, length: Any) -> int | None:
    """The number of timesteps; None where it is symbolic or for `lax.scan` to complain about."""
    leaves = jax.tree.leaves(xs)
    if any(jnp.ndim(x) == 0 for x in leaves):
        return None
    times = {x.shape[0] for x in leaves} | ({length} if length is not None else set())
    time = times.pop() if len(times) == 1 else None
    return time if isinstance(time, int) else None
