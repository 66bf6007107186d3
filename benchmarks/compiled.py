"""A JAX function compiled ahead of time, with what its compilation cost."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import jax

_COMPILATIONS = 3


class Compiled(NamedTuple):
    """A compiled call on fixed arguments.

    Attributes:
        call: runs it, waits for the results and returns them.
        compile_s: seconds to trace, lower and compile, the median of several times.
        temp_bytes: what it holds between its arguments and results; in a gradient mostly what
            the forward pass saves for the backward pass.
        program: the lowered program as text.
    """

    call: Callable[[], Any]
    compile_s: float
    temp_bytes: int
    program: str


def compile_call(function: Callable[..., Any], *arguments: Any) -> Compiled:
    """Traces, lowers and compiles `function(*arguments)`, each time from nothing."""
    seconds = []
    for _ in range(_COMPILATIONS):
        jax.clear_caches()
        start = perf_counter()
        lowered = jax.jit(function).lower(*arguments)
        executable = lowered.compile()
        seconds.append(perf_counter() - start)
    return Compiled(
        call=lambda: jax.block_until_ready(executable(*arguments)),
        compile_s=median(seconds),
        temp_bytes=executable.memory_analysis().temp_size_in_bytes,
        program=lowered.as_text(),
    )
