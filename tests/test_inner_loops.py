"""Short loops within a step: written out, so that their products leave the loop over time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import BATCH, FEATURES, SPLIT, TIME, UNITS, gradient, operands, run
from helpers import assert_same
from jax import lax
from structure import DOT, SCAN, count, equations, innermost_loops, loops

import jaxrnn


def substeps(rounds):
    """A state that relaxes for some rounds between one input and the next."""

    def step(p, h, x):
        h = lax.fori_loop(0, rounds, lambda _, h: h + 0.1 * jnp.tanh(h @ p["a"]), h)
        h = jnp.tanh(x @ p["w"] + h @ p["u"])
        return h, h

    return step


def backwards(p, h, x):
    """Rounds in reverse, with rows of their own, going in and out."""

    def around(carry, row):
        h, n = carry
        h = jnp.tanh(h @ p["a"] + row[None, :1] + x @ p["w"])
        return (h, n + 1), (h[:, 0], n)

    (h, n), (seen, counts) = lax.scan(around, (h, jnp.int32(0)), x.T, reverse=True)
    return jnp.tanh(h @ p["u"]), (h, seen, counts, n)


def nested(p, h, x):
    """A loop in a jitted loop, of which the outer one is written out."""

    @jax.jit
    def pair(h):
        inner = lax.fori_loop(0, 2, lambda _, h: jnp.sin(h), h)
        return jnp.tanh(inner @ p["a"])

    h = lax.fori_loop(0, 2, lambda _, h: pair(h), h)
    return jnp.tanh(x @ p["w"] + h @ p["u"]), h


@jax.checkpoint
def checkpointed(p, h, x):
    return substeps(3)(p, h, x)


def checkpointed_loop(p, h, x):
    """A checkpoint with a policy of its own around the loop alone."""

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("a"))
    def relaxed(h):
        return lax.fori_loop(0, 3, lambda _, h: h + 0.1 * jnp.tanh(h @ p["a"]), h)

    h = jnp.tanh(x @ p["w"] + relaxed(h) @ p["u"])
    return h, h


@pytest.mark.parametrize("step", [substeps(3), backwards, nested, checkpointed, checkpointed_loop])
def test_values_and_gradients_are_those_of_lax_scan(step):
    function, expected = run(jaxrnn.scan, step, **SPLIT), run(lax.scan, step)
    assert_same(jax.jit(function)(*operands()), jax.jit(expected)(*operands()))
    ours, theirs = (jax.jit(gradient(f))(*operands()) for f in (function, expected))
    assert_same(ours, theirs, scale=10)


@pytest.mark.parametrize("step", [substeps(3), backwards, checkpointed])
def test_gradients_of_weights_in_an_inner_loop_are_contracted_over_time(step):
    """And over its rounds; none has the shape of a weight in the loop over time."""
    program = jax.make_jaxpr(gradient(run(jaxrnn.scan, step, **SPLIT)))(*operands())
    in_loops = [
        e.outvars[0].aval.shape
        for body in innermost_loops(program)
        for e, _ in equations(body)
        if e.primitive is DOT
    ]
    assert in_loops
    assert not {(UNITS, UNITS), (FEATURES, UNITS), (UNITS, FEATURES)}.intersection(in_loops)


def kept_of_each_step(scan, step, **flags):
    """Bytes that another timestep adds to what a gradient keeps."""
    p, h, xs = operands()

    def kept(xs):
        run_and_pull = jax.eval_shape(lambda *a: jax.vjp(run(scan, step, **flags), *a), p, h, xs)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run_and_pull))

    return (kept(jnp.concatenate([xs, xs])) - kept(xs)) / TIME


def test_what_is_under_a_checkpoint_is_not_kept():
    """The states and inputs are, as with plain `lax.scan`, and at most the number of the step."""
    ours = kept_of_each_step(jaxrnn.scan, checkpointed, **SPLIT)
    plain = kept_of_each_step(lax.scan, checkpointed)
    assert ours - 4 <= plain < kept_of_each_step(jaxrnn.scan, substeps(3), **SPLIT)


@pytest.mark.parametrize(("rounds", "is_written_out"), [(4, True), (16, True), (17, False)])
def test_loops_of_many_products_are_left(rounds, is_written_out):
    """Programs would take long to compile. Too little leaves such a step for passes to pay."""
    program = jax.make_jaxpr(gradient(run(jaxrnn.scan, substeps(rounds))))(*operands())
    over_time = [e for e, _ in equations(program) if e.primitive is SCAN]
    lengths = {e.params["length"] for e in over_time}
    assert (rounds not in lengths) == is_written_out
    plain = jax.make_jaxpr(gradient(run(lax.scan, substeps(rounds))))(*operands())
    assert (len(list(loops(program))) == len(list(loops(plain)))) == (not is_written_out)


def test_results_alone_come_from_the_step_as_it_is():
    """Where passes gain nothing: it compiles in half the time."""
    p, h, _ = operands()
    xs = jnp.ones((TIME, 32, FEATURES))
    h = jnp.broadcast_to(h[:1], (32, UNITS))
    program, plain = (
        jax.make_jaxpr(run(scan, substeps(3)))(p, h, xs) for scan in (jaxrnn.scan, lax.scan)
    )
    assert count(program, DOT) == count(plain, DOT)
    assert [len(body.eqns) for body in loops(program)] == [len(body.eqns) for body in loops(plain)]


def test_a_loop_over_matrices_of_each_sample_stays():
    """No pass would gain by it."""

    def attend(p, h, x):
        def refine(_, h):
            scores = jnp.einsum("bh,bkh->bk", h, x)
            return jnp.tanh(jnp.einsum("bk,bkh->bh", jax.nn.softmax(scores), x))

        h = lax.fori_loop(0, 2, refine, h)
        return jnp.tanh(x[:, 0] @ p["a"] + h @ p["u"]), h

    p, h, _ = operands()
    xs = jnp.asarray(np.random.default_rng(1).standard_normal((TIME, BATCH, 4, UNITS)), jnp.float32)
    function, expected = run(jaxrnn.scan, attend, **SPLIT), run(lax.scan, attend)
    program = jax.make_jaxpr(function)(p, h, xs)
    assert 2 in {e.params["length"] for e, _ in equations(program) if e.primitive is SCAN}
    ours, theirs = (jax.jit(gradient(f))(p, h, xs) for f in (function, expected))
    assert_same(ours, theirs, scale=10)
