"""Weights that `vmap` copies for each sample, as it does for a `cond` of each, are shared again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, scalar_of
from jax import lax
from structure import DOT, equations, loops, primitive_of

import jaxrnn

SAMPLES, TIME, FEATURES, UNITS, HEADS = 3, 5, 2, 4, 2
SELECT = primitive_of(lambda w, x: lax.select_n(w, x, x), True, 1.0)
GATHER = primitive_of(lambda x, i: x.at[i].get(mode="clip"), jnp.ones(3), np.array([1, 2]))
SPLIT = functools.partial(jaxrnn.scan, method="sequential")


def draw(*shape):
    rng = np.random.default_rng(shape)
    return jnp.asarray(0.5 * rng.standard_normal(shape), jnp.float32)


P = {
    "w": draw(FEATURES, UNITS),
    "u": draw(UNITS, UNITS),
    "b": draw(UNITS),
    "gates": draw(UNITS, HEADS, UNITS),
    "heads": draw(HEADS, UNITS // HEADS, UNITS // HEADS),
    "experts": draw(3, UNITS, UNITS),
}
H, XS = draw(SAMPLES, UNITS), draw(TIME, SAMPLES, FEATURES)


def elman(p, h, x):
    return jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])


def columns(p, h, x):
    return jnp.tanh(p["w"].T @ x + p["u"] @ h - p["b"])


def concatenating(p, h, x):
    return jnp.tanh(jnp.concatenate([x, h]) @ jnp.concatenate([p["w"], p["u"]]) + p["b"])


def deep(p, h, x):
    return jnp.tanh(jnp.tanh(h @ p["u"] + p["b"]) @ p["u"].T) + x @ p["w"]


def gated(p, h, x):
    i, g = jnp.einsum("i,igh->gh", h, p["gates"])
    return jax.nn.sigmoid(i) * h + jnp.tanh(g + x @ p["w"])


def multi_head(p, h, x):
    heads = jnp.einsum("hi,hio->ho", h.reshape(HEADS, -1), p["heads"])
    return jnp.tanh(heads.reshape(-1) + x @ p["w"])


def expert(p, h, x):
    branches = [lambda h, i=i: jnp.tanh(x @ p["w"] + h @ p["experts"][i]) for i in range(3)]
    return lax.switch(jnp.argmax(h[:3]), branches, h)


def several_rows(p, h, x):
    return jnp.tanh((h.reshape(2, -1) @ p["heads"][0]).reshape(-1) + x @ p["w"])


def normalised(p, h, x):
    """With a number of each sample in it, and a rule of its own for the derivative."""
    hidden = jax.nn.relu(x[0] * p["b"] + h @ p["u"] + 1)
    return jax.nn.standardize(hidden) @ p["u"]


def nested(p, h, x):
    return lax.cond(h[0] > 0, elman, deep, p, h, x)


CELLS = [
    elman, columns, concatenating, deep, gated, multi_head, several_rows, normalised, expert,
    nested,
]  # fmt: skip


def if_positive(cell, p):
    """A step of one sample: the cell, or where x is negative the state as it was."""

    def step(h, x):
        h = lax.cond(x[0] > 0, lambda: cell(p, h, x), lambda: h)
        return h, h

    return step


def in_the_step(scan, cell, p, h, xs):
    return scan(jax.vmap(if_positive(cell, p)), h, xs)


def around_the_loop(scan, cell, p, h, xs):
    return jax.vmap(lambda h, xs: scan(if_positive(cell, p), h, xs), (0, 1))(h, xs)


def derivatives(run, scan):
    """A number made of all that `run(scan, p)` gives, and its gradient by p."""
    return jax.jit(jax.value_and_grad(lambda p: scalar_of(run(scan, p))))


def products_per_sample(program, samples=SAMPLES):
    """The batched products in loops, but for those of heads."""
    found = [e for body in loops(program.jaxpr) for e, _ in equations(body) if e.primitive is DOT]
    batches = [
        [e.invars[0].aval.shape[axis] for axis in e.params["dimension_numbers"][1][0]]
        for e in found
    ]
    return found, [lengths for lengths in batches if samples in lengths]


@pytest.mark.parametrize(("mapped", "samples"), [(in_the_step, UNITS), (around_the_loop, SAMPLES)])
@pytest.mark.parametrize("cell", CELLS)
def test_one_product_for_all_samples(cell, mapped, samples):
    h, xs = draw(samples, UNITS), draw(TIME, samples, FEATURES)

    def loss(scan, *args):
        results = mapped(scan, cell, *args)
        return scalar_of(results), results

    def run(scan):
        return jax.jit(jax.value_and_grad(functools.partial(loss, scan), (0, 1, 2), has_aux=True))

    ours = run(SPLIT)
    assert_same(ours(P, h, xs), run(lax.scan)(P, h, xs), scale=10)
    found, per_sample = products_per_sample(jax.make_jaxpr(ours)(P, h, xs), samples)
    assert found
    assert not per_sample


@pytest.mark.parametrize("mapped", [in_the_step, around_the_loop])
def test_samples_look_up_in_one_table(mapped):
    """Several at the same place, one beyond the end, and one that depends on the state."""

    def lookup(p, h, x):
        place = jnp.array([0, jnp.where(x[1] > 0, 1, 5), jnp.argmax(h) % 3])
        return jnp.tanh(p["u"][place].sum(0) + h * p["w"][0, place[1]])

    def gradient(scan):
        return jax.jit(jax.grad(lambda *args: scalar_of(mapped(scan, lookup, *args)), (0, 1)))

    ours = gradient(SPLIT)
    assert_same(ours(P, H, XS), gradient(lax.scan)(P, H, XS), scale=10)
    program = jax.make_jaxpr(ours)(P, H, XS)
    numbers = [
        e.params["dimension_numbers"] for e, _ in equations(program.jaxpr) if e.primitive is GATHER
    ]
    assert numbers
    assert not any(found.operand_batching_dims for found in numbers)


@pytest.mark.parametrize("cell", [deep, expert, nested])
def test_an_ensemble_of_branches_per_sample(cell):
    """What is copied for each sample is copied again for each member, whose states differ."""

    def run(scan, p):
        def member(scale):
            def one(h, x):
                h = lax.cond(h[1] > 0, lambda: cell(p, scale * h, x), lambda: h + x[0])
                return h, h

            return scan(jax.vmap(one), H, XS)

        return jax.vmap(member)(jnp.arange(1.0, 3))

    assert_same(derivatives(run, SPLIT)(P), derivatives(run, lax.scan)(P), scale=10)


def test_forward_mode():
    def run(scan):
        call = functools.partial(in_the_step, scan, nested, h=H, xs=XS)
        return jax.jit(lambda p: jax.jvp(call, (p,), (p,)))(P)

    assert_same(run(SPLIT), run(lax.scan), scale=10)


def test_weights_repeated_by_hand():
    def run(scan, u):
        def step(h, x):
            copies = jnp.broadcast_to(u, (SAMPLES, UNITS, UNITS))
            h = jnp.tanh(x @ P["w"] + jnp.einsum("bi,bio->bo", h, copies))
            return h, h

        return scan(step, H, XS)

    ours = derivatives(run, SPLIT)
    assert_same(ours(P["u"]), derivatives(run, lax.scan)(P["u"]), scale=10)
    found, per_sample = products_per_sample(jax.make_jaxpr(ours)(P["u"]))
    assert found
    assert not per_sample


HALF_WEIGHTS = lax.DotAlgorithm("bfloat16", "float32", "float32", 3, 1, 3, False)


def of_factor(precision, place):
    """What a precision says of the left or the right factor."""
    if not isinstance(precision, lax.DotAlgorithm):
        return precision[place]
    side = ("lhs", "rhs")[place]
    return [getattr(precision, f"{side}_{what}") for what in ("precision_type", "component_count")]


@pytest.mark.parametrize("precision", [("highest", "default"), HALF_WEIGHTS], ids=["pair", "all"])
def test_each_factor_keeps_its_precision(precision):
    def cell(p, h, x):
        return jnp.dot(p["u"], h, precision=precision) + x @ p["w"]

    written = equations(jax.make_jaxpr(cell)(P, H[0], XS[0, 0]))
    asked = next(e.params["precision"] for e, _ in written if e.primitive is DOT)
    found, _ = products_per_sample(jax.make_jaxpr(in_the_step, (0, 1))(SPLIT, cell, P, H, XS))
    (product,) = (e for e in found if e.params["precision"] is not None)
    weights = [operand.aval.shape for operand in product.invars].index((UNITS, UNITS))
    kept = product.params["precision"]
    assert type(kept) is type(asked)
    for place in (0, 1):
        assert of_factor(kept, weights if place == 0 else 1 - weights) == of_factor(asked, place)


def root(p, h, x):
    """Has an infinite derivative where x is zero."""
    return jnp.sqrt(x @ p["w"] * 0 + x[0]) + h @ p["u"]


def overflow(p, h, x):
    """Multiplies the weights with infinity where x is negative."""
    return jnp.tanh((jnp.exp(-1e4 * x[:1]) * h) @ p["u"])


def of_infinite_states(p, h, x):
    return elman(p, jnp.where(x[0] > 0, h, jnp.inf), x)


@pytest.mark.parametrize("cell", [root, overflow, of_infinite_states])
@pytest.mark.parametrize("mapped", [in_the_step, around_the_loop])
def test_a_branch_not_taken_leaves_no_trace(cell, mapped):
    xs = XS.at[:, 1].set(-1).at[:, 2, 0].set(0)

    def gradient(scan):
        of = jax.grad(lambda *args: scalar_of(mapped(scan, cell, *args)), (0, 1, 2))
        return jax.jit(of)(P, H, xs)

    expected = gradient(lax.scan)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(expected))
    assert_same(gradient(SPLIT), expected, scale=10)


def test_copies_of_copies():
    def run(scan, u):
        def step(h, x):
            copies = lax.broadcast_in_dim(u, (SAMPLES, UNITS, UNITS), (1, 2))
            again = lax.broadcast_in_dim(copies, (2, *copies.shape), (1, 2, 3))
            h = jnp.tanh(jnp.einsum("mbi,mbio->bo", jnp.stack([h, x @ P["w"]]), again))
            return h, h

        return scan(step, H, XS)

    assert_same(derivatives(run, SPLIT)(P["u"]), derivatives(run, lax.scan)(P["u"]), scale=10)


def test_samples_along_another_axis():
    """Heads first, samples second; and as many units as samples, of which the transpose is read."""
    square, xs = draw(SAMPLES, SAMPLES), draw(TIME, SAMPLES, SAMPLES)

    def run(scan, u):
        def step(h, x):
            which = x[:, 0] > 0
            copies = for_some(which, jnp.broadcast_to(u, (SAMPLES, *u.shape)))
            rows = for_some(which, h)
            stopped = jnp.einsum("bi,bio->bo", rows.T, copies) + for_some(which, h)
            again = jnp.broadcast_to(u, (SAMPLES, *u.shape))
            heads = jnp.stack([h, x, h * x])
            swapped = lax.dot_general(
                heads, jnp.stack([again] * 3), (((2,), (2,)), ((0, 1), (0, 1)))
            )
            numbers = (((2,), (1,)), ((1,), (0,)))
            second = lax.dot_general(heads, again, numbers).sum(1)
            h = jnp.tanh(rows.T + for_some(which, h @ u) + stopped + swapped.sum(0) + second)
            return h, h

        return scan(step, square, xs)

    assert_same(derivatives(run, SPLIT)(square), derivatives(run, lax.scan)(square), scale=20)


@pytest.mark.parametrize("reads", ["all", "some"])
def test_rows_that_have_the_axis_of_the_copies_second(reads):
    """A matrix is repeated along an axis of the rows that is not their first, as is a bias."""
    others, bias = 3, draw(SAMPLES, UNITS)
    xs = draw(TIME, others, SAMPLES, UNITS)

    def run(scan, u):
        def step(h, x):
            rows = x + jnp.broadcast_to(bias, x.shape)
            copies = jnp.broadcast_to(u, (SAMPLES, UNITS, UNITS))
            made = lax.dot_general(rows, copies, (((2,), (1,)), ((1,), (0,))))
            cut = made if reads == "all" else made[:, :, :2]
            h = jnp.tanh(h @ u + jnp.pad(cut.sum((0, 1)), (0, UNITS - cut.shape[-1])))
            return h, (h, cut)

        return scan(step, H, xs)

    assert_same(derivatives(run, SPLIT)(P["u"]), derivatives(run, lax.scan)(P["u"]), scale=20)


def for_some(which, v):
    """`v`, without a derivative where `which` is not, as before a branch."""
    return lax.select_n(spread(which, v), lax.stop_gradient(v), v)


def spread(which, v):
    return lax.broadcast_in_dim(which, v.shape, (0,))


@pytest.mark.parametrize("reader", ["all", "the sum", "those selected"])
def test_rows_that_somebody_reads_are_as_they_were(reader):
    """Some by all samples, some only by those with a derivative, but of all."""

    def run(scan, p):
        def step(h, x):
            which = x[:, 0] > 0
            copies = jnp.broadcast_to(p["u"], (SAMPLES, UNITS, UNITS))
            y = jnp.einsum("bi,bio->bo", for_some(which, h), for_some(which, copies))
            if reader == "the sum":
                y = y + y.sum(0)
            if reader != "all":
                y = lax.select_n(spread(which, y), h, y)
            h = jnp.tanh(y + x @ p["w"])
            return h, h

        return scan(step, H, XS)

    ours = derivatives(run, SPLIT)
    assert_same(ours(P), derivatives(run, lax.scan)(P), scale=10)
    _, per_sample = products_per_sample(jax.make_jaxpr(ours)(P))
    assert bool(per_sample) == (reader != "those selected")


def test_weights_of_their_own_are_not_selected():
    """An ensemble, each with weights of its own: it is products that wait for the selection."""
    weights = jax.tree.map(lambda leaf: jnp.stack([leaf] * SAMPLES), P)

    def run(scan, p):
        def step(h, x):
            h = jax.vmap(lambda p, h, x: if_positive(elman, p)(h, x)[0])(p, h, x)
            return h, h

        return scan(step, H, XS)

    ours = derivatives(run, SPLIT)
    assert_same(ours(weights), derivatives(run, lax.scan)(weights), scale=10)
    program = jax.make_jaxpr(ours)(weights)
    selected = [
        e.outvars[0].aval.shape
        for body in loops(program.jaxpr)
        for e, _ in equations(body)
        if e.primitive is SELECT
    ]
    assert selected
    assert (SAMPLES, UNITS, UNITS) not in selected


@pytest.mark.parametrize("stopped", ["rows", "weights", "a term"])
def test_a_derivative_stopped_for_one_operand_alone(stopped):
    """The other has one for all samples, and keeps it."""

    def run(scan, p):
        def step(h, x):
            which = x[:, 0] > 0
            members = p["u"] * jnp.arange(1.0, SAMPLES + 1)[:, None, None]
            rows = for_some(which, h) if stopped == "rows" else h
            weights = for_some(which, members) if stopped == "weights" else members
            y = jnp.einsum("bi,bio->bo", rows, weights)
            y = y + (for_some(which, h) if stopped == "a term" else h)
            h = jnp.tanh(x @ p["w"] + y)
            return h, h

        return scan(step, H, XS)

    assert_same(derivatives(run, SPLIT)(P), derivatives(run, lax.scan)(P), scale=10)


def test_results_alone_share_weights_too():
    """Also where plain `lax.scan` would have them as soon, had the weights not been copied."""
    weights = [draw(FEATURES, UNITS), draw(256, 256)]

    def run(h, xs):
        def step(h, x):
            return lax.cond(x[0] > 0, lambda: jnp.tanh(h @ weights[1]), lambda: h), ()

        return jax.vmap(lambda h, xs: jaxrnn.scan(step, h, xs), (0, 1))(h, xs)

    found, per_sample = products_per_sample(jax.make_jaxpr(run)(draw(SAMPLES, 256), XS))
    assert found
    assert not per_sample


MEMORY = draw(SAMPLES, FEATURES, UNITS)
RECOMPUTED = functools.partial(SPLIT, chunk=2, remat=True)


@functools.cache
def gradient_past_padding(scan, made_inside):
    """By weights, memory and inputs, of which some samples are padding and skip a branch."""

    def run(p, memory, xs):
        def step(carry, x):
            h, m = carry

            def read():
                row = x / jnp.sum(x * x) if made_inside else x
                return row @ m + jnp.dot(row, p["w"] @ h) * h

            is_padding = (jnp.sum(x) == 0) | ~jnp.all(jnp.isfinite(x))
            h = jnp.tanh(h @ p["u"] + lax.cond(is_padding, lambda: h, read))
            return (h, 0.9 * m), h

        return jax.vmap(lambda h, m, x: scan(step, (h, m), x), in_axes=(0, 0, 1))(H, memory, xs)

    return jax.jit(jax.grad(lambda *args: scalar_of(run(*args)), (0, 1, 2)))


@pytest.mark.parametrize("padding", [0.0, jnp.nan, jnp.inf])
@pytest.mark.parametrize("scan", [SPLIT, RECOMPUTED], ids=["plain", "remat"])
@pytest.mark.parametrize("made_inside", [True, False])
def test_a_factor_of_samples_that_skip_the_branch_may_be_infinite(padding, scan, made_inside):
    skips = np.zeros((TIME, SAMPLES, 1), bool)
    skips[1, 0] = skips[3:, 2] = True
    xs = jnp.where(skips, padding, XS)
    expected = gradient_past_padding(lax.scan, made_inside)(P, MEMORY, xs)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(expected[:2]))
    assert_same(gradient_past_padding(scan, made_inside)(P, MEMORY, xs), expected, scale=10)
