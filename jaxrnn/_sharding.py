"""How arrays are placed on devices, where that is part of their type.

On meshes with explicit axes an array's type says over which of them it is split, and inside
`shard_map` over which it varies. What is made of nothing has to be made to fit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def explicit_sharding(aval: Any) -> Any:
    """How an array type is split over the explicit axes of a mesh; None where it is not."""
    sharding = getattr(aval, "sharding", None)
    spec = getattr(sharding, "spec", None)
    return None if spec is None or all(axis is None for axis in spec) else sharding


def is_split(equation: Any) -> bool:
    """Whether an operand of a traced equation is split over the explicit axes of a mesh."""
    return any(explicit_sharding(atom.aval) for atom in equation.invars)


def varying(aval: Any) -> Any:
    """How an array type varies over the axes of a `shard_map`; None where there is no saying."""
    return getattr(aval, "manual_axis_type", None)


def is_placed(aval: Any) -> bool:
    """Whether the type of an array says how it lies on devices."""
    axes = varying(aval)
    return explicit_sharding(aval) is not None or (axes is not None and bool(axes.varying))


def varying_as(value: Array, like: Any) -> Array:
    """`value`, which under `shard_map` varies over the mesh as an array of type `like` does."""
    axes = varying(like)
    if axes is None:
        return value
    missing = tuple(axes.varying - varying(jax.typeof(value)).varying)
    return lax.pcast(value, missing, to="varying") if missing else value


def placed_as(value: Array, like: Any) -> Array:
    """`value`, split and varying over a mesh as an array of type `like` is."""
    return _split_as(varying_as(value, like), explicit_sharding(like))


def samples_placed_as(samples: Array, like: Any) -> Array:
    """`samples`, a number each, split over a mesh as the samples of an array of type `like` are."""
    sharding = explicit_sharding(like)
    if sharding is None or sharding.spec[0] is None:
        return _split_as(samples, None)
    spec = jax.sharding.PartitionSpec(sharding.spec[0])
    return _split_as(samples, jax.sharding.NamedSharding(sharding.mesh, spec))


def _split_as(value: Array, sharding: Any) -> Array:
    """`value`, split over explicit axes as `sharding` says, or, if that is None, over none."""
    present = explicit_sharding(jax.typeof(value))
    if sharding == present:
        return value
    if sharding is None:
        sharding = jax.sharding.NamedSharding(present.mesh, jax.sharding.PartitionSpec())
    return jax.sharding.reshard(value, sharding)


def zeros_of(like: Any) -> Array:
    """Zeros of an array type, placed on a mesh as it is; `jnp.zeros_like` forgets `shard_map`."""
    return varying_as(jnp.zeros(like.shape, like.dtype, device=explicit_sharding(like)), like)


def empty_rows(like: Any, length: int, axis: int, mark: int) -> Array:
    """`length` arrays of type `like` along `axis`, full of `mark`, placed on a mesh as it is."""
    shape = [*like.shape[:axis], length, *like.shape[axis:]]
    sharding = explicit_sharding(like)
    if sharding is not None:
        names = [*sharding.spec, *[None] * (len(like.shape) - len(sharding.spec))]
        spec = jax.sharding.PartitionSpec(*names[:axis], None, *names[axis:])
        sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    return varying_as(lax.full(shape, mark, like.dtype, sharding=sharding), like)
