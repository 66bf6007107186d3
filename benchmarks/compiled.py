"""A JAX function compiled ahead of time, and as often as one wants to know what that costs."""

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import jax


class Compiled(NamedTuple):
    """A compiled call on fixed arguments.

    Attributes:
        call: runs it, waits for the results and returns them.
        compile_s: seconds that it took to trace, lower and compile.
        compile_again: does it once more, from nothing, and returns the seconds that it took.
        temp_bytes: what it holds between its arguments and results; in a gradient mostly what
            the forward pass saves for the backward pass.
        program: the lowered program as text.
    """

    call: Callable[[], Any]
    compile_s: float
    compile_again: Callable[[], float]
    temp_bytes: int
    program: str


def compile_call(function: Callable[..., Any], *arguments: Any) -> Compiled:
    """Traces, lowers and compiles `function(*arguments)`, from nothing."""
    lowered, executable, seconds = _compile(function, arguments)
    return Compiled(
        call=lambda: jax.block_until_ready(executable(*arguments)),
        compile_s=seconds,
        compile_again=lambda: _compile(function, arguments)[-1],
        temp_bytes=executable.memory_analysis().temp_size_in_bytes,
        program=lowered.as_text(),
    )


def _compile(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[jax.stages.Lowered, jax.stages.Compiled, float]:
    jax.clear_caches()
    start = perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    executable = lowered.compile()
    return lowered, executable, perf_counter() - start
