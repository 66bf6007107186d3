"""Runs a plan over a block of time: the passes at once, the loops in order, and their derivative.

A loop is a `jax.custom_jvp` whose tangent rule is again a scan, over the tangent of one step, and
that scan is split as any other: a term such as `h_prev @ dU` depends on known states and on the
tangent of a parameter, but not on the tangent of the state, so it is a pass over the block. JAX's
transposition of this pass is the weight gradient, one contraction per block instead of one per
step. Nothing is transposed by hand; forward mode, reverse mode and higher orders follow.

The tangent step is rematerialised. All that it needs is kept by the forward loop: the states, and
the sums that products enter into (a nonlinear operation needs the sum, not its terms), or what a
tanh or logistic function makes of such a sum, where this tells its derivative.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxrnn._algebra import simplify
from jaxrnn._fission import Loop, Plan, fission
from jaxrnn._jaxpr import (
    Atom,
    Literal,
    Program,
    Var,
    bind,
    dependents,
    dtype,
    hides_product,
    is_heavy,
    is_linear,
    is_random,
    read,
    slope_by_output,
    trace,
    variables,
)
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


def run_loop(
    loop: Loop, consts: Sequence[Array], carry: Sequence[Array], xs: Sequence[Array], steps: Steps
) -> tuple[list[Array], list[Array]]:
    """Runs a loop of a plan as a recurrence with a derivative of its own.

    Not if a product is out of sight, in an inner loop, say: it would only be computed again.
    """
    if any(map(hides_product, loop.program.equations)):
        return run_plain(loop.program, consts, carry, xs, steps)
    return run_recurrence(loop.program, consts, carry, xs, steps)


def run_recurrence(
    program: Program,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    steps: Steps,
) -> tuple[list[Array], list[Array]]:
    """`lax.scan` over `program`, with the derivative described at the top of this file.

    Args:
        program: `(consts, carry, x) -> (carry, y)`, flat.
        consts: the same at every step.
        carry: the first carry.
        xs: arrays with a row per step.
        steps: how many there are, and how they are run through.

    Returns:
        The last carry, and ys with a row per step.
    """
    n_consts, n_carry = len(consts), len(carry)

    @jax.custom_jvp
    def recurrence(
        consts: list[Array], carry: list[Array], xs: list[Array]
    ) -> tuple[list[Array], list[Array]]:
        return run_plain(program, consts, carry, xs, steps)

    def rule(primals: Any, tangents: Any) -> Any:
        consts, carry, xs = primals
        old = program.invars[n_consts : n_consts + n_carry]
        new, yielded = _split(program.outvars, n_carry)
        kept = _kept(program)
        rows: list[Atom] = list(yielded)
        rows += [v for v in kept if v not in rows]
        # The state before a step is what the step before it made, which may be a row already.
        is_row = []
        for before, after in zip(old, new, strict=True):
            is_row.append(after in rows)
            rows += [] if is_row[-1] else [before]
        keeping = program.cut(program.invars, [*new, *rows], program.equations)
        last, made = run_recurrence(keeping, consts, carry, xs, steps)

        def states() -> list[Array]:
            return [
                _one_before(made[rows.index(after)], first, steps)
                if repeats
                else made[rows.index(before)]
                for before, after, first, repeats in zip(old, new, carry, is_row, strict=True)
            ]

        values = [made[rows.index(v)] for v in kept]
        t_last, t_ys = _Tangent(program, kept, primals, states, values, tangents).run(steps)
        ys = made[: len(yielded)]
        return (last, ys), (_fill(last, t_last), _fill(ys, t_ys))

    recurrence.defjvp(rule, symbolic_zeros=True)
    return recurrence(list(consts), list(carry), list(xs))


def run_plain(
    program: Program,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    steps: Steps,
) -> tuple[list[Array], list[Array]]:
    """`lax.scan` over `program`; arguments and results as in `run_recurrence`."""

    def step(carry: list[Array], x: list[Array]) -> tuple[list[Array], list[Array]]:
        outs = program.run(*consts, *carry, *x)
        return outs[: len(carry)], outs[len(carry) :]

    return lax.scan(step, list(carry), list(xs), *steps)


def _split(values: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """`values` cut into pieces of the given sizes and a last one with what is left."""
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return [*parts, list(values[start:])]


def _one_before(rows: Array, first: Array, steps: Steps) -> Array:
    """For every step the row of the step before it, and `first` for the first."""
    return jnp.concatenate([rows[1:], first[None]] if steps.reverse else [first[None], rows[:-1]])


def _is_differentiable(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


def _fill(primals: Sequence[Array], tangents: Sequence[Array]) -> list[Any]:
    """`tangents`, which belong to the differentiable ones among `primals`, and zeros between."""
    given = iter(tangents)
    return [
        next(given) if _is_differentiable(x) else np.zeros(np.shape(x), jax.dtypes.float0)
        for x in primals
    ]


def _kept(program: Program) -> list[Var]:
    """The variables of a step that its derivative must not have to compute again.

    A sum of products is needed only where something nonlinear reads it; through linear equations
    the derivative passes without them. If that is one equation whose result tells its derivative,
    the result is kept instead. Of what is made from random bits, what meets the data is kept: a
    dropout mask, not the bits.
    """
    readers = Counter(a for e in program.equations for a in variables(e.invars))
    readers.update(variables(program.outvars))
    moving = dependents(
        program, [v for v in program.invars if jnp.issubdtype(dtype(v), jnp.inexact)]
    )
    costly: set[Var] = set()
    kept: dict[Var, None] = {}
    for equation in program.equations:
        read_here = [v for v in variables(equation.invars) if v in costly]
        moves = equation.outvars[0] in moving
        if is_heavy(equation) or is_random(equation) or (read_here and not moves):
            costly |= set(equation.outvars)
        elif read_here and is_linear(equation):
            costly |= set(equation.outvars)
            kept |= dict.fromkeys(v for v in read_here if v not in moving)
            continue
        if moves and read_here:
            by_output = slope_by_output(equation) and all(readers[v] == 1 for v in read_here)
            kept |= dict.fromkeys(equation.outvars if by_output else read_here)
    return list(kept)


Slope = Callable[[Array, Array], Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _known(_slope: Slope, value: Array, _origin: Array) -> Array:
    """`value`, whose derivative is `_slope(value, derivative of _origin)`."""
    return value


@_known.defjvp
def _known_jvp(slope: Slope, primals: Any, tangents: Any) -> Any:
    return primals[0], slope(primals[0], tangents[1])


def _as_it_is(_value: Array, tangent: Array) -> Array:
    return tangent


class _Tangent:
    """The tangent of a recurrence over one block, as a scan body that is split again."""

    def __init__(
        self,
        program: Program,
        kept: Sequence[Var],
        primals: Any,
        states: Callable[[], list[Array]],
        values: Sequence[Array],
        tangents: Any,
    ):
        """Both `primals` and `tangents` are consts, the first carry, xs."""
        consts, carry, xs = primals
        t_consts, t_carry, t_xs = tangents
        self.program, self.kept = program, kept
        self.consts = list(consts)
        self.carry, self.xs, self.states, self.values = list(carry), list(xs), states, list(values)
        self.moving_consts = [i for i, t in enumerate(t_consts) if is_moving(t)]
        self.moving_carry = [i for i, c in enumerate(carry) if _is_differentiable(c)]
        self.moving_xs = [i for i, t in enumerate(t_xs) if is_moving(t)]
        self.t_consts = [t_consts[i] for i in self.moving_consts]
        self.t_carry = [
            t_carry[i] if is_moving(t_carry[i]) else jnp.zeros_like(carry[i])
            for i in self.moving_carry
        ]
        self.t_xs = [t_xs[i] for i in self.moving_xs]

    def run(self, steps: Steps) -> tuple[list[Array], list[Array]]:
        """The tangents of the last carry and of ys, of the differentiable ones among them."""
        consts = [*self.consts, *self.t_consts]
        t_xs, xs, values = ([rows[0] for rows in r] for r in (self.t_xs, self.xs, self.values))
        example = [*consts, *self.t_carry, *t_xs, *xs, *self.carry, *values]
        traced = trace(self._step, *example)
        consts = [*traced.consts, *consts]
        body = simplify(
            traced.program, len(consts), len(self.t_carry), [*traced.consts, *example], True
        )
        consts = [*body.consts, *consts]
        end = len(consts)
        moving = body.program.invars[end - len(self.t_consts) : end]
        plan = fission(body.program, end, len(self.t_carry), frozenset(moving))
        linear = frozenset(
            dependents(
                body.program,
                body.program.invars[end - len(self.t_consts) :][
                    : len(self.t_consts) + len(self.t_carry) + len(self.t_xs)
                ],
            )
        )

        def run_loop(
            loop: Loop,
            consts: list[Array],
            carry: list[Array],
            rows: list[Array],
            steps: Steps,
        ) -> tuple[list[Array], list[Array]]:
            # Transposition wants the linear inputs first.
            order = sorted(range(len(rows)), key=lambda i: loop.xs[i] not in linear)
            back = sorted(range(len(rows)), key=order.__getitem__)

            def step(carry: list[Array], x: list[Array]) -> tuple[list[Array], list[Array]]:
                outs = loop.program.run(*consts, *carry, *(x[i] for i in back))
                return outs[: len(carry)], outs[len(carry) :]

            step = jax.checkpoint(step, prevent_cse=False)
            return lax.scan(step, carry, [rows[i] for i in order], *steps)

        invariant = run_invariant(plan, consts)

        # What is only arranged anew is not kept for the backward pass besides what it is made of.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def block(carry: list[Array], t_xs: list[Array]) -> tuple[list[Array], list[Array]]:
            xs = [*t_xs, *self.xs, *self.states(), *self.values]
            return run_block(plan, invariant, carry, xs, steps, run_loop)

        return block(self.t_carry, self.t_xs)

    def _step(self, *args: Array) -> list[Array]:
        """The tangents of one step's new carry and y, from everything that it may depend on."""
        n_states = len(self.carry)
        consts, t_consts, t_carry, t_xs, xs, states, values = _split(
            args,
            len(self.consts),
            len(self.t_consts),
            len(self.t_carry),
            len(self.t_xs),
            len(self.xs),
            n_states,
        )
        inputs = [*consts, *states, *xs]
        offset = len(consts)
        moving = [
            *self.moving_consts,
            *(offset + i for i in self.moving_carry),
            *(offset + n_states + i for i in self.moving_xs),
        ]

        def outputs(*moved: Array) -> list[Array]:
            placed = dict(zip(moving, moved, strict=True))
            env = {v: placed.get(i, inputs[i]) for i, v in enumerate(self.program.invars)}
            known = dict(zip(self.kept, values, strict=True))
            for equation in self.program.equations:
                operands = [read(env, a) for a in equation.invars]
                slope = slope_by_output(equation) if equation.outvars[0] in known else None
                origins = operands if slope else bind(equation, operands)
                for v, origin in zip(equation.outvars, origins, strict=True):
                    env[v] = _known(slope or _as_it_is, known[v], origin) if v in known else origin
            outs = [jnp.asarray(read(env, a)) for a in self.program.outvars]
            return [out for out in outs if _is_differentiable(out)]

        primals = [inputs[i] for i in moving]
        return jax.jvp(outputs, primals, [*t_consts, *t_carry, *t_xs])[1]


def is_moving(tangent: Any) -> bool:
    """Whether a tangent, as a rule with symbolic zeros gets it, is more than a zero."""
    return not isinstance(tangent, SymbolicZero) and tangent.dtype != jax.dtypes.float0
