"""A recurrence as one Pallas kernel: all its steps in one launch, the weights on the chip.

A loop of XLA's launches several kernels per step, each of which takes longer to start than to run
unless the matrices are large. Here one block of threads runs all steps for `SAMPLES` samples, and
other blocks run those of the others; a step waits for nothing but the step before it. The rows of
the next step are loaded while this one is computed.

It is a primitive of JAX of its own, because a Pallas kernel has no transpose. Linear in its carry
and in some of its rows, as the tangent of a recurrence is, it has one here: the kernel of the
transposed step, run the other way. On anything but an NVIDIA GPU it is `lax.scan`.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from jaxrnn._jaxpr import Atom, Literal, Var, bind, dtype, parts, shape
from jaxrnn._kernel import SAMPLES, Kernel, KernelPlan
from jaxrnn._primitives import (
    broadcast_in_dim_p,
    convert_element_type_p,
    dot_general_p,
    new_primitive,
    reshape_p,
    squeeze_p,
)

Array = jax.Array
Levels = tuple[tuple[bool, ...], ...]

_WARPS = 8


class _Call(NamedTuple):
    """What the primitive is told.

    Attributes:
        kernel: what runs.
        length: how many steps.
        reverse: whether from the last to the first.
        linear: for a tangent, which of the xs it is linear in, beside its carry.
        levels: for every `vmap` around it, from the outside in, which operands have its axis; that
            axis is the first.
    """

    kernel: Kernel
    length: int
    reverse: bool
    linear: frozenset[int]
    levels: Levels = ()


def run_fused(
    plan: KernelPlan,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    length: int,
    reverse: bool,
    linear: frozenset[int] = frozenset(),
) -> tuple[list[Array], list[Array]]:
    """Runs a recurrence as one kernel.

    Args:
        plan: from `plan_kernel`.
        consts: the same at every step.
        carry: the first carry.
        xs: arrays with a row per step.
        length: how many steps.
        reverse: whether to start at the last row.
        linear: which of `xs` the recurrence is linear in, beside its carry; those can be
            differentiated.

    Returns:
        The last carry, and ys with a row per step.
    """
    given = plan.invariant.run(*consts)
    call = _Call(plan.kernel, length, reverse, plan.columns_of(linear))
    outs = _fused_p.bind(*given, *carry, *plan.rows(xs), call=call)
    return outs[: len(carry)], outs[len(carry) :]


def _mapped(f: Any, levels: Levels) -> Any:
    for has_axis in reversed(levels):
        f = jax.vmap(f, in_axes=tuple(0 if yes else None for yes in has_axis))
    return f


def _as_scan(*operands: Array, call: _Call) -> list[Array]:
    """What the primitive computes, by `lax.scan`."""

    def run(*operands: Array) -> list[Array]:
        kernel = call.kernel
        consts, carry, xs = parts(operands, kernel.consts, kernel.carry)

        def step(carry: list[Array], x: list[Array]) -> tuple[list[Array], list[Array]]:
            return kernel.program.step(consts, carry, x)

        last, ys = lax.scan(step, carry, xs, call.length, call.reverse)
        return [*last, *ys]

    return list(_mapped(run, call.levels)(*operands))


def _as_kernel(*operands: Array, call: _Call, interpret: bool = False) -> list[Array]:
    """What the primitive computes, by a kernel."""
    run = functools.partial(_launch, call=call, interpret=interpret)
    return list(_mapped(run, call.levels)(*operands))


def _launch(*operands: Array, call: _Call, interpret: bool) -> list[Array]:
    # Not at the top: JAX means to drop it, and without it only kernels are missing.
    from jax.experimental import pallas as pl  # noqa: PLC0415
    from jax.experimental.pallas import triton  # noqa: PLC0415

    kernel, length = call.kernel, call.length
    program, first_row = kernel.program, kernel.consts + kernel.carry
    missing = -kernel.batch % SAMPLES

    def pad(i: int, x: Array) -> Array:
        x = x.astype(jnp.int8) if x.dtype == jnp.bool_ else x
        if program.invars[i] not in kernel.batched or not missing:
            return x
        axis = 1 if i >= first_row else 0
        return jnp.pad(x, [(0, missing * (a == axis)) for a in range(x.ndim)])

    def result(i: int, v: Any) -> jax.ShapeDtypeStruct:
        size = (kernel.batch + missing, *shape(v)[1:])
        held = jnp.int8 if dtype(v) == jnp.bool_ else dtype(v)
        return jax.ShapeDtypeStruct(size if i < kernel.carry else (length, *size), held)

    outs = pl.pallas_call(
        functools.partial(_run_kernel, call=call, pl=pl),
        out_shape=[result(i, v) for i, v in enumerate(program.outvars)],
        grid=((kernel.batch + missing) // SAMPLES,),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
    )(*(pad(i, x) for i, x in enumerate(operands)))
    outs = [out.astype(dtype(v)) for out, v in zip(outs, program.outvars, strict=True)]
    last, ys = outs[: kernel.carry], outs[kernel.carry :]
    return [*(x[: kernel.batch] for x in last), *(y[:, : kernel.batch] for y in ys)]


def _run_kernel(*refs: Any, call: _Call, pl: Any) -> None:
    """The kernel: all steps for the samples of one block of threads."""
    kernel, length = call.kernel, call.length
    program, outvars = kernel.program, kernel.program.outvars
    consts, carry, xs, last, ys = parts(
        refs, kernel.consts, kernel.carry, len(program.invars) - kernel.consts - kernel.carry,
        kernel.carry,
    )  # fmt: skip
    of_consts, of_carry, of_xs = parts(program.invars, kernel.consts, kernel.carry)
    matrices = {e.invars[1] for e in program.equations if e.primitive is dot_general_p}
    samples = pl.ds(pl.program_id(0) * SAMPLES, SAMPLES)

    def place(v: Any) -> tuple[Any, ...]:
        rest = (slice(None),) * len(shape(v)[1:])
        return (samples, *rest) if v in kernel.batched else (slice(None),) * len(shape(v))

    def load(ref: Any, v: Any, *time: Array) -> Array:
        value = ref[(*time, *place(v))]
        if dtype(v) == jnp.bool_:
            return value != 0
        return value if v in matrices else value.astype(_wide(dtype(v)))

    def rows(step: Array) -> list[Array]:
        time = length - 1 - step if call.reverse else step
        return [load(ref, v, time) for ref, v in zip(xs, of_xs, strict=True)]

    fixed = [load(ref, v) for ref, v in zip(consts, of_consts, strict=True)]

    def run(step: Array, state: Any) -> Any:
        carry, x = state
        ahead = rows(jnp.minimum(step + 1, length - 1))
        outs = _run_samples(kernel, [*fixed, *carry, *x])
        time = length - 1 - step if call.reverse else step
        for ref, v, y in zip(ys, outvars[kernel.carry :], outs[kernel.carry :], strict=True):
            ref[(time, *place(v))] = y.astype(ref.dtype)
        # A narrow state is as narrow from step to step as it is outside.
        new = [
            c.astype(dtype(v)).astype(c.dtype)
            for c, v in zip(outs, outvars[: kernel.carry], strict=False)
        ]
        return new, ahead

    first = [load(ref, v) for ref, v in zip(carry, of_carry, strict=True)]
    start, stop = jnp.int32(0), jnp.int32(length)
    end, _ = lax.fori_loop(start, stop, run, (first, rows(start)))
    for ref, v, value in zip(last, outvars, end, strict=False):
        ref[place(v)] = value.astype(ref.dtype)


def _run_samples(kernel: Kernel, values: Sequence[Any]) -> list[Any]:
    """One step of a kernel for `SAMPLES` samples, narrow floats as float32 in between.

    Args:
        kernel: what to run.
        values: the operands of its program, with `SAMPLES` in place of the number of samples.

    Returns:
        The results of its program, likewise.
    """
    env: dict[Atom, Any] = dict(zip(kernel.program.invars, values, strict=True))

    def size(v: Var) -> tuple[int, ...]:
        return (SAMPLES, *shape(v)[1:]) if v in kernel.batched else shape(v)

    for equation in kernel.program.equations:
        operands = [_number(a) if isinstance(a, Literal) else env[a] for a in equation.invars]
        [out], params = equation.outvars, equation.params
        if equation.primitive is dot_general_p:
            rows, matrix = (
                x.astype(dtype(a)) for x, a in zip(operands, equation.invars, strict=True)
            )
            result = lax.dot_general(
                rows,
                matrix,
                params["dimension_numbers"],
                precision=params["precision"],
                preferred_element_type=jnp.float32,
            )
        elif equation.primitive is broadcast_in_dim_p:
            result = lax.broadcast_in_dim(operands[0], size(out), params["broadcast_dimensions"])
        elif equation.primitive in (reshape_p, squeeze_p):
            result = lax.reshape(operands[0], size(out))
        elif equation.primitive is convert_element_type_p:
            result = operands[0].astype(_wide(dtype(out)))
        else:
            [result] = bind(equation, operands)
        env[out] = result
    return [env[v] for v in kernel.program.outvars if isinstance(v, Var)]


def _wide(dtype: Any) -> Any:
    """What a kernel computes in where a step says `dtype`."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if narrow else dtype


def _number(literal: Literal) -> Any:
    """The number that `literal` stands for."""
    return _wide(dtype(literal)).type(literal.val)


_fused_p = new_primitive("jaxrnn_fused")


def _impl(*operands: Array, call: _Call) -> list[Array]:
    return list(jax.jit(functools.partial(_fused_p.bind, call=call))(*operands))


def _abstract(*operands: Any, call: _Call) -> list[Any]:
    return list(jax.make_jaxpr(functools.partial(_as_scan, call=call))(*operands).out_avals)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], call: _Call) -> Any:
    """Derivatives of what is not linear are those of `lax.scan`."""
    slopes = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(functools.partial(_as_scan, call=call), list(primals), slopes)


def _transpose(cotangents: Sequence[Any], *operands: Any, call: _Call) -> list[Any]:
    n, m = call.kernel.consts, call.kernel.carry
    consts, _, xs = parts(operands, n, m)
    last, ys = parts(list(map(ad.instantiate_zeros, cotangents)), m)
    known = [i for i in range(len(xs)) if i not in call.linear]
    back = call.kernel.transposed(call.linear)
    levels_of = [parts(level, n, m) for level in call.levels]

    def mapped_consts(*consts: Array) -> list[Array]:
        return back.invariant.run(*consts)

    of_consts = tuple(tuple(level[0]) for level in levels_of if any(level[0]))
    given = _mapped(mapped_consts, of_consts)(*consts)
    rows = back.rows([*(xs[i] for i in known), *ys])
    levels = tuple(
        (
            *(any(level[0]) for _ in given),
            *(True for _ in last),
            *(i >= len(known) or level[2][known[i]] for i, _ in back.columns),
        )
        for level in levels_of
    )
    linear = frozenset(j for j, (i, _) in enumerate(back.columns) if i >= len(known))
    params = _Call(back.kernel, call.length, not call.reverse, linear, levels)
    outs = _fused_p.bind(*given, *last, *rows, call=params)
    found = dict(zip((i for i in range(len(xs)) if i in call.linear), outs[m:], strict=True))
    made = [*([None] * n), *outs[:m], *(found.get(i) for i in range(len(xs)))]
    return [ct if ad.is_undefined_primal(x) else None for x, ct in zip(operands, made, strict=True)]


def _batch(operands: Sequence[Any], axes: Sequence[Any], call: _Call) -> Any:
    [size] = {x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None}
    first = call.kernel.consts

    def is_linear(i: int) -> bool:
        row = i - first - call.kernel.carry
        return i >= first if row < 0 else row in call.linear

    placed = []
    for i, (x, axis) in enumerate(zip(operands, axes, strict=True)):
        if axis is not None:
            placed.append(jnp.moveaxis(x, axis, 0))
        else:  # a cotangent of what all share would have to be summed
            placed.append(jnp.broadcast_to(x, (size, *x.shape)) if is_linear(i) else x)
    level = tuple(a is not None or is_linear(i) for i, a in enumerate(axes))
    outs = _fused_p.bind(*placed, call=call._replace(levels=(level, *call.levels)))
    return outs, [0] * len(outs)


_to_scan = mlir.lower_fun(_as_scan, multiple_results=True)
_to_kernel = mlir.lower_fun(_as_kernel, multiple_results=True)


def _lower_to_kernel(context: Any, *operands: Any, call: _Call) -> Any:
    """A kernel, unless the program is to be exported, for which JAX wants none."""
    if context.module_context.lowering_parameters.for_export:
        return _to_scan(context, *operands, call=call)
    with warnings.catch_warnings():
        # Whoever uses jaxrnn can't do anything about it.
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        return _to_kernel(context, *operands, call=call)


_fused_p.def_impl(_impl)
_fused_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_fused_p] = _jvp
ad.primitive_transposes[_fused_p] = _transpose
batching.primitive_batchers[_fused_p] = _batch
mlir.register_lowering(_fused_p, _to_scan)
mlir.register_lowering(_fused_p, _lower_to_kernel, "cuda")
