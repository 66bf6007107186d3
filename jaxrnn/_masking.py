"""What a masked step and a reset do to a batch: select, fill and substitute, leaf by leaf.

Everything here is selection with `jnp.where` along the batch axis, so a masked sample leaves no
trace in values or in derivatives. The one thing that selection alone cannot do is stop a NaN
derivative: `where(m, f(x), 0)` multiplies the derivative of `f` by zero, and zero times infinity is
NaN. Hence `substitutes`: a masked sample's input and states are replaced *before* the step sees
them. A step with a finite derivative (`_finite_gradient.py`) is fed the states as they are, unless
they are no numbers: hence `zero_nonfinite_unstepped`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._sharding import samples_placed_as

Array = jax.Array
PyTree = Any


def is_key(leaf: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether `leaf` is a typed PRNG key array, which belongs to the call and not to a sample."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def select(condition: Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Chooses per sample: leaf by leaf `where(condition, if_true, if_false)`.

    Args:
        condition: `[B]`, bool.
        if_true: pytree of arrays `[B, ...]`.
        if_false: pytree of the same structure, shapes and dtypes.

    Returns:
        A pytree like `if_true`; typed PRNG keys are always taken from `if_true`.
    """
    return jax.tree.map(
        lambda t, f: t if is_key(t) else jnp.where(_align(condition, t), t, f), if_true, if_false
    )


def zero_unless(condition: Array, tree: PyTree) -> PyTree:
    """Sets to zero the samples for which `condition` (`[B]`, bool) does not hold."""
    return jax.tree.map(
        lambda leaf: jnp.where(_align(condition, leaf), leaf, jnp.zeros((), leaf.dtype)), tree
    )


def nonfinite_unstepped(valid: Array, state: Array) -> Array:
    """The samples without a valid step in whose state is NaN or infinity, `[B]`, bool.

    A step with a finite derivative is computed for them, too, and thrown away. In its derivative
    zero would be multiplied by what they hold.

    Args:
        valid: `[T, B]`, bool.
        state: `[B, ...]`, of floats.
    """
    is_finite = jnp.all(jnp.isfinite(state), axis=tuple(range(1, state.ndim)))
    has_any = samples_placed_as(jnp.any(valid, axis=0), jax.typeof(state))
    return ~(is_finite | has_any)


def zero_nonfinite_unstepped(valid: Array, states: PyTree) -> PyTree:
    """`states`, a pytree of `[B, ...]`, with zeros for the samples of `nonfinite_unstepped`."""

    def start(state: Array) -> Array:
        if not jnp.issubdtype(state.dtype, jnp.inexact):
            return state
        return zero_unless(~nonfinite_unstepped(valid, state), state)

    return jax.tree.map(start, states)


def restore_nonfinite_unstepped(valid: Array, outputs: PyTree, states: PyTree, axis: int) -> PyTree:
    """`outputs` with the states of such samples at each step; time is on `axis`.

    As a rule there are none, and nothing is done; but for a selection under `vmap`.
    """

    def put(rows: Array, state: Array) -> Array:
        if not jnp.issubdtype(state.dtype, jnp.inexact):
            return rows
        at = nonfinite_unstepped(valid, state)
        where = jnp.expand_dims(_align(at, state), axis)
        row = jnp.expand_dims(state, axis)
        return lax.cond(
            jnp.any(at), lambda rows: jnp.where(where, row, rows), lambda rows: rows, rows
        )

    return jax.tree.map(put, outputs, states)


def substitutes(
    valid: Array, inputs: PyTree, states: PyTree, go_backwards: bool
) -> tuple[PyTree, PyTree]:
    """What a masked step is fed in place of its input and its states: safe to differentiate at.

    Each sample gets its own first valid row and the states that it starts from: a point at which
    the step has to be evaluated anyway. The row alone would not do, for a step that divides by its
    distance from the row before. A sample without any valid row gets both from one that has some.
    If none has, the row is a ramp inside (0, 1): unlike zeros or ones it is no singular point of
    logarithms, roots, quotients or of normalising a row by its spread. Integers are ones then, and
    of the states what is NaN or infinite is replaced.

    Args:
        valid: `[T, B]`, bool.
        inputs: pytree of arrays `[T, B, ...]`.
        states: pytree of arrays `[B, ...]`, the initial states; None where they may stay.
        go_backwards: whether the last row is the first to be processed.

    Returns:
        The input and the states, pytrees of arrays `[B, ...]` through which no derivative flows.
    """
    has_any = jnp.any(valid, axis=0)
    # Reductions over samples, as few as can be: over devices each is a message.
    samples = jnp.arange(has_any.shape[0])
    lender = jnp.min(samples, where=has_any, initial=has_any.shape[0])
    some = lender < has_any.shape[0]
    if go_backwards:
        first = valid.shape[0] - 1 - jnp.argmax(valid[::-1], axis=0)
    else:
        first = jnp.argmax(valid, axis=0)

    def own_or_lent(own: Array) -> Array:
        if is_key(own):
            return own
        total = jnp.any if own.dtype == jnp.bool_ else jnp.sum
        # JAX sums no integers of less than a byte.
        is_narrow = str(own.dtype) in ("int2", "uint2", "int4", "uint4")
        summed = own.astype(jnp.int8) if is_narrow else own
        lent = total(zero_unless(samples == lender, summed), axis=0)
        own = jnp.where(_align(has_any | ~some, own), own, lent.astype(own.dtype)[None])
        return lax.stop_gradient(own)

    def row(leaf: Array) -> Array:
        index = first.reshape(1, -1, *(1,) * (leaf.ndim - 2))
        row = own_or_lent(jnp.take_along_axis(leaf, index, axis=0)[0])
        if is_key(row):
            return row
        is_inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        made_up = _ramp(row.shape[1:]) if is_inexact else jnp.ones(row.shape[1:])
        return jnp.where(some, row, made_up.astype(leaf.dtype)[None])

    def state(leaf: Array) -> Array:
        own = own_or_lent(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return own
        made_up = _ramp(own.shape[1:]).astype(leaf.dtype)[None]
        return jnp.where(some | jnp.isfinite(own), own, made_up)

    return jax.tree.map(row, inputs), jax.tree.map(state, states)


def _ramp(shape: tuple[int, ...]) -> Array:
    """Values from 1/4 up, below 3/4, all different along the last axis."""
    if not shape:
        return jnp.float32(0.25)
    i = lax.broadcasted_iota(jnp.float32, shape, len(shape) - 1)
    return 0.25 + 0.5 * i / (1 + i)


def _align(condition: Array, leaf: Array) -> Array:
    """`[B]` -> `[B, 1, ...]`, to broadcast against `leaf`."""
    condition = samples_placed_as(condition, jax.typeof(leaf))
    return condition.reshape(condition.shape + (1,) * (leaf.ndim - 1))
