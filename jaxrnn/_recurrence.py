"""The loops of a plan, with a derivative of their own.

A loop is a `jax.custom_jvp` whose tangent rule is again a scan, over the tangent of one step, and
that scan is split as any other: a term such as `h_prev @ dU` depends on known states and on the
tangent of a parameter, but not on the tangent of the state, so it is a pass over the block. JAX's
transposition of this pass is the weight gradient, one contraction per block instead of one per
step. Nothing is transposed by hand; forward mode, reverse mode and higher orders follow.

The tangent step is rematerialised. All that it needs is kept by the forward loop: the states, and
the sums that products enter into (a nonlinear operation needs the sum, not its terms), or what a
tanh or logistic function makes of such a sum, where this tells its derivative.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrnn._block import Steps, run_plain
from jaxrnn._fission import Loop
from jaxrnn._jaxpr import (
    Atom,
    Program,
    Var,
    dependents,
    dtype,
    hides_product,
    is_heavy,
    is_linear,
    is_random,
    slope_by_output,
    variables,
)
from jaxrnn._tangent import Tangent, is_differentiable

Array = jax.Array


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
    """As `run_plain`, with the derivative described at the top of this file."""
    n_consts, n_carry = len(consts), len(carry)

    @jax.custom_jvp
    def recurrence(
        consts: list[Array], carry: list[Array], xs: list[Array]
    ) -> tuple[list[Array], list[Array]]:
        return run_plain(program, consts, carry, xs, steps)

    def rule(primals: Any, tangents: Any) -> Any:
        consts, carry, xs = primals
        old = program.invars[n_consts : n_consts + n_carry]
        new, yielded = program.outvars[:n_carry], program.outvars[n_carry:]
        kept = _kept(program)
        rows: list[Atom] = list(yielded)
        rows += [v for v in kept if v not in rows]
        # The state before a step is what the step before it made, which may be a row already.
        for before, after in zip(old, new, strict=True):
            rows += [] if before in rows or after in rows else [before]
        keeping = program.cut(program.invars, [*new, *rows], program.equations)
        last, made = run_recurrence(keeping, consts, carry, xs, steps)

        def states() -> list[Array]:
            return [
                made[rows.index(before)]
                if before in rows
                else _one_before(made[rows.index(after)], first, steps)
                for before, after, first in zip(old, new, carry, strict=True)
            ]

        values = [made[rows.index(v)] for v in kept]
        t_last, t_ys = Tangent(program, kept, primals, states, values, tangents).run(steps)
        ys = made[: len(yielded)]
        return (last, ys), (_fill(last, t_last), _fill(ys, t_ys))

    recurrence.defjvp(rule, symbolic_zeros=True)
    return recurrence(list(consts), list(carry), list(xs))


def _one_before(rows: Array, first: Array, steps: Steps) -> Array:
    """For every step the row of the step before it, and `first` for the first."""
    return jnp.concatenate([rows[1:], first[None]] if steps.reverse else [first[None], rows[:-1]])


def _fill(primals: Sequence[Array], tangents: Sequence[Array]) -> list[Any]:
    """`tangents`, which belong to the differentiable ones among `primals`, and zeros between."""
    given = iter(tangents)
    return [
        next(given) if is_differentiable(x) else np.zeros(np.shape(x), jax.dtypes.float0)
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
