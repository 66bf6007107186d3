"""Runs a plan over blocks of time: each pass at once, each loop when its turn comes."""

import functools
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._affine import run_affine
from jaxrnn._carried_shifts import carried
from jaxrnn._fission import Loop, LoopMethod, Plan
from jaxrnn._fused import run_fused
from jaxrnn._jaxpr import Atom, Literal, Program, Var, read, variables
from jaxrnn._kernel import plan_kernel
from jaxrnn._passes import run_rows
from jaxrnn._rows import InPlace, Writer, block_of, given_rows, one_row
from jaxrnn._sharding import empty_rows
from jaxrnn._split_gates import KernelMisfitError
from jaxrnn._time_axis import time_first, time_on

Array = jax.Array
PyTree = Any
Env = dict[Atom, Any]


class Steps(NamedTuple):
    """How a block is run through.

    Attributes:
        length: as for `lax.scan`, like the next two.
        reverse: whether from the last step to the first.
        unroll: steps per iteration.
        loop_method: how recurrences are run, as a kernel those that fit.
        whole_tangent: whether a tangent is one block where its results are several.
        adapts: whether blocks may have other lengths than the one that is told for all.
        over_states: timesteps per block of a tangent whose passes go over rows like the states.
        forgets: whether a derivative makes again what is under a checkpoint.
    """

    length: int
    reverse: bool
    unroll: int | bool
    loop_method: LoopMethod = "sequential"
    whole_tangent: bool = False
    adapts: bool = False
    over_states: int = 0
    forgets: bool = False

    def scan(
        self, step: Callable[[PyTree, PyTree], Any], init: PyTree, xs: PyTree
    ) -> tuple[Any, Any]:
        """`lax.scan`."""
        return lax.scan(step, init, xs, self.length, self.reverse, self.unroll)


class Axes(NamedTuple):
    """On which axis time lies: of each of xs, of each of ys."""

    xs: Sequence[int]
    ys: Sequence[int]

    @classmethod
    def first(cls, xs: int, ys: int) -> "Axes":
        """Time on the first axis of so many xs and ys."""
        return cls([0] * xs, [0] * ys)


RunLoop = Callable[
    [Loop, list[Array], list[Array], list[Any], Steps], tuple[list[Array], list[Array]]
]


def run_invariant(plan: Plan, consts: Sequence[Array]) -> Env:
    """The values of everything that does not depend on time."""
    env: Env = dict(zip(plan.body.invars[: plan.consts], consts, strict=True))
    outs = plan.invariant.run(*(env[v] for v in plan.invariant.invars))
    return env | dict(zip(plan.invariant.outvars, outs, strict=True))


def run_block(
    plan: Plan,
    invariant: Env,
    carry: Sequence[Array],
    xs: Sequence[Array | InPlace],
    steps: Steps,
    run_loop: RunLoop,
) -> tuple[list[Array], list[Array]]:
    """Runs a plan over one block of time.

    Args:
        plan: the split body.
        invariant: from `run_invariant`.
        carry: the carries at the start of the block.
        xs: the inputs of the block, arrays with a row per step; or where they lie, if loops alone
            read them and `run_loop` knows of that.
        steps: how many there are, and how they are run through.
        run_loop: runs one recurrence.

    Returns:
        The carries at the end of the block, and ys with a row per step.
    """
    body, times = plan.body, plan.times
    env = dict(invariant)
    env |= zip(body.invars[plan.consts + plan.carry :], xs, strict=True)
    new_carry: dict[int, Array] = {}

    def rows(atom: Atom) -> Array:
        value = read(env, atom)
        constant = isinstance(atom, Literal) or times[atom] == -1
        return jnp.broadcast_to(value, (steps.length, *jnp.shape(value))) if constant else value

    for program, loop in plan.stages:
        if program.outvars:
            in_time = [times[v] != -1 for v in program.invars]
            given = [env[v] for v in program.invars]
            made = run_rows(program, in_time, steps.length, plan.purpose, plan.accumulated, *given)
            env |= zip(program.outvars, made, strict=True)
        if loop is not None:
            last, ys = run_loop(
                loop,
                [env[v] for v in loop.consts],
                _in_form(loop, [carry[i] for i in loop.carry]),
                [rows(v) for v in loop.xs],
                steps,
            )
            if loop.form is not None:
                last = [loop.form.release(x) if x.ndim == 2 else x for x in last]
            env |= zip(loop.ys, ys, strict=True)
            new_carry |= zip(loop.carry, last, strict=True)
    if plan.tail.outvars:
        ends = {body.outvars[i]: value for i, value in new_carry.items()}
        tail = [
            ends[v]
            if v in ends
            else env[v]
            if times[v] == -1
            else env[v][0 if steps.reverse else -1]
            for v in plan.tail.invars
        ]
        new_carry |= zip(plan.unread, plan.tail.run(*tail), strict=True)
    return [new_carry[i] for i in range(plan.carry)], [
        rows(atom) for atom in body.outvars[plan.carry :]
    ]


def _in_form(loop: Loop, carry: list[Array]) -> list[Array]:
    """The carries of a loop as its program takes them."""
    form = loop.form
    return [x if form is None or x.ndim != 2 else form.hold(x) for x in carry]


def run_plain(
    program: Program,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    steps: Steps,
) -> tuple[list[Array], list[Array]]:
    """`lax.scan` over `program`.

    Args:
        program: `(consts, carry, x) -> (carry, y)`, flat.
        consts: the same at every step.
        carry: the first carry.
        xs: arrays with a row per step.
        steps: how many there are, and how they are run through.

    Returns:
        The last carry, and ys with a row per step.
    """

    def step(carry: list[Array], x: list[Array]) -> tuple[list[Array], list[Array]]:
        return program.step(consts, carry, x)

    return steps.scan(step, list(carry), list(xs))


def over_blocks(
    run_block: Callable[[PyTree, PyTree, Steps], tuple[PyTree, PyTree]],
    init: PyTree,
    xs: PyTree,
    steps: Steps,
    block: int,
    remat: bool,
) -> tuple[PyTree, PyTree]:
    """Runs `run_block` over consecutive blocks of time, the shorter remainder last.

    Args:
        run_block: `(carry, xs of one block, its steps) -> (carry, ys of that block)`.
        init: the first carry.
        xs: pytree of arrays `[T, ...]`.
        steps: all T of them.
        block: timesteps per block, at most T.
        remat: whether only the carries between blocks are kept for the backward pass.

    Returns:
        The last carry, and ys as a pytree of arrays `[T, ...]`.
    """
    time, reverse = steps.length, steps.reverse
    blocks, rest = divmod(time, block)

    def run(carry: PyTree, xs: PyTree, count: int) -> tuple[PyTree, PyTree]:
        def plain(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
            return run_block(carry, xs, steps._replace(length=count))

        # Inside a loop nothing can be merged with its recomputation; in a lone block it could.
        inside = count == block and blocks > 1
        return (jax.checkpoint(plain, prevent_cse=not inside) if remat else plain)(carry, xs)

    if blocks == 1 and not rest:
        return run(init, xs, time)

    split = rest if reverse else time - rest
    first = jax.tree.map(lambda x: x[:split], xs)
    second = jax.tree.map(lambda x: x[split:], xs)
    main, remainder = (second, first) if reverse else (first, second)
    main = jax.tree.map(lambda x: x.reshape(blocks, block, *x.shape[1:]), main)
    carry, ys = lax.scan(
        lambda carry, xs: run(carry, xs, block),
        init,
        main,
        blocks,
        reverse,
        steps.unroll is True or 1,
    )
    ys = jax.tree.map(lambda y: y.reshape(blocks * block, *y.shape[2:]), ys)
    if rest:
        carry, ys_rest = run(carry, remainder, rest)
        parts = (ys_rest, ys) if reverse else (ys, ys_rest)
        ys = jax.tree.map(lambda *y: jnp.concatenate(y), *parts)
    return carry, ys


def run_in_place(
    plan: Plan,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    axes: Axes,
    steps: Steps,
    block: int,
) -> tuple[list[Array], list[Array]]:
    """Runs a plan over blocks of time, each row of ys written once, where it will stay.

    Not to be differentiated by JAX, for which `over_blocks` with `run_block` is there: that makes
    ys block by block and copies them; here the whole of ys is a carry.

    Args:
        plan: the split body.
        consts: what the body closes over.
        carry: the first carry.
        xs: arrays with a row per step.
        axes: the axis of time of each of `xs` and of ys.
        steps: all of them.
        block: timesteps per block.

    Returns:
        The last carry, and ys with a row per step.
    """
    invariant = run_invariant(plan, consts)
    if block == steps.length:
        rows = list(map(time_first, xs, axes.xs))
        return _run_whole(plan, invariant, carry, rows, axes.ys, steps)
    outs = plan.body.outvars[plan.carry :]

    def run(state: PyTree, index: Array, steps: Steps) -> tuple[PyTree, None]:
        carry, whole = state
        writer = Writer(outs, whole, axes.ys, index)
        rows = [block_of(x, axis, index) for x, axis in zip(xs, axes.xs, strict=True)]
        run_loop = functools.partial(_run_loop, writer)
        carry, ys = run_block(plan, invariant, carry, rows, steps, run_loop)
        writer.put_missing(ys)
        return (carry, writer.whole), None

    # Arrays that begin alike would be made once and copied.
    whole = [
        empty_rows(v.aval, steps.length, axis, i)
        for i, (v, axis) in enumerate(zip(outs, axes.ys, strict=True))
    ]
    state = (list(carry), whole)
    return over_blocks(run, state, jnp.arange(steps.length), steps, block, False)[0]


def run_at_once(
    plan: Plan,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    axes: Axes,
    steps: Steps,
) -> tuple[list[Array], list[Array]]:
    """Runs a plan of a single loop over all time, xs being read where they lie.

    The arguments are those of `run_in_place`, and so are the results.
    """
    index = jnp.arange(steps.length)
    inputs = plan.body.invars[plan.consts + plan.carry :]
    whole = variables([*plan.body.outvars, *plan.tail.invars])  # read otherwise, too
    rows = [
        InPlace(x, index, axis) if axis and v not in whole else time_first(x, axis)
        for v, x, axis in zip(inputs, xs, axes.xs, strict=True)
    ]
    return _run_whole(plan, run_invariant(plan, consts), carry, rows, axes.ys, steps)


def _run_whole(
    plan: Plan,
    invariant: Env,
    carry: Sequence[Array],
    rows: Sequence[Array | InPlace],
    axes: Sequence[int],
    steps: Steps,
) -> tuple[list[Array], list[Array]]:
    """Runs a plan over all time as one block, with time of ys on `axes`."""
    # What lies time first `lax.scan` puts together itself, and in groups where it is unrolled.
    outs = plan.body.outvars[plan.carry :]
    whole = [
        empty_rows(v.aval, steps.length, axis, 0) if axis else None
        for v, axis in zip(outs, axes, strict=True)
    ]
    writer = Writer(outs, whole, axes, jnp.arange(steps.length))
    run_loop = functools.partial(_run_loop, writer)
    carry, ys = run_block(plan, invariant, carry, rows, steps, run_loop)
    return carry, [
        time_on(y, axis) if written is None or place in writer.missing else written
        for place, (y, axis, written) in enumerate(zip(ys, axes, writer.whole, strict=True))
    ]


def _run_loop(
    writer: Writer,
    loop: Loop,
    consts: list[Array],
    carry: list[Array],
    xs: list[Any],
    steps: Steps,
) -> tuple[list[Array], list[Array]]:
    """Runs a loop, each step of which writes its rows if it runs step by step."""
    if (done := run_otherwise(loop, consts, carry, xs, steps)) is not None:
        return done
    state, of_rows = carried(loop.program, consts, carry)

    def step(state: PyTree, x: PyTree) -> tuple[PyTree, list[Array]]:
        return of_rows(state, list(map(one_row, xs, x)))

    state, ys = writer.scan(loop, step, state, list(map(given_rows, xs)), steps.scan)
    return state[: len(carry)], ys


def run_otherwise(
    loop: Loop,
    consts: list[Array],
    carry: list[Array],
    xs: list[Array],
    steps: Steps,
    linear: Set[Var] = frozenset(),
) -> tuple[list[Array], list[Array]] | None:
    """Runs a loop not step by step: in parallel, or as one kernel if it fits.

    Of a tangent the transpose, by the variables that it is `linear` in, has to fit as well.
    """
    if steps.loop_method == "parallel":
        return run_affine(loop, consts, carry, xs, steps.length, steps.reverse)
    if steps.loop_method != "fused" or not linear.isdisjoint(loop.consts):
        return None
    tangents = frozenset(i for i, v in enumerate(loop.xs) if v in linear)
    try:
        plan = plan_kernel(loop.program, len(loop.consts), len(loop.carry))
        if linear:
            plan.kernel.transposed(plan.columns_of(tangents))
    except KernelMisfitError:
        return None
    return run_fused(plan, consts, carry, xs, steps.length, steps.reverse, tangents)
