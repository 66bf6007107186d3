"""The arguments of `rnn` in normal form, and the errors about them and about the step.

Normal form has arrays for array-likes, no weak types, and flags with time first; inputs stay as
they lie. Each error names the argument or the path of the state in question, what came, what was
expected, and the remedy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrnn._eager import is_operand
from jaxrnn._masking import is_key

Array = jax.Array
PyTree = Any
Step = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class Operands(NamedTuple):
    """The array arguments of `rnn` in normal form.

    Attributes:
        inputs: pytree of arrays `[B, T, ...]`, or `[T, B, ...]` where time comes first.
        states: a list, a tuple or any other pytree, as the step wants to see it.
        constants: list or tuple of pytrees, maybe empty; what is no array in them is for the step.
        valid: `[T, B]`, bool; None when every step counts.
        reset: `[T, B]`, bool, true at valid steps only; None when there are no resets.
    """

    inputs: PyTree
    states: PyTree
    constants: PyTree
    valid: Array | None
    reset: Array | None


def normalize_operands(
    inputs: PyTree,
    initial_states: PyTree,
    constants: PyTree,
    mask: Any,
    input_length: Any,
    reset: Any,
    time_major: bool,
) -> Operands:
    """Checks the array arguments of `rnn` and brings them into normal form."""
    inputs, batch, time = _normalize_inputs(inputs, time_major)
    constants = _normalize_constants(constants)
    states = _normalize_states(initial_states, bool(constants))

    valid = None if mask is None else _normalize_flags("mask", mask, batch, time, time_major)
    if input_length is not None:
        within = _within_length(input_length, batch, time)
        valid = within if valid is None else valid & within
    if reset is not None:
        reset = _normalize_flags("reset", reset, batch, time, time_major)
        if valid is not None:
            reset = reset & valid
    for name, argument in (("mask", mask), ("input_length", input_length), ("reset", reset)):
        if argument is not None:
            _check_per_sample(name, states, batch)
    return Operands(inputs, states, constants, valid, reset)


def checked_step(step_function: Step, states: PyTree, constants: PyTree) -> Step:
    """The user's step with constants appended, and with its result checked and in normal form.

    The new states come back in the container, shapes and dtypes of `states`; every leaf of the
    output has the batch axis.
    """

    def step(input_t: PyTree, states_t: PyTree) -> tuple[PyTree, PyTree]:
        batch = jax.tree.leaves(input_t)[0].shape[0]
        # Containers of its own: a step may write into what it is given.
        input_t, given, beside = jax.tree.map(lambda leaf: leaf, (input_t, states_t, constants))
        if beside:
            given = given + type(given)(beside)
        try:
            result = step_function(input_t, given)
        except Exception as error:
            error.add_note(
                "rnn calls step_function(input_t, states), in this order, and here with\n"
                + _types(input_t=input_t, states=given)
            )
            if isinstance(error, TypeError | ValueError):
                _note_other_batch(error, states, batch)
            raise
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise ValueError(
                f"step_function returned {describe(result)}; expected a pair "
                f"(output_t, new_states)."
            )
        output, new_states = result
        new_states = _match_container(new_states, states, len(constants))
        return _check_output(output, batch), _match_leaves(new_states, states, batch)

    return step


def _note_other_batch(error: Exception, states: PyTree, batch: Any) -> None:
    """Hints at states that are for another number of samples than the inputs, it seems."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):  # a raw random key has no samples
            hint = _other_batch(jax.tree_util.keystr(path), leaf, batch)
            if hint:
                error.add_note(hint.strip())


def _other_batch(path: str, state: Array, batch: Any) -> str:
    if not state.ndim or state.shape[0] == batch:
        return ""
    first = state.shape[0]
    return f" initial_states{path} has {first} on its first axis, inputs have {batch} samples."


def _types(**values: PyTree) -> str:
    """The name and type of each array, a line each."""

    def kind(leaf: Any) -> str:
        is_array = isinstance(leaf, jax.Array)
        return f"{leaf.dtype}{list(leaf.shape)}" if is_array else describe(leaf)

    leaves = jax.tree_util.tree_leaves_with_path(values)
    return "\n".join(
        f"  {path[0].key}{jax.tree_util.keystr(path[1:])}: {kind(leaf)}" for path, leaf in leaves
    )


def _is_sequence(states: PyTree) -> bool:
    """Whether `states` is a plain list or tuple of states (and no NamedTuple, say)."""
    return isinstance(states, list | tuple) and not hasattr(states, "_fields")


def _normalize_inputs(inputs: PyTree, time_major: bool) -> tuple[PyTree, Any, Any]:
    axes = "[T, B, ...]" if time_major else "[B, T, ...]"
    leaves, structure = jax.tree_util.tree_flatten_with_path(inputs)
    if not leaves:
        raise ValueError(
            f"inputs holds no arrays; expected an array {axes}, or a pytree of them. A step that "
            f"reads no input gets one without features, jnp.zeros({axes.replace('...', '0')})."
        )
    named = [("inputs" + jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    arrays = [(name, _as_array(name, leaf)) for name, leaf in named]
    for name, array in arrays:
        if array.ndim < 3:
            raise ValueError(
                f"{name} has shape {array.shape}; expected at least 3 axes {axes}. A series of "
                f"scalars needs a feature axis: x[..., None]. One sample alone, as under "
                f"jax.vmap, needs a batch axis: jnp.expand_dims(x, {int(time_major)})."
            )
    first_name, first = arrays[0]
    for name, array in arrays:
        if array.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"{name} has shape {array.shape}, but {first_name} has shape {first.shape}; "
                f"expected the same first two axes {axes} in every leaf of inputs."
            )
    time, batch = first.shape[:2] if time_major else first.shape[1::-1]
    if isinstance(time, int) and time == 0:
        raise ValueError(
            f"{first_name} has shape {first.shape}: no timesteps; expected T >= 1 in {axes}."
        )
    return jax.tree.unflatten(structure, [array for _, array in arrays]), batch, time


def _normalize_constants(constants: PyTree) -> PyTree:
    if constants is None:
        return []
    if not _is_sequence(constants):
        raise ValueError(
            f"constants is {describe(constants)}; expected a list or tuple of arrays or pytrees. "
            f"Wrap a single constant: constants=[c]."
        )

    def normalize(path: Any, leaf: Any) -> Any:
        # Inside `jit` as outside, where `jit` makes arrays of what it takes.
        name = "constants" + jax.tree_util.keystr(path)
        return _as_array_or_weak(name, leaf) if is_operand(leaf) else leaf

    return jax.tree_util.tree_map_with_path(normalize, constants)


def _normalize_states(initial_states: PyTree, has_constants: bool) -> PyTree:
    if initial_states is None:
        raise ValueError(
            "initial_states is None; expected a list of states. Pass [] for a step without states."
        )
    if jax.tree_util.all_leaves([initial_states]):
        initial_states = [initial_states]
    if has_constants and not _is_sequence(initial_states):
        raise ValueError(
            f"initial_states is {describe(initial_states)}, to which constants cannot be "
            f"appended; expected a list or tuple of states. Wrap it: initial_states=[state], or "
            f"let the step close over its constants."
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _as_array("initial_states" + jax.tree_util.keystr(path), leaf),
        initial_states,
    )


def _normalize_flags(name: str, flags: Any, batch: Any, time: Any, time_major: bool) -> Array:
    """`mask` or `reset` as bool `[T, B]`."""
    if isinstance(flags, np.ndarray) and flags.dtype.kind in "iuf":
        flags = flags != 0  # as an array of JAX's, 2**32 or 1e-300 might be zero
    array = _as_array(name, flags)
    shape, axes = ((time, batch), "[T, B]") if time_major else ((batch, time), "[B, T]")
    if array.shape not in (shape, (*shape, 1)):
        raise ValueError(
            f"{name} has shape {array.shape}; expected {axes} = {shape}, or {(*shape, 1)}."
        )
    if not (array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.number)):
        raise TypeError(f"{name} has dtype {array.dtype}; expected bool or a number type.")
    array = array.reshape(shape).astype(bool)
    return array if time_major else array.T


def _within_length(input_length: Any, batch: Any, time: Any) -> Array:
    """Whether t < input_length: bool `[T, B]`."""
    length = _as_array("input_length", _within_int32(input_length))
    if length.shape not in ((), (batch,)) or not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(
            f"input_length has shape {length.shape} and dtype {length.dtype}; expected an integer, "
            f"or integers [B] = {(batch,)}."
        )
    length = jnp.broadcast_to(length.astype(jnp.int32), (batch,))
    return jnp.arange(time, dtype=jnp.int32)[:, None] < length[None]


def _within_int32(numbers: Any) -> Any:
    """Integers of up to 64 bits, with int32's largest or smallest for those that it has not."""
    # NumPy has all the digits of a Python integer, but does not read what is traced.
    xp = jnp if any(isinstance(n, jax.Array) for n in jax.tree.leaves(numbers)) else np
    try:
        array = xp.asarray(numbers)
    except (OverflowError, ValueError):  # ragged, say
        return numbers
    limits = np.iinfo(np.int32)
    if array.dtype in (np.int64, np.uint32, np.uint64):
        return xp.clip(array, None if array.dtype.kind == "u" else limits.min, limits.max)
    return numbers


def _check_per_sample(name: str, states: PyTree, batch: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(states)
    if not leaves:
        raise ValueError(
            f"{name} is given, but initial_states is empty: there is no state to hold. Leave out "
            f"{name}, or give the step its previous output as a state."
        )
    for path, leaf in leaves:
        if not is_key(leaf) and (leaf.ndim == 0 or leaf.shape[0] != batch):
            raise ValueError(
                f"initial_states{jax.tree_util.keystr(path)} has shape {leaf.shape}; with {name}, "
                f"every state needs the batch axis [B, ...], B = {batch}. Give each sample its own "
                f"(jnp.broadcast_to); a random key may stay single if made by jax.random.key."
            )


def _match_container(new_states: PyTree, states: PyTree, constants: int) -> PyTree:
    """The new states in the container of `states`, once their structures agree."""
    expected = _structure(states)
    if isinstance(states, list | tuple) and isinstance(new_states, list | tuple):
        if len(new_states) != len(states):
            hint = " Constants are not states: leave them out." if constants else ""
            raise ValueError(
                f"step_function returned {len(new_states)} states; expected {len(states)}, as many "
                f"as initial_states holds.{hint}"
            )
        new_states = jax.tree.unflatten(
            _structure(states, is_leaf=lambda s: s is not states), list(new_states)
        )
    if _structure(new_states) != expected:
        path, got, wanted = _first_difference(new_states, states, "")
        got += " with other static fields" * (got == wanted)
        raise ValueError(
            f"step_function returned new_states{path} as {got}; expected {wanted}, the structure "
            f"of initial_states{path}."
        )
    return new_states


def _first_difference(got: PyTree, expected: PyTree, path: str) -> tuple[str, str, str]:
    """Path, description and expected description of the topmost place where structures differ."""

    def children(tree: PyTree) -> list[tuple[str, PyTree]]:
        pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda t: t is not tree)
        return [(jax.tree_util.keystr(key), child) for key, child in pairs]

    ours, theirs = children(got), children(expected)
    if type(got) is type(expected) and [k for k, _ in ours] == [k for k, _ in theirs]:
        for (key, mine), (_, other) in zip(ours, theirs, strict=True):
            if _structure(mine) != _structure(other):
                return _first_difference(mine, other, path + key)
    return path, describe(got), describe(expected)


def _match_leaves(new_states: PyTree, states: PyTree, batch: Any) -> PyTree:
    """The new states with the shapes checked and the dtypes of `states`."""

    def match(path: Any, new: Any, old: Array) -> Array:
        name = jax.tree_util.keystr(path)
        new = _as_array(f"the state new_states{name} of step_function", new)
        if new.shape != old.shape:
            raise ValueError(
                f"step_function returned new_states{name} with shape {new.shape}; expected "
                f"{old.shape}, the shape of initial_states{name}: a state never changes its shape."
                + _other_batch(name, old, batch)
            )
        if new.dtype == old.dtype:
            return new
        if jnp.issubdtype(new.dtype, jnp.floating) and jnp.issubdtype(old.dtype, jnp.floating):
            return new.astype(old.dtype)
        remedy = (
            f"Cast one of them: return new_state.astype('{old.dtype}'), or start from "
            f"initial_state.astype('{new.dtype}')."
        )
        if is_key(new) or is_key(old):
            remedy = "A random key stays one: the next is made of it by jax.random.split."
        raise TypeError(
            f"step_function returned new_states{name} with dtype {new.dtype}; expected "
            f"{old.dtype}, the dtype of initial_states{name}. {remedy}"
        )

    return jax.tree_util.tree_map_with_path(match, new_states, states)


def _check_output(output: PyTree, batch: Any) -> PyTree:
    def check(path: Any, leaf: Any) -> Array:
        name = "output" + jax.tree_util.keystr(path)
        leaf = _as_array(f"the {name} of step_function", leaf)
        if leaf.ndim == 0 or leaf.shape[0] != batch:
            raise ValueError(
                f"step_function returned {name} with shape {leaf.shape}; expected the batch axis "
                f"first: [B, ...], B = {batch}."
            )
        return leaf

    return jax.tree_util.tree_map_with_path(check, output)


def _as_array(name: str, value: Any) -> Array:
    """An array without weak type."""
    array = _as_array_or_weak(name, value)
    is_strong = is_key(array) or not array.weak_type
    return array if is_strong else lax.convert_element_type(array, array.dtype)


def _as_array_or_weak(name: str, value: Any) -> Array:
    if isinstance(value, jax.Array):  # `jax_debug_nans` looks at whatever is done with it
        return value
    try:
        return jnp.asarray(value)
    except TypeError as error:
        raise TypeError(f"{name} is {describe(value)}; expected an array of numbers.") from error
    except (OverflowError, ValueError) as error:
        raise ValueError(
            f"{name} is {describe(value)}; expected an array, and none can be made of it: "
            f"{str(error).rstrip('.')}."
        ) from error


def _structure(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    return jax.tree.structure(tree, is_leaf)


def describe(value: Any) -> str:
    """`value` in a few words: what a user needs to recognise it."""
    if isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        kind = "a type" if isinstance(value, jax.ShapeDtypeStruct) else "an array"
        return f"{kind} of shape {value.shape} and dtype {value.dtype}"
    if value is None or isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        return f"a {type(value).__name__} with keys {sorted(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"a {type(value).__name__}"
