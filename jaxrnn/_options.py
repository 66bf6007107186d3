"""The options of `rnn` and of `scan`, and whether they make sense."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

METHODS = ("auto", "fused", "parallel", "sequential", "lax")


class Options(NamedTuple):
    """The arguments of `rnn` that are fixed when it is traced."""

    go_backwards: bool
    unroll: bool | int
    time_major: bool
    zero_output_for_mask: bool
    return_all_outputs: bool
    chunk: int | str | None
    remat: bool
    method: str

    @property
    def shows_held(self) -> bool:
        """Whether what is held at masked steps is among the outputs."""
        return self.return_all_outputs and not self.zero_output_for_mask


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


def engine_options(chunk: Any, remat: Any, method: Any) -> dict[str, Any]:
    """The engine's options in plain Python, or the ValueError that a wrong one deserves."""
    is_count = isinstance(chunk, int | np.integer) and not isinstance(chunk, bool) and chunk >= 1
    is_auto = isinstance(chunk, str) and chunk == "auto"
    if not (chunk is None or is_auto or is_count):
        raise ValueError(
            f"chunk is {chunk!r}; expected 'auto', None, or a number of timesteps n >= 1."
        )
    if isinstance(remat, jax.core.Tracer):
        raise ValueError(_traced("remat", "a Python bool"))
    if not isinstance(remat, bool | np.bool_):
        raise ValueError(f"remat is {remat!r}; expected True or False.")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(map(repr, METHODS))}.")
    return {
        "chunk": int(chunk) if is_count else chunk,
        "remat": bool(remat),
        "method": method,
    }


def flag(name: str, value: Any) -> bool:
    """A Python bool, or an error that says why a traced value cannot be one."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(_traced(name, "a Python bool"))
    if isinstance(value, str) or np.ndim(value):
        raise ValueError(f"{name} is {value!r}; expected True or False.")
    return bool(value)


def normalize_unroll(unroll: Any, time: Any) -> bool | int:
    """`unroll` as `lax.scan` takes it."""
    if isinstance(unroll, bool | np.bool_):
        if unroll and not isinstance(time, int):
            raise ValueError(
                f"unroll=True needs a fixed number of timesteps, but the time axis of inputs has "
                f"the symbolic length {time}. Pass unroll=False, or an integer."
            )
        return bool(unroll)
    if isinstance(unroll, jax.core.Tracer):
        raise ValueError(_traced("unroll", "a Python bool or integer"))
    try:
        steps = operator.index(unroll)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ValueError(f"unroll is {unroll!r}; expected a bool or an integer n >= 1.")
    return steps


def _traced(name: str, expected: str) -> str:
    return (
        f"{name} is a traced value; expected {expected}. Under jit, name it in `static_argnames` "
        f"or bind it with `functools.partial`."
    )


def time_of(xs: PyTree, length: Any) -> int | None:
    """The number of timesteps; None where it is symbolic or for `lax.scan` to complain about."""
    leaves = jax.tree.leaves(xs)
    if any(jnp.ndim(x) == 0 for x in leaves):
        return None
    times = {x.shape[0] for x in leaves} | ({length} if length is not None else set())
    time = times.pop() if len(times) == 1 else None
    return time if isinstance(time, int) else None
