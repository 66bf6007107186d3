"""`explain` and `explain_scan`: what became of a step, as text."""

import functools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from inspect import BoundArguments, signature
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import _device, _jaxpr, _rnn
from jaxrnn._arguments import Operands, Step
from jaxrnn._block import Axes, run_plain
from jaxrnn._block_length import block_length, results_block
from jaxrnn._checkpoints import not_to_be_kept
from jaxrnn._equations import multiply_adds
from jaxrnn._invariant_carry import Body, without_unchanged
from jaxrnn._jaxpr import Equation, Program, Traced
from jaxrnn._options import ScanOptions, as_int, engine_options, time_of
from jaxrnn._primitives import cond_p, scan_p
from jaxrnn._recurrence import run_split
from jaxrnn._samples_last import with_samples_last
from jaxrnn._scan import (
    Blocking,
    Split,
    decide,
    has_effects,
    scan,
    split_body,
    trace_body,
)
from jaxrnn._time_axis import time_first, time_on

Array = jax.Array
PyTree = Any

_WIDTH = 80
_WHERE = {"sequential": "step by step", "fused": "one kernel", "parallel": "all steps at once"}


def explain(
    step_function: Step, inputs: PyTree, initial_states: PyTree, *args: Any, **kwargs: Any
) -> str:
    """Says what `jaxrnn.rnn` makes of a step; nothing is computed.

    Args:
        step_function: as in `jaxrnn.rnn`.
        inputs: as in `jaxrnn.rnn`; a `jax.ShapeDtypeStruct` may stand for any array.
        initial_states: as in `jaxrnn.rnn`.
        *args: further arguments of `jaxrnn.rnn`.
        **kwargs: further arguments of `jaxrnn.rnn`.

    Returns:
        Lines of at most 80 characters: which operations run once, which per block of time before
        the loop (prologue), in the loop (recurrence) and after it (epilogue); the multiply-adds of
        the products per step, in the loop and outside; the bytes that are kept for the backward
        pass, beside those of plain `jax.lax.scan`; the block length and the method.

    Raises:
        ValueError: as `jaxrnn.rnn`.
        TypeError: as `jaxrnn.rnn`.
    """
    lines: list[str] = []

    def listen(
        body: Body,
        init: PyTree,
        xs: PyTree,
        axes: Sequence[int],
        ys_axis: int,
        options: ScanOptions,
    ) -> Any:
        xs = tuple(
            jax.tree.map(functools.partial(time_first, axis=axis), part)
            for part, axis in zip(xs, axes, strict=True)
        )
        time = jax.tree.leaves(xs)[0].shape[0]
        lines.extend(_report(body, init, xs, options._replace(length=time)))
        carry, ys = lax.scan(body, init, xs)
        return carry, jax.tree.map(functools.partial(time_on, axis=ys_axis), ys)

    given = _arguments_of(_rnn.rnn, step_function, inputs, initial_states, *args, **kwargs)
    values, tree = jax.tree.flatten((given.args, given.kwargs))
    types = {i: v for i, v in enumerate(values) if isinstance(v, jax.ShapeDtypeStruct)}

    def run(arrays: dict[int, Array]) -> list[Array]:
        every = [arrays.get(i, value) for i, value in enumerate(values)]
        args, kwargs = jax.tree.unflatten(tree, every)
        settings, operands = _rnn.prepare(*args, **kwargs)

        def leaves(arrays: Operands) -> list[Array]:
            # Not all constants need be arrays.
            arrays = arrays._replace(constants=operands.constants)
            return jax.tree.leaves(_rnn.run(args[0], settings, arrays, listen))

        return jax.eval_shape(leaves, operands._replace(constants=[]))

    jax.eval_shape(run, types)
    return "\n".join(lines)


def explain_scan(f: Body, init: PyTree, *args: Any, **kwargs: Any) -> str:
    """Says what `jaxrnn.scan` makes of a body; nothing is computed.

    Args:
        f: as in `jaxrnn.scan`.
        init: as in `jaxrnn.scan`.
        *args: further arguments of `jaxrnn.scan`.
        **kwargs: further arguments of `jaxrnn.scan`.

    Returns:
        Lines as those of `explain`.

    Raises:
        ValueError: as `jaxrnn.scan`.
        TypeError: as `jax.lax.scan`.
    """
    given = _arguments_of(scan, f, init, *args, **kwargs)
    _, _, xs, length, reverse, unroll = given.args
    engine = engine_options(**given.kwargs)
    if any(jnp.ndim(x) == 0 for x in jax.tree.leaves(xs)):
        lax.scan(f, init, xs, length, reverse)  # it says what is wrong
    lines: list[str] = []

    def listen(init: PyTree, xs: PyTree) -> Any:
        leaves = jax.tree.leaves(xs)
        steps = 1 if time_of(xs, as_int(length)) is None else unroll
        results = lax.scan(f, init, xs, length, reverse, steps)  # here, too
        time = leaves[0].shape[0] if leaves else as_int(length)
        lines.extend(_report(f, init, xs, ScanOptions(time, reverse, unroll, **engine)))
        return results

    jax.eval_shape(listen, init, xs)
    return "\n".join(lines)


def _arguments_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> BoundArguments:
    """All arguments of a call, those left out with their defaults."""
    given = signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    return given


def _report(body: Body, init: PyTree, xs: PyTree, options: ScanOptions) -> list[str]:
    time, _, _, chunk, remat, method = options
    if not isinstance(time, int):
        return _plain(time, "", "the time axis is symbolic")
    if not time:
        return _plain(time, "", "there is nothing to do")
    found = trace_body(body, init, xs, method)
    if not isinstance(found, str) and (varying := without_unchanged(body, init, *found[:2])):
        return _report(varying.f, varying.init, xs, options)
    split = found if isinstance(found, str) else split_body(*found, method, time, chunk)
    if isinstance(found, str) or isinstance(split, str):
        blocks = ""
        if remat and not has_effects(body, init, xs):
            blocks = f", in blocks of {block_length(chunk, remat, time, None)} (rematerialised)"
        return _plain(time, blocks, str(split))
    decision = decide(split, options)
    (steps, block, _), blocking = decision.results, decision.gradient
    results = None if remat else results_block(split.plan, steps, block)
    kept = " (rematerialised)" if blocking.remat else ""
    lines = [f'method "{split.loop_method}" over {time} steps, in blocks of {blocking.block}{kept}']
    if not blocking.remat and not_to_be_kept(split.plan.body):
        lines.append("for gradients what is under a checkpoint is recomputed")
    if results and with_samples_last(split.plan, steps) is not None:
        lines.append(
            "for gradients; without one a single loop runs, with the samples on the last axis"
        )
    elif results and decision.is_plain:
        lines.append("for gradients; without one plain lax.scan runs, which is as fast")
    elif results and (blocking.remat or results != block):
        lines.append(f"for gradients; without one in blocks of {results}")
    where = _WHERE[split.loop_method]
    if split.loop_method == "fused" and _device.gpu() is None:
        where = "step by step (on an NVIDIA GPU as one kernel)"
    lines += _section("once, from parameters alone", split.plan.invariant)
    for i, stage in enumerate(split.plan.stages):
        when = "prologue" if i == 0 else "epilogue" if stage.loop is None else "between loops"
        lines += _section(f"per block of time: {when}", stage.program)
        if stage.loop is not None:
            lines += _section(f"{where}: recurrence", stage.loop.program)
    return [*lines, "", *_figures(found[0], split, xs, blocking)]


def _plain(time: Any, blocks: str, why: str) -> list[str]:
    return textwrap.wrap(f"plain lax.scan over {time} steps{blocks}: {why}", _WIDTH)


def _section(title: str, program: Program) -> list[str]:
    """A title and the operations under it, products with their shapes first."""
    if not program.equations:
        return []
    products = Counter(_signature(e) for e in program.equations if multiply_adds(e))
    others = Counter(str(e.primitive) for e in program.equations if not multiply_adds(e))
    lines = ["", title]
    for name, n in products.items():
        lines += textwrap.wrap(
            name + _times(n), _WIDTH, initial_indent="  ", subsequent_indent="    "
        )
    return lines + _wrap(f"{name}{_times(n)}" for name, n in others.items())


def _figures(traced: Traced, split: Split, xs: PyTree, blocking: Blocking) -> list[str]:
    before = _work(traced.program.equations)
    inside, outside = _work(split.plan.in_loops), _work(split.plan.in_passes)
    lines = [
        f"multiply-adds per step    {inside:>14,} in the loop, {outside:,} outside",
        f"  plain lax.scan          {before:>14,} in the loop",
    ]
    rows = jax.tree.leaves(xs)
    try:
        theirs = _kept_plainly(traced, split, rows, blocking)
    except Exception as error:  # whatever an operation without a derivative raises
        why, *_ = str(error).splitlines() or [type(error).__name__]
        return lines + textwrap.wrap(f"no gradient: {why}", _WIDTH)
    return [
        *lines,
        f"kept for the gradient     {_mebibytes(_kept(split, rows, blocking)):>14}",
        f"  plain lax.scan          {_mebibytes(theirs):>14}",
    ]


def _work(equations: Iterable[Equation]) -> int:
    """The multiply-adds of products at any depth: of the longest branch, of all steps if known."""
    return sum(map(_work_of, equations))


def _work_of(equation: Equation) -> int:
    inside = list(map(_work, _jaxpr.inner_functions(equation)))
    if equation.primitive is cond_p:
        return max(inside)
    repeated = equation.params["length"] if equation.primitive is scan_p else 1
    return multiply_adds(equation) + repeated * sum(inside)


def _kept(split: Split, rows: list[Array], blocking: Blocking) -> int:
    """The bytes that the backward pass keeps beside the arguments."""

    def ours(consts: Sequence[Array], carry: list[Array], rows: list[Array]) -> PyTree:
        ys = len(split.plan.body.outvars) - len(carry)
        return run_split(split.plan, consts, carry, rows, Axes.first(len(rows), ys), *blocking)

    return _residual_bytes(ours, split.consts, split.carry, rows)


def _kept_plainly(traced: Traced, split: Split, rows: list[Array], blocking: Blocking) -> int:
    """The same with plain `lax.scan`."""

    def theirs(consts: Sequence[Array], carry: list[Array], rows: list[Array]) -> PyTree:
        return run_plain(traced.program, consts, carry, rows, blocking.steps)

    return _residual_bytes(theirs, traced.consts, split.carry, rows)


def _residual_bytes(f: Callable[..., PyTree], *groups: Sequence[Array]) -> int:
    args, structure = jax.tree.flatten([list(group) for group in groups])
    inexact = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def flat(*args: Array) -> PyTree:
        return f(*jax.tree.unflatten(structure, args))

    def residuals(*args: Array) -> list[Array]:
        of_inexact = _jaxpr.as_function_of(inexact, flat, args)
        return jax.tree.leaves(jax.vjp(of_inexact, *(args[i] for i in inexact))[1])

    program = _jaxpr.trace(residuals, *args).program
    kept = set(_jaxpr.variables(program.outvars)) - set(program.invars)
    return sum(map(_jaxpr.size_in_bytes, kept))


def _signature(equation: Equation) -> str:
    operands = " @ ".join(
        f"{_jaxpr.dtype(atom)}{list(_jaxpr.shape(atom))}" for atom in equation.invars[:2]
    )
    return f"{equation.primitive}  {operands}"


def _times(n: int) -> str:
    return f" x{n}" if n > 1 else ""


def _wrap(words: Iterable[str]) -> list[str]:
    """Words in indented lines that fit the terminal."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 2 + len(word) <= _WIDTH:
            lines[-1] += ", " + word
        else:
            lines.append("  " + word)
    return lines


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
