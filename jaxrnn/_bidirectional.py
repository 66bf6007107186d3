"""Two recurrences over one sequence, one from each end, with outputs aligned in time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrnn._rnn import rnn

__all__ = ["bidirectional"]


def bidirectional(
    forward_step: Callable[..., Any],
    backward_step: Callable[..., Any],
    inputs: Any,
    forward_states: Any,
    backward_states: Any,
    *,
    mask: ArrayLike | None = None,
    unroll: bool | int = False,
    input_length: ArrayLike | None = None,
    time_major: bool = False,
    zero_output_for_mask: bool = False,
    return_all_outputs: bool = True,
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
        unroll: False, True or the number of steps in one loop iteration.
        input_length: integer, or integers `[B]`: steps at `t >= input_length` are masked.
        time_major: whether `inputs`, `mask` and outputs are `[T, B, ...]`.
        zero_output_for_mask: whether masked rows of the outputs are zeros. Otherwise they hold
            the output of the step processed before: the one on their left in the forward outputs,
            on their right in the backward outputs.
        return_all_outputs: if False, each of the outputs is its `last_output` with a time axis
            of 1.
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

    def run(step_function: Callable[..., Any], states: Any, go_backwards: bool) -> Any:
        return rnn(
            step_function,
            inputs,
            states,
            go_backwards=go_backwards,
            mask=mask,
            unroll=unroll,
            input_length=input_length,
            time_major=time_major,
            zero_output_for_mask=zero_output_for_mask,
            return_all_outputs=return_all_outputs,
            chunk=chunk,
            remat=remat,
            method=method,
        )

    last_forward, forward, forward_end = run(forward_step, forward_states, go_backwards=False)
    last_backward, backward, backward_end = run(backward_step, backward_states, go_backwards=True)
    # rnn returns outputs in processing order.
    aligned = jax.tree.map(lambda leaf: jnp.flip(leaf, 0 if time_major else 1), backward)
    return (last_forward, last_backward), (forward, aligned), (forward_end, backward_end)
