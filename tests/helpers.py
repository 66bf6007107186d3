"""What the tests share: an independent reference, the settings of a call, and the comparison.

The table of cases is in `cases` and can be imported from here.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import BATCH, CASES, TIME, Arguments, Case, Draw

__all__ = [
    "BATCH",
    "CASES",
    "GAPS",
    "LENGTHS",
    "RESETS",
    "SETTINGS",
    "TIME",
    "Arguments",
    "Case",
    "Draw",
    "assert_identical",
    "assert_same",
    "cast_floats",
    "is_float",
    "numerical_gradient",
    "reference_rnn",
    "results_and_gradients",
    "scalar_of",
    "valid_steps",
    "with_padding",
]

# One sample that starts valid, one that starts and ends masked, one that is masked throughout.
GAPS = np.array([[1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]], bool)
LENGTHS = np.array([7, 4, 0], np.int32)
# Resets at the first step, at the last, at masked steps and at valid ones.
RESETS = np.array([[0, 0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 1, 0, 0]], bool)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "go_backwards": {"go_backwards": True},
    "unrolled": {"unroll": True},
    "unrolled_by_two_backwards": {"unroll": 2, "go_backwards": True},
    "time_major": {"time_major": True},
    "mask": {"mask": GAPS},
    "float_mask_backwards_zeroed": {
        "mask": GAPS[..., None].astype(np.float32) * 0.5,
        "go_backwards": True,
        "zero_output_for_mask": True,
    },
    "one_length_backwards": {"input_length": 4, "go_backwards": True},
    "lengths_and_mask_time_major": {
        "mask": GAPS.astype(np.int32),
        "input_length": LENGTHS,
        "time_major": True,
    },
    "reset": {"reset": RESETS},
    "masked_reset_backwards_unrolled": {
        "mask": GAPS,
        "reset": RESETS[..., None],
        "go_backwards": True,
        "unroll": True,
    },
    "last_only": {"return_all_outputs": False},
    "last_only_masked_zeroed": {
        "mask": GAPS,
        "zero_output_for_mask": True,
        "return_all_outputs": False,
        "time_major": True,
    },
    "masked_blocks": {"mask": GAPS, "chunk": 3, "method": "sequential"},
    "remat_backwards": {"remat": True, "go_backwards": True},
    "remat_everything": {
        "mask": GAPS,
        "input_length": LENGTHS,
        "reset": RESETS.astype(np.float32),
        "zero_output_for_mask": True,
        "time_major": True,
        "remat": True,
        "method": "sequential",
    },
}
"""Flags of a call by name, batch-major and made for BATCH and TIME (see `Case.call`).

The arrays of the cases are so small that the library would leave them to `lax.scan`: where the
method is named, it is to take the loop apart nevertheless.
"""


def valid_steps(batch: int, time: int, mask=None, input_length=None) -> np.ndarray:
    """Which steps count, as bool [B, T], from a batch-major mask and from lengths."""
    valid = np.ones((batch, time), bool)
    if mask is not None:
        valid &= np.asarray(mask).reshape(batch, time) != 0
    if input_length is not None:
        lengths = np.broadcast_to(input_length, (batch,))
        for sample in range(batch):
            for t in range(time):
                valid[sample, t] &= t < lengths[sample]
    return valid


def reference_rnn(
    step_function: Callable,
    inputs: Any,
    initial_states: Any,
    go_backwards: bool = False,
    mask: Any = None,
    constants: Any = None,
    unroll: Any = False,
    input_length: Any = None,
    time_major: bool = False,
    zero_output_for_mask: bool = False,
    return_all_outputs: bool = True,
    *,
    reset: Any = None,
    xp: ModuleType = np,
    **engine: Any,
):
    """The contract as loops over time and samples: no scan, no `where`, no mask arithmetic.

    A sample whose step is masked simply does not receive the step's results. `unroll` and the
    engine's options change no result and are ignored. With ``xp=jax.numpy`` it can be
    differentiated and serves as a reference for gradients (the mask must be concrete, and the
    padding benign); the loop over samples is one selection then, which compiles sooner.
    """
    time_axis = 0 if time_major else 1
    steps = jax.tree.map(lambda leaf: xp.moveaxis(leaf, time_axis, 0), inputs)
    time, batch = jax.tree.leaves(steps)[0].shape[:2]

    def per_step(array):
        array = np.asarray(array)
        return array.reshape(array.shape[:2]).swapaxes(0, time_axis) != 0

    valid = np.ones((time, batch), bool) if mask is None else per_step(mask)
    valid = valid & valid_steps(batch, time, None, input_length).T
    resets = np.zeros((time, batch), bool) if reset is None else per_step(reset)

    def rows(choose, new, old):
        if choose.all():
            return new

        def pick(n, o):
            if xp is np:
                return np.stack([n[b] if choose[b] else o[b] for b in range(batch)])
            by_element = np.broadcast_to(choose.reshape(-1, *[1] * (n.ndim - 1)), n.shape)
            return jax.lax.select(by_element, n, o)

        return jax.tree.map(pick, new, old)

    def keep_dtype(new, old):
        floating = jnp.issubdtype(old.dtype, jnp.floating)
        assert floating or new.dtype == old.dtype
        return new.astype(old.dtype)

    def before_first(output):
        zeros = jax.tree.map(xp.zeros_like, output)
        first = initial[0] if isinstance(initial, list | tuple) and initial else None
        if zero_output_for_mask or jax.tree.structure(first) != jax.tree.structure(output):
            return zeros
        same = jax.tree.map(lambda f, o: f.shape == o.shape, first, output)
        if not all(jax.tree.leaves(same)):
            return zeros
        return jax.tree.map(lambda f, o: f.astype(o.dtype), first, output)

    bare = isinstance(initial_states, np.ndarray | np.generic | jax.Array)
    initial = [initial_states] if bare else initial_states
    container = type(initial) if type(initial) in (list, tuple) else None
    states, outputs, latest = initial, [], None
    with np.errstate(all="ignore"):
        for t in range(time)[:: -1 if go_backwards else 1]:
            states = rows(~(resets[t] & valid[t]), states, initial)
            seen = states if constants is None else type(states)([*states, *constants])
            output, new = step_function(jax.tree.map(lambda leaf, t=t: leaf[t], steps), seen)
            new = container(new) if container else new
            output = jax.tree.map(xp.asarray, output)
            new = jax.tree.map(lambda n, o: keep_dtype(xp.asarray(n), o), new, states)
            latest = before_first(output) if latest is None else latest
            states = rows(valid[t], new, states)
            latest = rows(valid[t], output, latest)
            zeros = jax.tree.map(xp.zeros_like, output)
            outputs.append(rows(valid[t], output, zeros) if zero_output_for_mask else latest)
    if not return_all_outputs:
        outputs = outputs[-1:]
    stacked = jax.tree.map(lambda *leaves: xp.stack(leaves, axis=time_axis), *outputs)
    return latest, stacked, states


def tolerance(*dtypes: Any) -> float:
    """The error allowed for values that went through arithmetic in these dtypes.

    A few hundred units in the last place of the narrowest floating dtype cover the reordered sums
    and the recurrences of a few steps; bfloat16 and float16 are rounded so often that a few units
    are all that can be told apart from a wrong value. Zero if there is no floating dtype.
    """
    floating = [jnp.finfo(d) for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    return max((float(f.eps) * (200 if f.bits >= 32 else 8) for f in floating), default=0.0)


def assert_same(actual: Any, expected: Any, compute_dtype: Any = None, scale: float = 1.0):
    """Asserts equal structure, shapes and dtypes, and values equal up to rounding.

    Args:
        actual: pytree of arrays.
        expected: pytree of arrays, containers included (a list is no tuple).
        compute_dtype: a dtype through which the values went, if narrower than their own.
        scale: multiplies the tolerance, for values known to lose accuracy (gradients).
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for got, (path, want) in zip(jax.tree.leaves(actual), paths, strict=True):
        name = jax.tree_util.keystr(path) or "value"
        assert got.dtype == want.dtype, f"{name}: {got.dtype}, expected {want.dtype}"
        assert got.shape == want.shape, f"{name}: {got.shape}, expected {want.shape}"
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            assert (jax.random.key_data(got) == jax.random.key_data(want)).all(), name
            continue
        allowed = scale * tolerance(want.dtype, compute_dtype or want.dtype)
        if not jnp.issubdtype(want.dtype, jnp.inexact):
            allowed = 0.0
        wide = np.float64 if jnp.issubdtype(want.dtype, jnp.floating) else None
        np.testing.assert_allclose(
            np.asarray(got, wide), np.asarray(want, wide), allowed, allowed, err_msg=name
        )


def assert_identical(actual: Any, expected: Any):
    """Asserts equal structure, shapes, dtypes, and values equal to the last bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        if got.dtype == jax.dtypes.float0:
            continue
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want), strict=True)


def is_float(leaf: Any) -> bool:
    """Whether a leaf can be differentiated."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def cast_floats(tree: Any, dtype: Any):
    """The tree with its floating leaves in another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)


def with_padding(inputs: Any, valid: np.ndarray, value: float):
    """Batch-major inputs with the value in place of every masked step of every float leaf."""

    def fill(leaf):
        filled = np.array(leaf)
        if is_float(leaf):
            filled[~valid] = value
        return filled

    return jax.tree.map(fill, inputs)


def scalar_of(results: Any, xp: ModuleType = jnp):
    """A scalar in which every element of every float leaf has a weight of its own."""
    total = xp.zeros(())
    for number, leaf in enumerate(jax.tree.leaves(results)):
        if is_float(leaf):
            weights = np.cos(np.arange(leaf.size) + number).reshape(leaf.shape)
            total = total + xp.sum(leaf * weights.astype(leaf.dtype))
    return total


@contextlib.contextmanager
def checking_leaks() -> Iterator[None]:
    """`jax.checking_leaks`, which searches all objects after every trace: here, the new ones."""
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


def numerical_gradient(function: Callable[[Any], Any], tree: Any, delta: float = 1e-5):
    """Central differences in float64, element by element; zeros for leaves that are no floats."""
    leaves, structure = jax.tree.flatten(cast_floats(tree, np.float64))
    gradients = []
    for position, leaf in enumerate(leaves):
        gradient = np.zeros(leaf.shape, np.float64)
        for index in np.ndindex(leaf.shape) if is_float(leaf) else ():
            values = []
            for sign in (1, -1):
                moved = np.array(leaf)
                moved[index] += sign * delta
                moved_leaves = [*leaves[:position], moved, *leaves[position + 1 :]]
                values.append(float(function(structure.unflatten(moved_leaves))))
            gradient[index] = (values[0] - values[1]) / (2 * delta)
        gradients.append(gradient)
    return structure.unflatten(gradients)


def results_and_gradients(call):
    """Compiles ``call(inputs, rest) -> results`` with its gradient with respect to both."""

    def loss(inputs, rest):
        results = call(inputs, rest)
        return scalar_of(results), results

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))
