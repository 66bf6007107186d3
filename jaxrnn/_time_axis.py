"""Rows over time: which axis they are on, and shifted by a step."""

import jax
import jax.numpy as jnp

Array = jax.Array


def time_first(rows: Array, axis: int) -> Array:
    """`rows`, of which `axis` is time, with time on the first."""
    return jnp.moveaxis(rows, axis, 0) if axis else rows


def time_on(rows: Array, axis: int) -> Array:
    """`rows`, of which the first axis is time, with time on `axis`."""
    return jnp.moveaxis(rows, 0, axis) if axis else rows


def shifted(rows: Array, first: Array, reverse: bool) -> Array:
    """For every step the row of the step before it, and `first` for the first."""
    return jnp.concatenate([rows[1:], first[None]] if reverse else [first[None], rows[:-1]])
