"""A scan of one sample under `vmap`: what `lax.scan` gives, by the program of a batched step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from jax import lax
from jax.experimental import checkify
from structure import DOT, SCAN, count, equations, loops, primitive_of

import jaxrnn

SAMPLES, TIME, FEATURES, UNITS = 3, 5, 2, 4
COND = primitive_of(lambda x: lax.cond(x > 0, lambda: x, lambda: -x), 1.0)
SPLIT = functools.partial(jaxrnn.scan, method="sequential")


def draw(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)


P = {"w": draw(FEATURES, 2 * UNITS), "u": draw(UNITS, 2 * UNITS), "v": draw(UNITS, 3)}
H, XS = draw(UNITS), draw(TIME, SAMPLES, FEATURES)
LABELS = jnp.asarray([[0, 2, 1], [1, 1, 2], [2, 0, 0]])


def one_sample(scan, p, h, xs, labels, key, **flags):
    """A loss over one sequence; the state also counts, draws noise, and looks labels up."""

    def step(carry, x):
        h, steps, key = carry
        i, z = jnp.split(x["x"] @ p["w"] + h @ p["u"], 2)
        key, now = jax.random.split(key)
        noise = jax.random.bernoulli(now, 0.7, (UNITS,))
        h = jnp.where(x["late"], jax.nn.sigmoid(i) * h + jnp.tanh(z) * noise, h)
        return (h, steps + 1, key), {"score": (h @ p["v"])[labels], "step": steps}

    rows = {"x": xs, "late": jnp.arange(TIME) > 0}
    (h, steps, _), ys = scan(step, (h, 0, key), rows, **flags)
    return jnp.sum(jnp.sin(ys["score"])) + jnp.sum(h * h), (h, steps, ys)


def keys():
    return jax.random.split(jax.random.key(0), SAMPLES)


def samples(scan, p, h, xs, **flags):
    """Over sequences, labels and keys, with a state to start from that all have in common."""
    run = functools.partial(one_sample, scan, **flags)
    values, results = jax.vmap(run, (None, None, 1, 0, 0))(p, h, xs, LABELS, keys())
    return values.sum(), results


def members(scan, p, h, xs, **flags):
    """Over sequences, and outside of these over weights."""
    weights = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), p)
    values, results = jax.vmap(lambda p: samples(scan, p, h, xs, **flags))(weights)
    return values.sum(), results


def sequences_of_sequences(scan, p, h, xs, **flags):
    """Over states, and outside of these over sequences."""
    starts = jnp.stack([h, 2 * h])
    inner = jax.vmap(functools.partial(one_sample, scan, **flags), (None, 0, None, None, None))
    outer = jax.vmap(inner, (None, None, 1, 0, 0))
    values, results = outer(p, starts, xs, LABELS, keys())
    return values.sum(), results


def gradient(f):
    return jax.grad(f, (0, 1, 2), has_aux=True)


def per_sample(scan, p, h, xs, **flags):
    """A gradient for each sample."""
    run = gradient(functools.partial(one_sample, scan, **flags))
    return jax.vmap(run, (None, None, 1, 0, 0))(p, h, xs, LABELS, keys())


def forward(scan, p, h, xs, **flags):
    """Forward mode."""
    run = functools.partial(samples, scan, **flags)
    return jax.jvp(lambda p: run(p, h, xs)[0], (p,), (p,))


def second_order(scan, p, h, xs, **flags):
    """Forward over reverse."""
    run = gradient(functools.partial(samples, scan, **flags))
    return jax.jvp(lambda p: run(p, h, xs)[0], (p,), (p,))


@pytest.mark.parametrize("flags", [{}, {"reverse": True, "unroll": 2}], ids=["", "reverse"])
@pytest.mark.parametrize("over", [samples, members, sequences_of_sequences])
def test_values_and_gradients(over, flags):
    def run(scan, **flags):
        return jax.jit(gradient(functools.partial(over, scan, **flags)))(P, H, XS)

    expected = run(lax.scan, reverse="reverse" in flags)
    assert_same(run(SPLIT, chunk=2, **flags), expected, scale=10)


@pytest.mark.parametrize("over", [per_sample, forward, second_order])
def test_other_orders_of_transformations(over):
    def run(scan):
        return jax.jit(functools.partial(over, scan))(P, H, XS)

    assert_same(run(SPLIT), run(lax.scan), scale=50)


def test_rnn_over_sequences_of_different_lengths():
    cell = jaxrnn.cells.lstm(UNITS)
    params = cell.init(jax.random.key(1), FEATURES)
    lengths = jnp.asarray([5, 2, 0])

    def run(params, inputs, lengths):
        state = cell.initial_states(len(inputs))
        return jaxrnn.rnn(
            cell.step(params), inputs, state, input_length=lengths, method="sequential"
        )

    def loss(params, results_of):
        results = results_of(params)
        return sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(results)), results

    def one_by_one(params):
        one = jax.vmap(lambda x, n: run(params, x[None], n[None]), in_axes=(1, 0))(XS, lengths)
        return jax.tree.map(lambda leaf: leaf[:, 0], one)

    def together(params):
        return run(params, jnp.moveaxis(XS, 0, 1), lengths)

    actual, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, results_of=of), has_aux=True))(params)
        for of in (one_by_one, together)
    )
    assert_same(actual, expected)


def test_what_samples_have_in_common_stays_single():
    """A count that starts alike and steps alike is counted once, and a flag stays no array."""

    def run(h, xs):
        def step(carry, x):
            h, n = carry
            h = lax.cond(n < 2, lambda: jnp.tanh(x @ P["w"][:, :UNITS] + h), lambda: h)
            return (h, n + 1), h @ P["v"]

        return SPLIT(step, (h, 0), xs)

    program = jax.make_jaxpr(jax.vmap(run, (None, 1)))(H, XS)
    assert count(program, COND) == 1  # mapped, it would be a selection
    assert program.out_avals[1].shape == (SAMPLES,)


def test_the_program_is_that_of_a_batched_step():
    """One product per weight gradient, over one axis; no row of samples is brought to the front."""

    def step(h, x):
        h = jnp.tanh(x @ P["w"][:, :UNITS] + h @ P["u"][:, :UNITS])
        return h, h

    def loss(run):
        return jax.make_jaxpr(jax.grad(lambda xs: run(xs).sum()))(XS)

    mapped = loss(jax.vmap(lambda x: SPLIT(step, H, x)[1], 1, 1))
    batched = loss(lambda xs: SPLIT(step, jnp.broadcast_to(H, (SAMPLES, UNITS)), xs)[1])
    assert [count(mapped, p) for p in (DOT, SCAN)] == [count(batched, p) for p in (DOT, SCAN)]
    shapes = [
        [tuple(v.aval.shape for v in e.invars) for e, _ in equations(program)
         if e.primitive is DOT]
        for program in (mapped, batched)
    ]  # fmt: skip
    assert sorted(shapes[0]) == sorted(shapes[1])
    assert len(list(loops(mapped))) == len(list(loops(batched)))


# What `lax.scan` can do wherever it stands.

ROTATED = [(0, 1), (1, 2), (2, 0)]


def elman(scan, xs, w=P["u"][:, :UNITS], over=lambda h: h):
    def step(h, x):
        h = over(jnp.tanh(x @ P["w"][:, :UNITS] + h @ w))
        return h, h

    return scan(step, H, xs)


def transposed(scan, h):
    def step(h, x):
        return x @ P["w"][:, :UNITS] + h @ P["u"][:, :UNITS], h

    return jax.linear_transpose(lambda xs: scan(step, 0 * H, xs)[0], ONE)(h)


def with_a_flag(scan, xs):
    def step(carry, x):
        h, first = carry
        h = jnp.tanh(x @ P["w"][:, :UNITS] + jnp.where(first, 1, h) @ P["u"][:, :UNITS])
        return (h, False), (h, 1.0)

    return scan(step, (H, True), xs)


ONE, ALL = XS[:, 0], jnp.moveaxis(XS, 1, 0)
FORMS = {
    "nothing_is_mapped": lambda scan: jax.vmap(lambda k: (k, elman(scan, ONE)))(jnp.arange(3.0)),
    "only_the_inner_one_maps": lambda scan: jax.vmap(
        lambda k: jax.vmap(lambda xs: k * elman(scan, xs)[0])(ALL)
    )(jnp.arange(2.0)),
    "gradient_where_nothing_is_mapped": lambda scan: jax.grad(
        lambda w: jax.vmap(lambda k: k * elman(scan, ONE, w)[0].sum())(jnp.arange(3.0)).sum()
    )(P["u"][:, :UNITS]),
    "constants_among_the_results": lambda scan: jax.vmap(lambda xs: with_a_flag(scan, xs))(ALL),
    "constants_under_jit": lambda scan: jax.vmap(jax.jit(lambda xs: with_a_flag(scan, xs)))(ALL),
    "checkpoint": lambda scan: jax.vmap(jax.checkpoint(lambda xs: with_a_flag(scan, xs)))(ALL),
    "cond": lambda scan: jax.vmap(
        lambda xs: lax.cond(xs[0, 0] > 0, lambda: elman(scan, xs), lambda: elman(scan, ONE))
    )(ALL),
    "a_collective_in_the_step": lambda scan: jax.vmap(
        lambda xs: elman(scan, xs, over=lambda h: lax.ppermute(h, "i", ROTATED)), axis_name="i"
    )(ALL),
    "a_collective_over_an_ensemble": lambda scan: jax.vmap(
        lambda xs, w: elman(scan, xs, w, lambda h: lax.ppermute(h, "i", ROTATED)), axis_name="i"
    )(ALL, jnp.stack([P["u"][:, :UNITS]] * SAMPLES)),
    "transposed": lambda scan: jax.vmap(lambda h: transposed(scan, h))(draw(SAMPLES, UNITS)),
}  # fmt: skip


@functools.cache
def expected_of(name):
    return jax.jit(lambda: FORMS[name](lax.scan))()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", FORMS)
def test_it_may_stand_anywhere(name, compiled):
    def run():
        return FORMS[name](SPLIT)

    actual = jax.jit(run)() if compiled else run()
    assert_same(actual, expected_of(name), scale=10)


def test_checkify_inside_sees_errors_of_the_step():
    def errors(scan):
        def checked(xs):
            run = functools.partial(elman, scan, over=lambda h: jnp.log(h - 100))
            return checkify.checkify(run, errors=checkify.nan_checks)(xs)

        return jax.vmap(checked)(ALL)[0].get()

    assert "nan generated" in errors(lax.scan)
    assert "nan generated" in errors(SPLIT)
