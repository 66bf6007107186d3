"""A scan under `vmap` as the scan of a step under `vmap`.

Mapped by JAX, what the engine does for one sample would be done for many: products of whole arrays
whose samples first have to be brought to the front, in blocks chosen for the size of one. So a scan
that finds itself under `vmap` is a primitive, whose batching rule scans the mapped step instead.
Of everything else it is transparent; under `jit` inside `vmap` it is never made.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jaxrnn._jaxpr import Program, Var, dependents, multiply_adds, parts, variables
from jaxrnn._primitives import new_primitive
from jaxrnn._tangent import jvp_by_some

Array = jax.Array


class _How(NamedTuple):
    """What the primitive is told.

    Attributes:
        program: the body, `(consts, carry, x) -> (carry, y)`, flat.
        consts: number of consts.
        axes: the axis of time of each of xs.
        once: scans a step, `(step, carry, xs, axes) -> (carry, ys)`, for one sample.
        again: the same, and may be under yet another `vmap`.
    """

    program: Program
    consts: int
    axes: tuple[int, ...]
    once: Callable[..., Any]
    again: Callable[..., Any]

    @property
    def carry(self) -> int:
        return len(self.program.invars) - self.consts - len(self.axes)

    def step(self, consts: Sequence[Array], carry: Sequence[Array], x: Sequence[Array]) -> Any:
        outs = self.program.run(*consts, *carry, *x)
        return outs[: self.carry], outs[self.carry :]


def scan_samples(
    program: Program,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    axes: Sequence[int],
    once: Callable[..., Any],
    again: Callable[..., Any],
) -> list[Array]:
    """Scans `program`, for all samples of an outer `vmap` at once.

    Args:
        program: the body, `(consts, carry, x) -> (carry, y)`, flat, without effects.
        consts: what it closes over.
        carry: the first carry.
        xs: arrays with a row per step.
        axes: the axis of time of each of `xs`.
        once: scans a step, `(step, carry, xs, axes) -> (carry, ys)`, for one sample.
        again: the same, and may be under yet another `vmap`.

    Returns:
        The last carry and ys, one after the other.
    """
    how = _How(program, len(consts), tuple(axes), once, again)
    return list(_scan_p.bind(*consts, *carry, *xs, how=how))


def _as_it_is(*operands: Array, how: _How) -> list[Array]:
    consts, carry, xs = parts(operands, how.consts, how.carry)
    last, ys = how.once(functools.partial(how.step, consts), carry, xs, list(how.axes))
    return [*last, *ys]


def _batch(axis: Any, operands: Sequence[Array], dims: Sequence[Any], how: _How) -> Any:
    if _maps_weights(how, dims):
        run = functools.partial(_as_it_is, how=how)
        mapped = jax.vmap(run, list(dims), spmd_axis_name=axis.spmd_name)(*operands)
        return mapped, [0] * len(mapped)
    samples, new = _mapped(how, dims)
    consts, carry, xs = parts(operands, how.consts, how.carry)
    of_consts, of_carry, of_xs = parts(dims, how.consts, how.carry)
    carry = [
        c if not yes
        else batching.broadcast(c, axis.size, 0, axis.explicit_mesh_axis) if dim is None
        else jnp.moveaxis(c, dim, 0)
        for c, dim, yes in zip(carry, of_carry, samples, strict=True)
    ]  # fmt: skip
    # Inputs stay as they lie: where time and samples are is told apart.
    times = [t + (d is not None and d <= t) for t, d in zip(how.axes, of_xs, strict=True)]
    rows = [d if d is None or d < t else d - 1 for t, d in zip(times, of_xs, strict=True)]
    places = [0 if yes else None for yes in samples]
    outs = [0 if yes else None for yes in new]

    def step(carry: list[Array], x: list[Array]) -> Any:
        mapped = jax.vmap(
            how.step, (of_consts, places, rows), (places, outs), spmd_axis_name=axis.spmd_name
        )
        return mapped(consts, carry, x)

    last, ys = how.again(step, carry, xs, times)
    return [*last, *ys], [*places, *(None if out is None else 1 for out in outs)]


def _mapped(how: _How, dims: Sequence[Any]) -> tuple[list[bool], list[bool]]:
    """Which carries, and which ys, differ between samples."""
    inputs, outs = how.program.invars, how.program.outvars
    start = how.consts
    sources = {v for v, dim in zip(inputs, dims, strict=True) if dim is not None}
    while True:
        reached = dependents(how.program, list(sources))
        differ = [isinstance(out, Var) and out in reached for out in outs]
        carry = inputs[start : start + how.carry]
        more = {v for v, yes in zip(carry, differ, strict=False) if yes} - sources
        if not more:
            return [v in sources for v in carry], differ[how.carry :]
        sources |= more


def _maps_weights(how: _How, dims: Sequence[Any]) -> bool:
    """Whether weights differ between samples, as in an ensemble.

    Then the engine had better see one member: products of many matrices are none that it knows.
    """
    inputs = how.program.invars
    mapped = [v for v, dim in zip(inputs[: how.consts], dims, strict=False) if dim is not None]
    own = dependents(how.program, mapped) - dependents(how.program, inputs[how.consts :])
    products = filter(multiply_adds, how.program.equations)
    return any(v in own for e in products for v in variables(e.invars))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], how: _How) -> Any:
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    run = functools.partial(_as_it_is, how=how)
    return jvp_by_some(
        run, primals, tangents, moving, lambda out: ad.Zero(jax.typeof(out).to_tangent_aval())
    )


def _abstract(*operands: Any, how: _How) -> list[Any]:
    return list(jax.make_jaxpr(functools.partial(_as_it_is, how=how))(*operands).out_avals)


_scan_p = new_primitive("jaxrnn_scan")
_scan_p.def_impl(_as_it_is)
_scan_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_scan_p] = _jvp
batching.fancy_primitive_batchers[_scan_p] = _batch
mlir.register_lowering(_scan_p, mlir.lower_fun(_as_it_is, multiple_results=True))
