"""`rnn`: Keras's recurrent loop as a pure JAX function. Check, arrange, run, assemble."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrnn import _arguments, _masking
from jaxrnn._arguments import Operands, Step
from jaxrnn._eager import is_jit_disabled, run_compiled
from jaxrnn._finite_gradient import has_finite_gradient
from jaxrnn._jaxpr import program_of
from jaxrnn._options import Options, ScanOptions, engine_options, flag, normalize_unroll
from jaxrnn._scan import scan_along
from jaxrnn._sharding import placed_as, varying_as, zeros_of
from jaxrnn._time_axis import time_first

Array = jax.Array
PyTree = Any
Result = tuple[PyTree, PyTree, PyTree]


def rnn(
    step_function: Step,
    inputs: PyTree,
    initial_states: PyTree,
    go_backwards: bool = False,
    mask: Any = None,
    constants: PyTree = None,
    unroll: bool | int = False,
    input_length: Any = None,
    time_major: bool = False,
    zero_output_for_mask: bool = False,
    return_all_outputs: bool = True,
    *,
    reset: Any = None,
    chunk: int | str | None = "auto",
    remat: bool = False,
    method: str = "auto",
) -> Result:
    """Iterates `step_function` over the time axis of `inputs`.

    The `rnn` of `tf.contrib.keras.backend` (TensorFlow r1.1) with the parameters that Keras 2 and 3
    added, as a pure function: it may be jitted, vmapped, differentiated, exported and sharded, as
    `jax.lax.scan` may.

    B is the number of samples, T of timesteps. "First", "previous" and "last" are meant in
    processing order, from T-1 down to 0 when `go_backwards`.

    Args:
        step_function: pure function `(input_t, states) -> (output_t, new_states)`. `input_t` is
            `inputs` without its time axis; `states` comes in the container of `initial_states`
            (a list for a bare array), followed by `constants`; `output_t` is an array `[B, ...]`
            or a pytree of them; `new_states` has the structure and shapes of `initial_states`.
        inputs: array `[B, T, ...]` of at least 3 axes, or a pytree of them.
        initial_states: list or tuple of states, each an array `[B, ...]` or a pytree of them; or
            one bare array; or, without `constants`, any pytree. States keep the dtypes given here.
        go_backwards: whether to process the last timestep first; `outputs` are in processing
            order, as in Keras.
        mask: `[B, T]` or `[B, T, 1]`, bool or numeric, zero where a step is masked. At a masked
            step the sample's states stay and its output is its previous output; before its first
            valid step that is `initial_states[0]` if this has the structure and shapes of the
            output, else zeros. Masked inputs may hold anything, NaN included, without a trace in
            results or gradients.
        constants: list or tuple of arrays or pytrees handed to every step after the states; numbers
            come as arrays, anything else as it is.
        unroll: True to unroll the loop, or an integer n for n steps per iteration. Changes results
            by rounding at most.
        input_length: integer, or integers `[B]`: steps at `t >= input_length` (as stored, before
            any reversal) are masked: all of them from 0 down, none from T up. With a `mask`, a step
            counts if both let it.
        time_major: whether `inputs`, `mask`, `reset` and `outputs` are `[T, B, ...]`.
        zero_output_for_mask: whether masked rows of `outputs` are zeros instead.
        return_all_outputs: if False, `outputs` is only the last one, with a time axis of 1, and no
            buffer of T outputs is allocated.
        reset: like `mask`; where true, the sample's states are set to `initial_states` before the
            step runs. A masked step resets nothing.
        chunk: timesteps per block, see `jaxrnn.scan`. Changes results by rounding at most.
        remat: whether the backward pass recomputes each block instead of storing its steps.
        method: how to run the loop, see `jaxrnn.scan`.

    Returns:
        A tuple `(last_output, outputs, new_states)`. `last_output`, `[B, ...]`, is each sample's
        latest valid output, even when `zero_output_for_mask`; of a sample without a valid step it
        is what `outputs` has for it. `outputs` is `[B, T, ...]`.
        `new_states` has the container of `initial_states`, a list for a bare array.

    Raises:
        ValueError: for a shape, structure or option that does not fit.
        TypeError: if `step_function` is not callable, an argument is no array of numbers, or a
            state changes its dtype other than between floating types.

    Example:
        A running sum, the third step of which is masked.

        >>> def step(input_t, states):
        ...     total = states[0] + input_t
        ...     return total, [total]
        >>> mask = jnp.array([[True, True, False, True]])
        >>> initial_states = [jnp.zeros((1, 2))]
        >>> last, outputs, states = rnn(step, jnp.ones((1, 4, 2)), initial_states, mask=mask)
        >>> outputs[0, :, 0].tolist()
        [1.0, 2.0, 2.0, 3.0]

    Typed PRNG keys (`jax.random.key`) in the states belong to the call, not to a sample: they move
    on at masked steps too, and no reset sets them back.
    """
    options, operands = prepare(
        step_function,
        inputs,
        initial_states,
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
    return run_compiled("rnn", run, step_function, options, operands)


def prepare(
    step_function: Step,
    inputs: PyTree,
    initial_states: PyTree,
    go_backwards: bool,
    mask: Any,
    constants: PyTree,
    unroll: bool | int,
    input_length: Any,
    time_major: bool,
    zero_output_for_mask: bool,
    return_all_outputs: bool,
    *,
    reset: Any,
    chunk: int | str | None,
    remat: bool,
    method: str,
) -> tuple[Options, Operands]:
    """The arguments of `rnn`, checked and in normal form."""
    if not callable(step_function):
        raise TypeError(
            f"step_function is {_arguments.describe(step_function)}; expected a function "
            f"(input_t, states) -> (output_t, new_states), such as cell.step(params) of a cell."
        )
    engine = engine_options(chunk, remat, method)
    time_major = flag("time_major", time_major)
    operands = _arguments.normalize_operands(
        inputs, initial_states, constants, mask, input_length, reset, time_major
    )
    time = jax.tree.leaves(operands.inputs)[0].shape[0 if time_major else 1]
    options = Options(
        go_backwards=flag("go_backwards", go_backwards),
        unroll=normalize_unroll(unroll, time),
        time_major=time_major,
        zero_output_for_mask=flag("zero_output_for_mask", zero_output_for_mask),
        return_all_outputs=flag("return_all_outputs", return_all_outputs),
        **engine,
    )
    return options, operands


def run(
    step_function: Step,
    options: Options,
    operands: Operands,
    scan: Callable[..., tuple[PyTree, PyTree]] = scan_along,
) -> Result:
    """`rnn` from its normal form on; `scan` is there for `explain` to listen at."""
    lying, states, constants, valid, reset = operands
    axis = 0 if options.time_major else 1
    inputs = jax.tree.map(functools.partial(time_first, axis=axis), lying)
    step = _arguments.checked_step(step_function, states, constants)
    flags = [given for given in (valid, reset) if given is not None]
    states, known = _settled(step, inputs, states, flags)

    # What a masked step, or a call that wants the last output alone, has to remember beside the
    # states: nothing, if the output is the first state.
    hold = valid is not None or not options.return_all_outputs
    carry_output = hold and not known.output_is_state
    held = _initial_output(known.output_like, states, flags) if carry_output else None
    fill_input = fill_states = None
    if valid is not None:
        # At the state that is held such a step is as safe as at those that it begins with.
        fill_input, fill_states = _masking.substitutes(
            valid, inputs, None if known.has_finite_gradient else states, options.go_backwards
        )
    # Samples that hold a state of their own through such a step, which is fed what they hold.
    holding = valid if known.has_finite_gradient else None
    start = states if holding is None else _masking.zero_nonfinite_unstepped(holding, states)
    chunk = options.chunk
    time = jax.tree.leaves(inputs)[0].shape[0]
    selects = carry_output and not options.return_all_outputs and valid is not None
    if selects and isinstance(time, int) and chunk == "auto":
        # Selecting the last valid output takes the outputs of a block: let that not be all T.
        chunk = math.isqrt(time)

    def body(carry: PyTree, slice_t: PyTree) -> tuple[PyTree, PyTree]:
        old_states, held = carry
        input_t, valid_t, reset_t = slice_t
        if reset_t is not None:
            old_states = _masking.select(~reset_t, old_states, start)
        fed = old_states
        if valid_t is not None:
            input_t = _masking.select(valid_t, input_t, fill_input)
            if not known.has_finite_gradient:
                fed = _masking.select(valid_t, old_states, fill_states)
        output, new_states = step(input_t, fed)
        y = output
        if valid_t is not None:
            new_states = _masking.select(valid_t, new_states, old_states)
            if options.zero_output_for_mask:
                y = _masking.zero_unless(valid_t, output)
            if carry_output:
                output = _masking.select(valid_t, output, held)
            elif known.output_is_state:
                output = _first_state(new_states)
            if not options.zero_output_for_mask:
                y = output
        return (new_states, output if carry_output else None), (
            y if options.return_all_outputs else None
        )

    (new_states, held), outputs = scan(
        body,
        (start, held),
        (lying, valid, reset),
        (axis, 0, 0),
        axis,
        ScanOptions(
            length=None,
            reverse=options.go_backwards,
            unroll=options.unroll,
            chunk=chunk,
            remat=options.remat,
            method=options.method,
        ),
    )
    if holding is not None:
        new_states = _masking.select(jnp.any(holding, axis=0), new_states, states)
        if known.output_is_state and options.shows_held:
            first = _first_state(states)
            outputs = _masking.restore_nonfinite_unstepped(holding, outputs, first, axis)
    last = held if carry_output else _first_state(new_states)
    remembered = last if hold else None
    return *_assemble(options, valid, remembered, outputs), new_states


def _assemble(
    options: Options, valid: Array | None, remembered: PyTree, outputs: PyTree
) -> tuple[PyTree, PyTree]:
    """The last output and all outputs, as the caller wants them.

    Without an output that was `remembered` the last one is the last of all; without all of them
    the last one stands for them.
    """
    axis = 0 if options.time_major else 1
    last = 0 if options.go_backwards else -1
    last_output = remembered
    if remembered is None:
        last_output = jax.tree.map(lambda y: y[last] if axis == 0 else y[:, last], outputs)
    elif valid is not None and options.zero_output_for_mask:
        last_output = _masking.zero_unless(jnp.any(valid, axis=0), remembered)
    if not options.return_all_outputs:
        outputs = last_output
        if valid is not None and options.zero_output_for_mask:
            outputs = _masking.zero_unless(valid[last], outputs)
        outputs = jax.tree.map(lambda y: jnp.expand_dims(y, axis), outputs)
    elif options.go_backwards:
        outputs = jax.tree.map(lambda y: jnp.flip(y, axis), outputs)
    return last_output, outputs


class _Like(NamedTuple):
    """The types of a pytree's leaves. A class among its nodes may refuse to hold types."""

    types: list[jax.ShapeDtypeStruct]
    tree: Any


class _Known(NamedTuple):
    """What is to be known of a step.

    Attributes:
        output_like: what the output is like.
        state_types: the types of the new states.
        output_is_state: whether the output is, leaf by leaf, the first state.
        has_finite_gradient: see `_finite_gradient.py`.
    """

    output_like: _Like
    state_types: list[jax.ShapeDtypeStruct]
    output_is_state: bool
    has_finite_gradient: bool


def _settled(
    step: Step, inputs: PyTree, states: PyTree, flags: Sequence[Array]
) -> tuple[PyTree, _Known]:
    """The states, lying on a mesh as each step leaves them, and what is known of a step then.

    A state that is made of another one's old value lies as that does only a step later.
    """
    leaves, structure = jax.tree.flatten(_varying_as_all(states, flags))
    for _ in range(len(leaves) + 1):
        known = _trace_step(step, inputs, jax.tree.unflatten(structure, leaves))
        before, leaves = leaves, list(map(placed_as, leaves, known.state_types))
        if all(old is new for old, new in zip(before, leaves, strict=True)):
            break
    return jax.tree.unflatten(structure, leaves), known


def _varying_as_all(tree: PyTree, flags: Sequence[Array]) -> PyTree:
    """Under `shard_map`, what flags select from varies over the mesh as they do; keys stay."""
    types = list(map(jax.typeof, flags))

    def varying(leaf: Array) -> Array:
        return leaf if _masking.is_key(leaf) else functools.reduce(varying_as, types, leaf)

    return jax.tree.map(varying, tree)


def _trace_step(step: Step, inputs: PyTree, states: PyTree) -> _Known:
    tree: Any = None
    is_state = False

    def trace(inputs: PyTree, states: PyTree) -> tuple[list[Array], list[Array]]:
        nonlocal tree, is_state
        output, new_states = step(jax.tree.map(lambda x: x[0], inputs), states)
        leaves, tree = jax.tree.flatten(output)
        first, first_tree = jax.tree.flatten(_first_state(new_states))
        is_state = tree == first_tree and all(y is s for y, s in zip(leaves, first, strict=True))
        return leaves, jax.tree.leaves(new_states)

    if is_jit_disabled():
        results = trace(inputs, states)
        output, new_states = jax.eval_shape(lambda: results)
        return _Known(_Like(output, tree), new_states, is_state, has_finite_gradient=False)
    jaxpr, (output, new_states) = jax.make_jaxpr(trace, return_shape=True)(inputs, states)
    is_safe = has_finite_gradient(program_of(jaxpr.jaxpr), len(new_states))
    return _Known(_Like(output, tree), new_states, is_state, is_safe)


def _initial_output(output_like: _Like, states: PyTree, flags: Sequence[Array]) -> PyTree:
    """What is held before a sample's first valid step."""
    first, tree = jax.tree.flatten(_first_state(states))

    def is_like(state: Array, output: jax.ShapeDtypeStruct) -> bool:
        return state.shape == output.shape and _masking.is_key(state) == _masking.is_key(output)

    def cast(state: Array, output: jax.ShapeDtypeStruct) -> Array:
        to_real = jnp.iscomplexobj(state) and not jnp.issubdtype(output.dtype, jnp.complexfloating)
        return (state.real if to_real else state).astype(output.dtype)

    types = output_like.types
    if tree == output_like.tree and all(map(is_like, first, types)):
        held = list(map(placed_as, map(cast, first, types), types))
    else:
        held = list(map(zeros_of, types))
    return _varying_as_all(jax.tree.unflatten(output_like.tree, held), flags)


def _first_state(states: PyTree) -> PyTree:
    """`states[0]`, or None where the states are no sequence."""
    return states[0] if isinstance(states, list | tuple) and states else None
