"""Runs a plan over a block of time: each pass at once, each loop when its turn comes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._fission import Loop, Plan
from jaxrnn._jaxpr import Atom, Literal, Program, read
from jaxrnn._passes import run_rows

Array = jax.Array
Env = dict[Atom, Any]


class Steps(NamedTuple):
    """How a block is run through: as `lax.scan`'s `length`, `reverse` and `unroll`."""

    length: int
    reverse: bool
    unroll: int | bool


RunLoop = Callable[
    [Loop, list[Array], list[Array], list[Array], Steps], tuple[list[Array], list[Array]]
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
    xs: Sequence[Array],
    steps: Steps,
    run_loop: RunLoop,
) -> tuple[list[Array], list[Array]]:
    """Runs a plan over one block of time.

    Args:
        plan: the split body.
        invariant: from `run_invariant`.
        carry: the carries at the start of the block.
        xs: the inputs of the block, arrays with a row per step.
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
            made = run_rows(program, in_time, steps.length, *(env[v] for v in program.invars))
            env |= zip(program.outvars, made, strict=True)
        if loop is not None:
            last, ys = run_loop(
                loop,
                [env[v] for v in loop.consts],
                [carry[i] for i in loop.carry],
                [rows(v) for v in loop.xs],
                steps,
            )
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
        outs = program.run(*consts, *carry, *x)
        return outs[: len(carry)], outs[len(carry) :]

    return lax.scan(step, list(carry), list(xs), *steps)
