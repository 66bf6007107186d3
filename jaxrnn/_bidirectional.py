"""Two recurrences over one sequence, one from each end, with outputs aligned in time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxrnn._eager import run_compiled
from jaxrnn._rnn import prepare, run

__all__ = ["bidirectional"]


def bidirectional(
    forward_step: Callable[..., Any],
    backward_step: Callable[..., Any],
    inputs: Any,
    forward_states: Any,
    backward_states: Any,
    *,
    mask: ArrayLike | None = None,
    constants: Any = None,
    unroll: bool | int = False,
    input_length: ArrayLike | None = None,
    time_major: bool = False,
    zero_output_for_mask: bool = False,
    return_all_outputs: bool = True,
    reset: ArrayLike | None = None,
    chunk: int | str | None = "auto",
    remat: bool = False,
    method: str = "auto",
) -> tuple[tuple[Any, Any], tuple[Any, Any], tuple[Any, Any]]:
    """Runs `rnn` forward and backward over the same inputs.

    Every result is a pair `(forward, backward)`; the usual next step joins it on the last axis::

        last_outputs, outputs, states = bidirectional(
            cell.step(params["forward"]),
            cell.step(params["backward"]),
            inputs,
            cell.initial_states(batch),
            cell.initial_states(batch),
            input_length=lengths,
        )
        features = jnp.concatenate(outputs, axis=-1)

    Letters: B samples (batch), T timesteps, `...` any further axes.

    Padding is safe: a sample's backward recurrence holds its initial states until it comes to that
    sample's last valid step, so that the results are those of the sequence without its padding,
    whatever the padding contains, NaN included.

    Args:
        forward_step: step function of the recurrence from the first step to the last,
            `(input_t, states) -> (output_t, new_states)`, as `rnn` takes it.
        backward_step: step function of the recurrence from the last step to the first. Its states
            and outputs need not resemble those of `forward_step`.
        inputs: array `[B, T, ...]` of at least 3 axes, or any pytree of such arrays.
        forward_states: initial states of the forward recurrence, as `rnn` takes them.
        backward_states: initial states of the backward recurrence: where it starts, at each
            sample's last valid step.
        mask: `[B, T]` or `[B, T, 1]`, bool or numeric; zero means masked. Gaps are allowed.
        constants: list or tuple of arrays or pytrees that both steps get after their states.
        unroll: False, True or the number of steps in one loop iteration.
        input_length: integer, or integers `[B]`: steps at `t >= input_length` are masked.
        time_major: whether `inputs`, `mask`, `reset` and outputs are `[T, B, ...]`.
        zero_output_for_mask: whether masked rows of the outputs are zeros. Otherwise they hold
            the output of the step processed before: the one on their left in the forward outputs,
            on their right in the backward outputs.
        return_all_outputs: if False, each of the outputs is only its last one, with a time axis
            of 1, as in `rnn`.
        reset: like `mask`; true where a sample begins anew, at the first step of a document, say.
            Neither recurrence looks beyond: the backward one starts again from its initial states
            at the last valid step before each such step. A masked step resets nothing.
        chunk: steps in one block of time, as in `rnn`.
        remat: whether to recompute within blocks in the backward pass, as in `rnn`.
        method: how the loops run, as in `rnn`.

    Returns:
        A tuple `(last_outputs, outputs, states)` of pairs:
            last_outputs: each sample's output where a recurrence ended, `[B, ...]`: forward at its
                last valid step, backward at its first.
            outputs: `[B, T, ...]`, aligned in time: row t of both belongs to row t of `inputs`.
            states: the states where a recurrence ended, each in the container it came in.

    Raises:
        ValueError: as `rnn` does, for shapes, structures and options.
        TypeError: as `rnn` does, for dtypes and callables.
    """

    def run_one(step_function: Callable[..., Any], states: Any, go_backwards: bool) -> Any:
        options, operands = prepare(
            step_function,
            inputs,
            states,
            go_backwards,
            mask,
            constants,
            unroll,
            input_length,
            time_major,
            zero_output_for_mask,
            return_all_outputs,
            reset=reset,
            chunk=chunk,
            remat=remat,
            method=method,
        )
        if go_backwards and operands.reset is not None:
            operands = operands._replace(reset=_before_starts(operands.reset, operands.valid))
        return run_compiled("rnn", run, step_function, options, operands)

    with _named("forward"):
        last_forward, forward, forward_end = run_one(forward_step, forward_states, False)
    with _named("backward"):
        last_backward, backward, backward_end = run_one(backward_step, backward_states, True)
    # rnn returns outputs in processing order.
    aligned = jax.tree.map(lambda leaf: jnp.flip(leaf, 0 if time_major else 1), backward)
    return (last_forward, last_backward), (forward, aligned), (forward_end, backward_end)


@contextlib.contextmanager
def _named(direction: str) -> Iterator[None]:
    """Errors of `rnn` say which recurrence is meant, whose arguments have other names here."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"This is the {direction} recurrence of bidirectional: step_function is "
            f"{direction}_step, initial_states are {direction}_states."
        )
        raise


def _before_starts(starts: Array, valid: Array | None) -> Array:
    """The valid steps whose next valid step is a start; all `[T, B]`, and starts are valid."""
    if valid is None:
        return jnp.concatenate([starts[1:], jnp.zeros_like(starts[:1])])
    none = np.iinfo(np.int32).max

    def next_of(flags: Array) -> Array:
        """For each step the number of the next one that is flagged, or `none`."""
        at = jnp.where(flags, lax.broadcasted_iota(jnp.int32, flags.shape, 0), none)
        following = jnp.concatenate([at[1:], jnp.full_like(at[:1], none)])
        return lax.cummin(following, 0, reverse=True)

    start = next_of(starts)
    return valid & (start != none) & (start == next_of(valid))
