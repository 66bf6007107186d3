"""The tangent of a loop over one block of time: a scan body again, and split like any other."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxrnn._algebra import simplify
from jaxrnn._block import Steps, run_block, run_invariant
from jaxrnn._fission import Loop, fission
from jaxrnn._jaxpr import Program, Var, bind, dependents, read, slope_by_output, trace

Array = jax.Array


class Tangent:
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
        """Both `primals` and `tangents` are consts, the first carry, xs.

        `states` makes the rows of the carries, `values` are those of `kept`.
        """
        consts, carry, xs = primals
        t_consts, t_carry, t_xs = tangents
        self.program, self.kept = program, kept
        self.consts = list(consts)
        self.carry, self.xs, self.states, self.values = list(carry), list(xs), states, list(values)
        self.moving_consts = [i for i, t in enumerate(t_consts) if is_moving(t)]
        self.moving_carry = [i for i, c in enumerate(carry) if is_differentiable(c)]
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
        start, stop = end - len(self.t_consts), end + len(self.t_carry) + len(self.t_xs)
        inputs = body.program.invars
        plan = fission(body.program, end, len(self.t_carry), frozenset(inputs[start:end]))
        linear = dependents(body.program, inputs[start:stop])

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
        consts, t_consts, t_carry, t_xs, xs, states, values = _split(
            args,
            len(self.consts),
            len(self.t_consts),
            len(self.t_carry),
            len(self.t_xs),
            len(self.xs),
            len(self.carry),
        )
        inputs = [*consts, *states, *xs]
        offset = len(consts)
        moving = [
            *self.moving_consts,
            *(offset + i for i in self.moving_carry),
            *(offset + len(states) + i for i in self.moving_xs),
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
            return [out for out in outs if is_differentiable(out)]

        primals = [inputs[i] for i in moving]
        return jax.jvp(outputs, primals, [*t_consts, *t_carry, *t_xs])[1]


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


def _split(values: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """`values` cut into pieces of the given sizes and a last one with what is left."""
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return [*parts, list(values[start:])]


def is_differentiable(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


def is_moving(tangent: Any) -> bool:
    """Whether a tangent, as a rule with symbolic zeros gets it, is more than a zero."""
    return not isinstance(tangent, SymbolicZero) and tangent.dtype != jax.dtypes.float0
