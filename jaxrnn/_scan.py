"""`scan`: `jax.lax.scan` run as an expert would have written it, over blocks of time."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._affine import is_parallel
from jaxrnn._algebra import simplify
from jaxrnn._block import Axes, Steps, over_blocks, run_plain
from jaxrnn._block_length import block_length, recomputed_block, steps_of
from jaxrnn._checkpoints import through_checkpoints
from jaxrnn._choice import fits_kernel, is_soon_made_again, kernels_pay, why_not_worthwhile
from jaxrnn._device import is_lone_cpu
from jaxrnn._eager import is_jit_disabled, run_compiled
from jaxrnn._equations import can_run_batched, is_heavy, is_of_another_width
from jaxrnn._every_step import must_run_every_step
from jaxrnn._fission import LoopMethod, Plan, fission
from jaxrnn._gains import only_for_gradients
from jaxrnn._inner_loops import without_inner_loops
from jaxrnn._invariant_carry import Body, old_and_new, without_unchanged
from jaxrnn._jaxpr import Traced, carry_type, dtype, is_weak, trace, weak_as
from jaxrnn._options import ScanOptions, as_int, engine_options, time_of
from jaxrnn._recurrence import Results, run_split, run_with_derivative_of
from jaxrnn._samples_last import with_samples_last
from jaxrnn._time_axis import time_first, time_on
from jaxrnn._unbatched_weights import share
from jaxrnn._vmapped import scan_samples

Array = jax.Array
PyTree = Any


def scan(
    f: Body,
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    chunk: int | str | None = "auto",
    remat: bool = False,
    method: str = "auto",
) -> tuple[PyTree, PyTree]:
    """Same result as `jax.lax.scan`, up to rounding; see there for the arguments before `chunk`.

    The body is split (loop fission): what does not lie on the way from the old carry to the new one
    runs over a block of timesteps at once, as large products; only the rest stays in the loop. The
    gradient is split likewise. Where this cannot help, or may not, `jax.lax.scan` itself runs:
    effects in the body, no product or random bits to move, a symbolic time axis.

    Args:
        f: `(carry, x) -> (carry, y)`, pure.
        init: the first carry, a pytree of arrays.
        xs: pytree of arrays `[T, ...]`, or None.
        length: T, where `xs` is None.
        reverse: whether to start at the last row.
        unroll: steps per iteration of the innermost loop; True for all.
        chunk: timesteps per block; "auto" picks, None makes one block of the whole.
        remat: whether only the carries between blocks are kept for the backward pass and the rest
            is computed again; blocks are of about sqrt(T) steps then, unless `chunk` says else.
            On a CPU with `chunk="auto"` large memories in the carry, as a matrix for each sample or
            a cache that products read, may be kept so without being asked, if they take 32 MiB and
            more over all steps. A body with effects is never run again.
        method: "auto"; "fused", on an NVIDIA GPU each recurrence as one kernel (a loop elsewhere);
            "parallel", all steps of a block at once, for states that are scaled and added to alone;
            "sequential", the split body in order; "lax", plain `jax.lax.scan`.

    Returns:
        The last carry, and ys as a pytree of arrays `[T, ...]`.

    Raises:
        ValueError: for an option that does not fit, among them "fused" for a recurrence that cannot
            run as one kernel and "parallel" for one that is not affine; and what `jax.lax.scan`
            raises.

    Example:
        >>> def body(total, x):
        ...     total = total + x
        ...     return total, 2 * total
        >>> total, ys = scan(body, jnp.zeros(()), jnp.arange(4.0))
        >>> total.item(), ys.tolist()
        (6.0, [0.0, 2.0, 6.0, 12.0])
    """
    engine = engine_options(chunk, remat, method)
    options = ScanOptions(as_int(length), reverse, unroll, **engine)
    if not options.is_hashable or any(getattr(x, "ndim", 0) == 0 for x in jax.tree.leaves(xs)):
        return _scan(f, options, (init, xs))  # `lax.scan` says what is wrong
    return run_compiled("scan", _scan, f, options, (init, xs))


class Split(NamedTuple):
    """A body after fission: the plan, what it closes over, and the first carry, flat.

    `traced` is the body before fission, `program(*traced.consts, *carry, *x)`; `loop_method`
    says how its recurrences are run.
    """

    plan: Plan
    consts: tuple[Any, ...]
    carry: list[Any]
    traced: Traced
    loop_method: LoopMethod


class Blocking(NamedTuple):
    """How a split body is run: its steps, timesteps per block, whether a gradient runs it again."""

    steps: Steps
    block: int
    remat: bool


class Decision(NamedTuple):
    """How a split body is run where no gradient is taken, and where one is.

    Without a gradient, plain `lax.scan` may have the results just as soon: `is_plain`.
    """

    results: Blocking
    gradient: Blocking
    is_plain: bool


def _scan(f: Body, options: ScanOptions, operands: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    init, xs = operands
    return scan_along(f, init, xs, 0, 0, options)


def scan_along(
    f: Body, init: PyTree, xs: PyTree, axes: PyTree, ys_axis: int, options: ScanOptions
) -> tuple[PyTree, PyTree]:
    """`scan`, with time of xs on the axes that `axes` tells for each leaf, or for whole subtrees.

    Blocks are cut from xs as they lie in memory; time is brought to the first axis block by block.
    Time of ys is on `ys_axis`. On a CPU their rows are written there.
    """
    (carry, ys), axis = _scan_along(f, init, xs, axes, ys_axis, options)
    return carry, jax.tree.map(lambda y: jnp.moveaxis(y, axis, ys_axis), ys)


def _scan_along(
    f: Body, init: PyTree, xs: PyTree, axes: PyTree, ys_axis: int, options: ScanOptions
) -> tuple[tuple[PyTree, PyTree], int]:
    """As `scan_along`, but tells on which axis time of ys is; this may be the first."""
    length, reverse, unroll, chunk, remat, method = options
    lying, tree = jax.tree.flatten(xs)
    axes = jax.tree.leaves(jax.tree.map(lambda a, x: [a] * len(jax.tree.leaves(x)), axes, xs))
    xs = jax.tree.unflatten(tree, map(time_first, lying, axes))
    time = time_of(xs, length)
    if time is None or not callable(f):
        # Symbolic, and then it cannot be unrolled in groups; or a mistake that it complains about.
        return lax.scan(f, init, xs, length, reverse), 0
    if time < 1 or (method == "lax" and not remat) or is_jit_disabled():
        return lax.scan(f, init, xs, length, reverse, unroll), 0
    options = options._replace(length=time)
    body = trace_body(f, init, xs, method)
    if not isinstance(body, str):

        def of_leaves(carry: PyTree, row: list[Any]) -> tuple[PyTree, PyTree]:
            return f(carry, jax.tree.unflatten(tree, row))

        if done := _otherwise(of_leaves, init, lying, axes, ys_axis, options, body):
            return done
    split = body if isinstance(body, str) else split_body(*body, method, time, chunk)
    if isinstance(split, str) and (not remat or has_effects(f, init, xs)):
        return lax.scan(f, init, xs, length, reverse, unroll), 0

    if isinstance(body, str) or isinstance(split, str):
        block, steps = block_length(chunk, remat, time, None), Steps(time, reverse, unroll)

        def run_plainly(carry: PyTree, xs: PyTree, steps: Steps) -> tuple[PyTree, PyTree]:
            return steps.scan(f, carry, xs)

        return over_blocks(run_plainly, init, xs, steps, block, remat), 0
    axis = ys_axis if is_lone_cpu() else 0
    ys_axes = [axis] * (len(body[0].program.outvars) - len(split.carry))
    return _as_traced(_run(split, lying, Axes(axes, ys_axes), options), body[0]), axis


def _otherwise(
    f: Body,
    init: PyTree,
    xs: list[Array],
    axes: list[int],
    ys_axis: int,
    options: ScanOptions,
    body: tuple[Traced, list[Array], list[Any]],
) -> tuple[tuple[PyTree, PyTree], int] | None:
    """As `_scan_along`, by a scan of another body, if there is one that is better taken apart.

    Of inputs here are the leaves: a class among their nodes may refuse to hold axes.
    """
    if varying := without_unchanged(f, init, *body[:2]):
        (last, ys), axis = _scan_along(varying.f, varying.init, xs, axes, ys_axis, options)
        return (varying.whole(last), ys), axis
    traced, first, _ = body

    def again(f: Body, init: PyTree, xs: PyTree, axes: PyTree) -> Any:
        return scan_along(f, init, xs, axes, 0, options)

    is_kernel = functools.partial(_is_kernel, body, options.method, options.length, options.chunk)
    outs = scan_samples(traced.program, traced.consts, first, xs, axes, is_kernel, again)
    return None if outs is None else (_as_traced(outs, traced), 0)


def _run(split: Split, xs: list[Array], axes: Axes, options: ScanOptions) -> list[Array]:
    """The last carry and ys of a split body, flat, with time of xs and ys on `axes`."""
    plan, decision = split.plan, decide(split, options)
    steps = decision.results.steps

    def run(blocking: Blocking, consts: list[Any], carry: list[Array], xs: list[Array]) -> Results:
        return run_split(plan, consts, carry, xs, axes, *blocking)

    def run_whole(consts: list[Any], carry: list[Array], xs: list[Array]) -> Results:
        program, before = split.traced.program, consts[len(consts) - len(split.traced.consts) :]
        last, ys = run_plain(program, before, carry, list(map(time_first, xs, axes.xs)), steps)
        return last, list(map(time_on, ys, axes.ys))

    derivative = functools.partial(run, decision.gradient)
    operands = list(split.consts), list(split.carry), xs
    if not decision.is_plain and decision.gradient == decision.results:
        carry, ys = derivative(*operands)
    else:
        results = run_whole if decision.is_plain else functools.partial(run, decision.results)
        carry, ys = run_with_derivative_of(derivative, results, operands)
    return [*carry, *ys]


def decide(split: Split, options: ScanOptions) -> Decision:
    """How to run a split body."""
    plan, (time, reverse, unroll, chunk, remat, method) = split.plan, options
    block = block_length(chunk, remat, time, plan, split.loop_method)
    steps = steps_of(time, reverse, unroll, chunk, plan, split.loop_method)
    results = gradient = Blocking(steps, block, remat)
    if recomputed := recomputed_block(plan, time, chunk, remat, split.loop_method):
        gradient = Blocking(steps, recomputed, True)
    is_plain = only_for_gradients(plan, time, chunk, remat, method)
    return Decision(results, gradient, is_plain and with_samples_last(plan, steps) is None)


def _as_traced(results: Sequence[Array], traced: Traced) -> PyTree:
    """The last carry and ys as `lax.scan` would return them, from a flat list of them."""
    return jax.tree.unflatten(traced.out_tree, map(weak_as, results, traced.program.outvars))


def has_effects(f: Body, init: PyTree, xs: PyTree) -> bool:
    """Whether a body, run again for the gradient, would be noticed."""
    x, tree = _first_row(xs)
    return bool(jax.make_jaxpr(lambda c, x: f(c, jax.tree.unflatten(tree, x)))(init, x).effects)


def _first_row(xs: PyTree) -> tuple[list[Any], Any]:
    """The types of one step's xs, with the mesh that they lie on, which `eval_shape` leaves out."""
    leaves, tree = jax.tree.flatten(xs)
    rows = trace(lambda *leaves: [leaf[0] for leaf in leaves], *leaves).program.outvars
    return [row.aval for row in rows], tree


def trace_body(
    f: Body, init: PyTree, xs: PyTree, method: str
) -> tuple[Traced, list[Array], list[Any]] | str:
    """The body of a scan, its first carry, and the types of its x; or why it is not to be split.

    As a program it is `traced.program(*traced.consts, *carry, *x)`, flat.
    """
    if method == "lax":
        return "method='lax' was asked for"
    carry, carry_tree = jax.tree.flatten(jax.tree.map(jnp.asarray, init))
    x, x_tree = _first_row(xs)

    def flat(*args: Array) -> tuple[PyTree, PyTree]:
        old, x = args[: len(carry)], args[len(carry) :]
        return f(jax.tree.unflatten(carry_tree, old), jax.tree.unflatten(x_tree, x))

    traced = trace(flat, *carry, *x)
    results = traced.out_tree.children()
    if len(results) != 2 or results[0] != carry_tree:
        return "the step does not return a carry like its own, which lax.scan reports"
    promoted = _made_strong(carry, traced, of_its_dtype=False)
    if any(c is not p for c, p in zip(carry, promoted, strict=True)):
        carry = promoted
        traced = trace(flat, *carry, *x)

    program = traced.program
    changes = any(
        carry_type(old) != carry_type(new) or (is_weak(new) and not is_weak(old))
        for old, new in old_and_new(traced, len(carry))
    )
    if traced.has_effects and method in ("fused", "parallel"):
        raise ValueError(
            f"method={method!r}: the step has effects (a print, a collective, ...), "
            "which only method='auto', 'sequential' and 'lax' allow."
        )
    # JAX's rules of a product ask for the width that is allowed where they run, not where it is.
    is_wide = any(map(is_of_another_width, program.equations))
    # Under `vmap` even one in a `cond` may leave the loop.
    has_heavy = any(map(is_heavy, program.equations))
    reasons = {
        "the step has effects (a print, a callback, a collective)": traced.has_effects,
        "the step changes the type of its state": changes,
        "a matmul in the step has a dtype that is not enabled here (jax_enable_x64)": is_wide,
        "the step has no matmul and draws no random bits": not has_heavy
        and not _gains_anyway(method),
    }
    if why := next((reason for reason, holds in reasons.items() if holds), None):
        return why
    # Traced once more for these, the body might give strong types that `lax.scan` leaves weak.
    return traced, _made_strong(carry, traced, of_its_dtype=True), x


def _made_strong(carry: list[Any], traced: Traced, *, of_its_dtype: bool) -> list[Any]:
    """A carry, strong where the body makes it so, `of_its_dtype` or of another one.

    As in `lax.scan`, that dtype is the wider of the two: a body that narrows is an error.
    """
    return [
        lax.convert_element_type(c, jnp.result_type(c, dtype(new)))
        if is_weak(old) and not is_weak(new) and (dtype(old) == dtype(new)) == of_its_dtype
        else c
        for c, (old, new) in zip(carry, old_and_new(traced, len(carry)), strict=True)
    ]


def split_body(
    traced: Traced,
    carry: list[Array],
    x: list[Any],
    method: str,
    time: int,
    chunk: int | str | None,
) -> Split | str:
    """A body, from `trace_body`, after fission, or why the engine stands aside."""
    plain, traced = traced, without_inner_loops(traced, [*carry, *x])
    is_written_out = traced is not plain
    opened = through_checkpoints(traced, [*carry, *x])
    traced = share(opened or traced, [*carry, *x])
    leaves = any(is_heavy(e) and can_run_batched(e) for e in traced.program.equations)
    if not leaves and not _gains_anyway(method):
        return "no matmul or random draw can be moved out of the loop"
    example = [*traced.consts, *carry, *x]
    body = simplify(traced.program, len(traced.consts), len(carry), example)
    consts = (*body.consts, *traced.consts)
    plan = fission(body.program, len(consts), len(carry))
    if any(map(must_run_every_step, plan.invariant.equations)):
        return "a custom_vjp function or draw that is the same at all steps has to run at each"
    loop_method: LoopMethod = "fused" if fits_kernel(plan, method) else "sequential"
    loop_method = "parallel" if is_parallel(plan, method) else loop_method
    if method == "auto" and loop_method == "sequential":
        if why := why_not_worthwhile(plan, time, chunk):
            return f"splitting would not be faster: {why}"
        if not is_soon_made_again(plan, time, chunk):
            return "recomputing what is under a checkpoint would take too long"
    return Split(plan, consts, carry, plain if is_written_out else traced, loop_method)


def _gains_anyway(method: str) -> bool:
    """Whether a loop may gain that nothing can be moved out of."""
    return method == "parallel" or kernels_pay(method)


def _is_kernel(
    body: tuple[Traced, list[Array], list[Any]], method: str, time: int, chunk: int | str | None
) -> bool:
    """Whether a body, from `trace_body`, runs as kernels as it is."""
    if not kernels_pay(method):
        return False
    try:
        split = split_body(*body, method, time, chunk)
    except ValueError:
        return False
    return not isinstance(split, str) and split.loop_method == "fused"
