"""Checkpoints in a step: it is taken apart all the same, and what is under them is not kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from jax import lax
from structure import (
    count,
    equations,
    multiply_adds,
    primitive_of,
    products_in_innermost_loops,
    sum_of_sines,
)

import jaxrnn

BATCH, TIME, UNITS = 2, 8, 64
SPLIT = {"method": "sequential", "chunk": 4}
CHECKPOINT = primitive_of(jax.checkpoint(jnp.sin), 1.0)
LOGISTIC, TANH = (primitive_of(f, 1.0) for f in (lax.logistic, jnp.tanh))


def lstm(params, carry, x):
    h, c = carry
    i, f, g, o = jnp.split(x @ params["w"] + h @ params["u"] + params["b"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def operands():
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 4 * UNITS), "u": (UNITS, 4 * UNITS), "b": (4 * UNITS,)}
    params = {k: jnp.asarray(0.2 * rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    h, c = jnp.asarray(rng.standard_normal((2, BATCH, UNITS)), jnp.float32)
    return params, (h, c), jnp.asarray(rng.standard_normal((TIME, BATCH, 1)), jnp.float32)


def run(scan, under=jax.checkpoint, **flags):
    return lambda params, carry, xs: scan(
        under(lambda carry, x: lstm(params, carry, x)), carry, xs, **flags
    )


def gradient(function):
    return jax.grad(lambda *a: sum_of_sines(function(*a)))


UNDER = {
    "checkpoint": jax.checkpoint,
    "nothing_saveable": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.nothing_saveable
    ),
    "jit_of_checkpoint": lambda f: jax.jit(jax.checkpoint(f, prevent_cse=False)),
    "checkpoint_of_checkpoint": lambda f: jax.checkpoint(jax.jit(jax.checkpoint(f))),
}


@pytest.mark.parametrize("under", UNDER)
def test_products_leave_the_loop_and_no_step_is_run_again(under):
    function = run(jaxrnn.scan, UNDER[under], **SPLIT)
    forward = jax.make_jaxpr(function)(*operands())
    backward = jax.make_jaxpr(gradient(function))(*operands())
    assert products_in_innermost_loops(forward) == [1]
    assert products_in_innermost_loops(backward) == [1, 1]
    plain = jax.make_jaxpr(gradient(run(lax.scan)))(*operands())
    assert multiply_adds(backward) <= multiply_adds(plain)  # the products of each step, once again


def results_and_derivatives(function):
    def both(*operands):
        gradients = gradient(function)(*operands)
        return gradients, jax.jvp(function, operands, operands)  # as tangents, too

    return jax.jit(both)(*operands())


@functools.cache
def reference(reverse):
    return results_and_derivatives(run(lax.scan, reverse=reverse))


@pytest.mark.parametrize("flags", [{}, SPLIT, {"remat": True}, {"method": "lax"}, {"chunk": 3}])
@pytest.mark.parametrize("reverse", [False, True])
def test_results_and_derivatives_are_those_of_lax_scan(flags, reverse):
    ours = results_and_derivatives(run(jaxrnn.scan, reverse=reverse, **flags))
    assert_same(ours, reference(reverse), scale=10)


def test_a_step_whose_policy_keeps_its_products_is_taken_apart_as_without():
    plain = str(jax.make_jaxpr(gradient(run(jaxrnn.scan, lambda f: f, **SPLIT)))(*operands()))
    for policy in ("dots_saveable", "everything_saveable"):
        under = functools.partial(jax.checkpoint, policy=getattr(jax.checkpoint_policies, policy))
        function = run(jaxrnn.scan, under, **SPLIT)
        assert str(jax.make_jaxpr(gradient(function))(*operands())) == plain


@pytest.mark.parametrize(
    "policy",
    [
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("gates"),
    ],
    ids=["no_batch_dims", "names"],
)
def test_what_another_policy_keeps_is_left_to_it(policy):
    function = run(jaxrnn.scan, lambda f: jax.checkpoint(f, policy=policy))
    program = jax.make_jaxpr(function)(*operands())
    assert [e.params["policy"] for e, _ in equations(program) if e.primitive is CHECKPOINT] == [
        policy
    ]


def beside(scan, under, part, **flags):
    """An LSTM, `under` a checkpoint, and `part`, of `(params, h)`, beside it."""

    def run(params, carry, xs):
        def body(carry, x):
            carry, h = under(lambda carry, x: lstm(params, carry, x))(carry, x)
            return carry, jnp.sin(part(params, h))

        return scan(body, carry, xs, **flags)

    return run


def narrow(params, h):
    return h @ params["u"][:, :8]


def in_a_branch(params, h):
    return lax.cond(h[0, 0] > 0, narrow, lambda _, h: h[:, :8], params, h)


def in_a_loop(params, h):
    return lax.fori_loop(0, 32, lambda _, h: jnp.tanh(h @ params["u"][:, :UNITS]), h)


def test_the_products_under_a_checkpoint_leave_the_loop_with_a_product_beside_it():
    """As many products in the loops as without the checkpoint."""
    ours, without = (
        beside(jaxrnn.scan, under, narrow, **SPLIT) for under in (jax.checkpoint, lambda f: f)
    )
    for of in (lambda f: f, gradient):
        with_it, without_it = (
            sum(products_in_innermost_loops(jax.make_jaxpr(of(f))(*operands())))
            for f in (ours, without)
        )
        assert with_it == without_it


@pytest.mark.parametrize("part", [in_a_branch, in_a_loop, jax.checkpoint(in_a_loop)])
def test_a_checkpoint_stays_where_a_product_is_hidden(part):
    """A step that hides a product has no derivative of its own, which would keep nothing of it."""
    program = jax.make_jaxpr(beside(jaxrnn.scan, jax.checkpoint, part, **SPLIT))(*operands())
    under = [e.params["jaxpr"] for e, _ in equations(program) if e.primitive is CHECKPOINT]
    assert [count(inside, LOGISTIC) for inside in under if count(inside, LOGISTIC)] == [3]


@pytest.mark.parametrize("part", [narrow, in_a_branch, in_a_loop])
def test_results_and_gradients_whatever_is_beside_a_checkpoint(part):
    ours = beside(jaxrnn.scan, jax.checkpoint, part, **SPLIT)
    plain = beside(lax.scan, jax.checkpoint, part)
    assert_same(jax.jit(ours)(*operands()), jax.jit(plain)(*operands()))
    actual, expected = (jax.jit(gradient(f))(*operands()) for f in (ours, plain))
    assert_same(actual, expected, scale=10)


def pairs(params, alpha, x):
    """A hidden Markov model: a sum over pairs of states."""
    scores = alpha[:, :, None] + jax.nn.log_softmax(params, -1)
    return jax.nn.logsumexp(scores, 1) + x @ params, None


def test_steps_that_make_much_more_than_their_states_are_left_alone():
    params, alpha, xs = (
        jnp.ones(s) for s in ((UNITS, UNITS), (BATCH, UNITS), (TIME, BATCH, UNITS))
    )

    def run(params, alpha, xs):
        return jaxrnn.scan(jax.checkpoint(lambda a, x: pairs(params, a, x)), alpha, xs)

    program = jax.make_jaxpr(run)(params, alpha, xs)
    assert count(program, CHECKPOINT) == 1
    assert products_in_innermost_loops(program) == [1]


def test_what_is_the_same_at_every_step_is_not_made_again():
    """A normalised weight, much larger than the states, is no reason to leave a step alone."""

    def run(params, h, xs):
        def body(h, x):
            u = params["u"] / jnp.linalg.norm(params["u"], axis=0)
            return jnp.tanh(x @ params["w"] + h @ u), None

        return jaxrnn.scan(jax.checkpoint(body), h, xs)[0]

    params = {"w": jnp.ones((1, UNITS)), "u": jnp.ones((UNITS, UNITS))}
    program = jax.make_jaxpr(run)(params, jnp.ones((1, UNITS)), jnp.ones((64, 1, 1)))
    assert count(program, CHECKPOINT) == 0


def test_masked_steps_of_rnn_are_taken_apart():
    params, (h, c), xs = operands()
    mask = np.arange(TIME) < np.array([[TIME], [3]])

    def step(x, states):
        carry, y = lstm(params, tuple(states), x)
        return y, list(carry)

    def run(step):
        return lambda xs: jaxrnn.rnn(step, jnp.moveaxis(xs, 0, 1), [h, c], mask=mask, **SPLIT)

    program = jax.make_jaxpr(run(jax.checkpoint(step)))(xs)
    assert products_in_innermost_loops(program) == [1]
    assert count(program, CHECKPOINT) == count(jax.make_jaxpr(run(step))(xs), CHECKPOINT)
    assert_same(run(jax.checkpoint(step))(xs), run(step)(xs))


@pytest.mark.parametrize("keeps", [False, True])
def test_explain_says_what_is_not_kept(keeps):
    params, (h, c), xs = operands()
    policy = jax.checkpoint_policies.dots_saveable if keeps else None

    def step(x, states):
        carry, y = lstm(params, tuple(states), x)
        return y, list(carry)

    checkpointed = jax.checkpoint(step, policy=policy)
    report = jaxrnn.explain(checkpointed, jnp.moveaxis(xs, 0, 1), [h, c], method="sequential")
    is_said = "what is under a checkpoint is recomputed" in report
    assert is_said != keeps
