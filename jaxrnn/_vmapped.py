"""A scan under `vmap` as the scan of a step under `vmap`.

Mapped by JAX, what the engine does for one sample would be done for many: products of whole arrays
whose samples first have to be brought to the front, in blocks chosen for the size of one. So a scan
is tried as a primitive, whose batching rule scans the mapped step instead. It has no other rule:
wherever something else than `vmap` looks at it first, the scan is what it would have been anyway.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching

from jaxrnn._equations import multiply_adds
from jaxrnn._jaxpr import Program, Var, dependents, dependents_in_time, parts, variables
from jaxrnn._primitives import new_primitive

Array = jax.Array


class _NotMappedError(Exception):
    """Something else than `vmap` is the first to look at a scan."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What the primitive is told.

    Attributes:
        program: the body, `(consts, carry, x) -> (carry, y)`, flat.
        consts: number of consts.
        axes: the axis of time of each of xs.
        is_kernel: whether the body runs as a kernel, which knows how to be mapped itself.
        scan: scans a step, `(step, carry, xs, axes) -> (carry, ys)`.
    """

    program: Program
    consts: int
    axes: tuple[int, ...]
    is_kernel: Callable[[], bool]
    scan: Callable[..., Any]

    @property
    def carry(self) -> int:
        return len(self.program.invars) - self.consts - len(self.axes)

    def step(self, consts: Sequence[Array], carry: Sequence[Array], x: Sequence[Array]) -> Any:
        return self.program.step(consts, carry, x)


class _Reference:
    """Leads to what the primitive is told, as long as the call lasts.

    JAX keeps the parameters of a primitive of which it has asked the types of its results.
    """

    def __init__(self, call: _Call):
        self.to = weakref.ref(call)


def scan_samples(
    program: Program,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    axes: Sequence[int],
    is_kernel: Callable[[], bool],
    scan: Callable[..., Any],
) -> list[Array] | None:
    """Scans `program` for all samples of a `vmap` at once, if this is right around it.

    Args:
        program: the body, `(consts, carry, x) -> (carry, y)`, flat, without effects.
        consts: what it closes over.
        carry: the first carry.
        xs: arrays with a row per step.
        axes: the axis of time of each of `xs`.
        is_kernel: whether the body runs as a kernel, which knows how to be mapped itself.
        scan: scans a step, `(step, carry, xs, axes) -> (carry, ys)`.

    Returns:
        The last carry and ys, one after the other; None if there is no such `vmap`.
    """
    call = _Call(program, len(consts), tuple(axes), is_kernel, scan)
    try:
        return list(_scan_p.bind(*consts, *carry, *xs, reference=_Reference(call)))
    except _NotMappedError:
        return None


def _batch(
    axis: Any,
    operands: Sequence[Array],
    dims: Sequence[Any],
    reference: _Reference,
) -> Any:
    call = reference.to()
    assert call is not None, "the caller holds it"
    consts, carry, xs = parts(operands, call.consts, call.carry)
    of_consts, of_carry, of_xs = parts(dims, call.consts, call.carry)
    if all(dim is None for dim in dims):
        last, ys = call.scan(functools.partial(call.step, consts), carry, xs, list(call.axes))
        return [*last, *ys], [None] * (len(last) + len(ys))
    if _maps_weights(call, dims) or call.is_kernel():
        raise _NotMappedError
    samples, new = _mapped(call, dims)
    carry = [
        c if not yes
        else batching.broadcast(c, axis.size, 0, axis.explicit_mesh_axis) if dim is None
        else jnp.moveaxis(c, dim, 0)
        for c, dim, yes in zip(carry, of_carry, samples, strict=True)
    ]  # fmt: skip
    # Inputs stay as they lie: where time and samples are is told apart.
    times = [t + (d is not None and d <= t) for t, d in zip(call.axes, of_xs, strict=True)]
    rows = [d if d is None or d < t else d - 1 for t, d in zip(times, of_xs, strict=True)]
    places = [0 if yes else None for yes in samples]
    outs = [0 if yes else None for yes in new]

    mapped = jax.vmap(
        call.step,
        (of_consts, places, rows),
        (places, outs),
        axis_name=axis.name,
        axis_size=axis.size,
        spmd_axis_name=axis.spmd_name,
    )
    step = functools.partial(mapped, consts)

    last, ys = call.scan(step, carry, xs, times)
    return [*last, *ys], [*places, *(None if out is None else 1 for out in outs)]


def _mapped(call: _Call, dims: Sequence[Any]) -> tuple[list[bool], list[bool]]:
    """Which carries, and which ys, differ between samples."""
    inputs, outs = call.program.invars, call.program.outvars
    sources = [v for v, dim in zip(inputs, dims, strict=True) if dim is not None]
    reached = dependents_in_time(call.program, sources, call.consts, call.carry)
    carry = inputs[call.consts : call.consts + call.carry]
    differ = [isinstance(out, Var) and out in reached for out in outs[call.carry :]]
    return [v in reached for v in carry], differ


def _maps_weights(call: _Call, dims: Sequence[Any]) -> bool:
    """Whether weights differ between samples, as in an ensemble.

    Then the engine had better see one member: products of many matrices are none that it knows.
    """
    inputs = call.program.invars
    mapped = [v for v, dim in zip(inputs[: call.consts], dims, strict=False) if dim is not None]
    own = dependents(call.program, mapped) - dependents(call.program, inputs[call.consts :])
    products = filter(multiply_adds, call.program.equations)
    return any(v in own for e in products for v in variables(e.invars))


def _not_mapped(*_: Any, **__: Any) -> NoReturn:
    raise _NotMappedError


_scan_p = new_primitive("jaxrnn_scan")
_scan_p.def_impl(_not_mapped)
_scan_p.def_abstract_eval(_not_mapped)
ad.primitive_jvps[_scan_p] = _not_mapped
batching.fancy_primitive_batchers[_scan_p] = _batch
