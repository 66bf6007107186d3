"""A plan run over blocks of time, with a derivative of its own.

It is a `jax.custom_jvp` whose tangent rule is again a scan, over the tangent of one step, and that
scan is split as any other: a term such as `h_prev @ dU` depends on known states and on the tangent
of a parameter, but not on the tangent of the state, so it is a pass over the block. JAX's
transposition of this pass is the weight gradient, one contraction per block instead of one per
step. Nothing is transposed by hand; forward mode, reverse mode and higher orders follow.

The tangent step is rematerialised. What it needs is kept by the steps (`_residuals.py`), in rows
that are written once, where they stay.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxrnn._block import (
    Axes,
    Steps,
    over_blocks,
    run_at_once,
    run_block,
    run_in_place,
    run_invariant,
    run_plain,
)
from jaxrnn._block_length import results_block
from jaxrnn._equations import has_own_rule, hides_product
from jaxrnn._fission import Loop, Plan, Purpose, fission
from jaxrnn._jaxpr import (
    Equation,
    Program,
    Traced,
    Var,
    as_function_of,
    bind,
    inline,
    retraced,
    trace,
    variables,
)
from jaxrnn._residuals import is_active, residuals, symbolic_zero
from jaxrnn._rows import row_of
from jaxrnn._samples_last import with_samples_last
from jaxrnn._schedule import equations_for
from jaxrnn._tangent import Tangent
from jaxrnn._time_axis import time_first, time_on

Array = jax.Array
Results = tuple[list[Array], list[Array]]


def run_split(
    plan: Plan,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    axes: Axes,
    steps: Steps,
    block: int,
    remat: bool,
) -> tuple[list[Array], list[Array]]:
    """As `run_in_place`, but differentiable; `remat` as in `over_blocks`."""
    # Of a block that is run again all is kept for that long, or it would be made a third time.
    steps = steps._replace(forgets=not remat)
    invariant = run_invariant(plan, consts)
    fixed, program = _varying(plan)
    hidden = any(map(hides_product, program.equations))
    values = [invariant[v] for v in fixed]

    def run(carry: list[Array], xs: list[Array], steps: Steps) -> tuple[list[Array], list[Array]]:
        if hidden:
            return run_block(plan, invariant, carry, xs, steps, _run_loop)
        first = Axes.first(len(xs), len(axes.ys))
        return _run(program, values, carry, xs, first, steps, steps.length)

    if hidden or remat:
        rows = list(map(time_first, xs, axes.xs))
        last, ys = over_blocks(run, list(carry), rows, steps, block, remat)
        return last, list(map(time_on, ys, axes.ys))
    return _run(program, values, carry, xs, axes, steps, block)


def run_with_derivative_of(
    other: Callable[..., Results], run: Callable[..., Results], operands: Sequence[list[Array]]
) -> Results:
    """`run(*operands)`, differentiated as `other(*operands)`, which gives the same."""

    @jax.custom_jvp
    def results(*operands: list[Array]) -> Results:
        return run(*operands)

    results.defjvp(functools.partial(_derivative, other), symbolic_zeros=True)
    return results(*operands)


def _derivative(f: Callable[..., Results], primals: Any, tangents: Any) -> tuple[Results, Any]:
    """As `jax.jvp`, but zeros among the tangents are symbolic."""
    values, tree = jax.tree.flatten(primals)
    slopes = jax.tree.leaves(tangents)
    active = [i for i, slope in enumerate(slopes) if is_active(slope)]

    def flat(*values: Array) -> Results:
        return f(*jax.tree.unflatten(tree, values))

    of = as_function_of(active, flat, values)
    outs, made = jax.jvp(of, [values[i] for i in active], [slopes[i] for i in active])
    return outs, jax.tree.map(_as_symbolic, outs, made)


def _as_symbolic(primal: Array, tangent: Any) -> Any:
    return symbolic_zero(primal) if tangent.dtype == jax.dtypes.float0 else tangent


def _varying(plan: Plan) -> tuple[list[Var], Program]:
    """The body without what runs once, and the variables that are its consts then."""
    body = plan.body
    given = {*body.invars, *variables(plan.invariant.outvars)}
    equations = equations_for(body, variables(body.outvars), given)
    read = {*variables(body.outvars), *variables(a for e in equations for a in e.invars)}
    fixed = [v for v in [*body.invars[: plan.consts], *plan.invariant.outvars] if v in read]
    inputs = [*fixed, *body.invars[plan.consts :]]
    return fixed, body.cut(inputs, body.outvars, equations)


def _run_loop(
    loop: Loop, consts: Sequence[Array], carry: Sequence[Array], xs: Sequence[Array], steps: Steps
) -> tuple[list[Array], list[Array]]:
    """A loop of a plan that as a whole can have no derivative of its own.

    If a product is out of sight, in an inner loop, say, it would only be computed again.
    """
    if steps.loop_method != "parallel" and any(map(hides_product, loop.program.equations)):
        return run_plain(loop.program, consts, carry, xs, steps)
    first = Axes.first(len(xs), len(loop.ys))
    return _run(loop.program, consts, carry, xs, first, steps, steps.length)


def _run(
    program: Program,
    consts: Sequence[Array],
    carry: Sequence[Array],
    xs: Sequence[Array],
    axes: Axes,
    steps: Steps,
    block: int,
    purpose: Purpose = "results",
) -> tuple[list[Array], list[Array]]:
    """Runs a body over blocks of time, with the derivative described at the top of this file.

    Its `purpose` is "residuals" if among its results is what the tangent needs.
    """
    n_consts, n_carry = len(consts), len(carry)

    @jax.custom_jvp
    def run(
        consts: list[Array], carry: list[Array], xs: list[Array]
    ) -> tuple[list[Array], list[Array]]:
        plan = fission(program, n_consts, n_carry, purpose)
        turned = with_samples_last(plan, steps)
        if turned is not None and not turned.stages[1:]:
            return run_at_once(turned, consts, carry, xs, axes, steps)
        chosen = turned or plan
        length = results_block(chosen, steps, block) if purpose == "results" else block
        return run_in_place(chosen, consts, carry, xs, axes, steps, length)

    def step_by_step(consts: list[Array], carry: list[Array], xs: list[Array]) -> Results:
        rows = list(map(time_first, xs, axes.xs))
        last, ys = run_plain(program, consts, carry, rows, steps)
        return last, list(map(time_on, ys, axes.ys))

    def rule(primals: Any, tangents: Any) -> Any:
        consts, carry, xs = primals
        held = residuals(program, tangents, steps.forgets)
        new = program.outvars[:n_carry]
        keeping, given = program.cut(program.invars, [*new, *held.rows], program.equations), consts
        if any(map(has_own_rule, program.equations)):
            example = [row_of(x, axis, 0) for x, axis in zip(xs, axes.xs, strict=True)]
            traced = _as_differentiated(keeping, held.active, *consts, *carry, *example)
            if traced.has_effects:
                return _derivative(step_by_step, primals, tangents)
            keeping, given = traced.program, [*traced.consts, *consts]
        ys_axes = [*axes.ys, *[0] * (len(held.rows) - len(axes.ys))]
        lying = Axes(axes.xs, ys_axes)
        last, made = _run(keeping, given, carry, xs, lying, steps, block, "residuals")

        tangent = Tangent(program, primals, tangents, lying, made, held)
        t_last, t_ys = tangent.run(steps, block)
        ys = made[: len(program.outvars) - n_carry]
        return (last, ys), (
            _fill(last, tangent.active_carry, t_last),
            _fill(ys, tangent.active_ys, t_ys),
        )

    run.defjvp(rule, symbolic_zeros=True)
    return run(list(consts), list(carry), list(xs))


def _as_differentiated(program: Program, active: set[Var], *args: Any) -> Traced:
    """`program` as it is once differentiated: with what the user's derivative rules compute.

    A `custom_jvp` rule gives results, too, and a `custom_vjp` function has no forward mode, but its
    forward rule may: values and second derivatives are those of the rules. That is where one of the
    variables that are `active` comes in; a `custom_vjp` function may not be asked for derivatives
    by an array that it closes over.
    """
    apply = functools.partial(_by_rules, active)
    traced = trace(functools.partial(inline, program, apply=apply), *args)
    return retraced(traced, args)  # what rules have called is inlined


def _by_rules(active: set[Var], equation: Equation, values: Sequence[Any]) -> list[Any]:
    """The results of `equation`, by the derivative rules of the functions that it calls."""
    places = [i for i, a in enumerate(equation.invars) if isinstance(a, Var) and a in active]
    if not (places and has_own_rule(equation)):
        return bind(equation, values)

    call = as_function_of(places, lambda *values: bind(equation, values), values)
    results: list[Any] = jax.vjp(call, *(values[i] for i in places))[0]
    return results


def _fill(primals: Sequence[Array], active: Sequence[int], tangents: Sequence[Any]) -> list[Any]:
    """`tangents`, which belong to the `active` ones among `primals`, and zeros between."""
    given = dict(zip(active, tangents, strict=True))
    return [given[i] if i in given else symbolic_zero(x) for i, x in enumerate(primals)]
