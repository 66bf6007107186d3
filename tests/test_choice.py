"""What the engine decides by itself: whether to take a step apart, and in which blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, scalar_of
from jax import lax
from structure import DOT, SCAN, equations, loops, products_in_innermost_loops

import jaxrnn

BATCH, TIME, FEATURES, UNITS = 3, 8, 5, 16
SCANS = jaxrnn.scan, lax.scan
# `jnp.ones` is compiled for each shape.
ones = functools.partial(np.ones, dtype=np.float32)


def memories(update, samples=4, units=256, time=34):
    """A matrix for each sample, 1 MiB in all, that a step updates and reads by a vector."""

    def run(scan, w, memory, xs, **flags):
        def step(carry, x):
            memory, count = carry
            q, k, v = jnp.split(x @ w, 3, axis=-1)
            memory = update(memory) + k[:, :, None] * v[:, None, :]
            return (memory, count + 1), (jnp.einsum("bk,bkv->bv", q, memory), count)

        (memory, _), (outputs, counts) = scan(step, (memory, 0), xs, **flags)
        return memory, outputs, counts

    rng = np.random.default_rng(0)
    shapes = (3, 3 * units), (samples, units, units), (time, samples, 3)
    return run, [np.asarray(rng.uniform(-0.5, 0.5, shape), np.float32) for shape in shapes]


def decay(memory):
    return 0.9 * memory


@pytest.mark.parametrize("units", [4, 64])
def test_small_bodies_are_left_alone_unless_asked_for(units):
    u, w = ones((units, units)), ones((units, units))

    def is_plain(**flags):
        def body(h, x):
            h = jnp.tanh(x @ w + h @ u)
            return h, h

        jaxpr = jax.make_jaxpr(lambda xs: jaxrnn.scan(body, jnp.zeros((2, units)), xs, **flags))
        program = jaxpr(ones((16, 2, units)))
        return products_in_innermost_loops(program) == [2]

    assert is_plain() == (units == 4)
    assert not is_plain(method="sequential")
    assert is_plain(method="lax")


def sorting(numbers):
    """A step whose state is sorted, so many numbers of it."""
    w, cut = ones((64, 64)), numbers // 16

    def body(h, x):
        h = jnp.tanh(x @ w + h @ w)
        return h, jnp.sort(h[:, :cut])

    return body, ones((16, 64)), ones((TIME, 16, 64))


def decomposing(rows):
    w = ones((rows, rows))

    def body(h, x):
        h = jnp.linalg.cholesky(jnp.tanh(x @ w) + h @ h.T + 9 * jnp.eye(rows))
        return h, h @ w

    return body, ones((rows, rows)), ones((TIME, rows, rows))


def attending(keys):
    """A step whose sample's own queries meet so many keys of an input."""
    queries = ones((4, 32, 16))

    def body(h, x):
        return jnp.tanh(h + jnp.einsum("bqd,bkd->bkq", queries, x)), None

    return body, ones((4, keys, 32)), ones((TIME, 4, keys, 16))


def comparing(states):
    """A step of Viterbi's algorithm: a maximum over so many states for each of them."""
    transitions, emissions = ones((states, states)), ones((128, states))

    def body(scores, x):
        return jnp.max(scores[:, :, None] + transitions, axis=1) + x @ emissions, None

    return body, ones((16, states)), ones((TIME, 16, 128))


@pytest.mark.parametrize(
    ("step", "least", "most", "why"),
    [
        (sorting, 16, 64, "sort once more"),
        (decomposing, 8, 16, "decompose matrices once more"),
        (comparing, 8, 16, "compare once more"),
        (attending, 15, 16, None),
    ],
    ids=["sorting", "decomposing", "comparing", "attending"],
)
def test_what_a_gradient_gains_nothing_by_is_left_alone(step, least, most, why):
    assert jaxrnn.explain_scan(*step(least)).startswith('method "sequential"')
    report = jaxrnn.explain_scan(*step(most)).replace("\n", " ")
    kept_in = "no matmul can leave the loop, nor the gradient of a matrix"
    because = f"splitting would not be faster: {f'the gradient would {why}' if why else kept_in}"
    assert report == f"plain lax.scan over {TIME} steps: {because}"


def test_results_of_many_rows_come_from_the_plain_loop_and_gradients_do_not():
    """32 rows make a product with a small matrix as fast inside a loop as outside of it."""
    rng = np.random.default_rng(0)
    w, u, x = (
        np.asarray(0.1 * rng.standard_normal(s), np.float32)
        for s in [(64, 128), (128, 128), (2 * TIME, 32, 64)]
    )

    def run(scan, w, u, x):
        def body(h, x):
            h = jnp.tanh(x @ w + h @ u)
            return h, h

        return scan(body, jnp.zeros((x.shape[1], 128)), x)

    def gradient(scan, *operands):
        return jax.grad(lambda *o: scalar_of(run(scan, *o)), (0, 1, 2))(*operands)

    def jaxpr(function, scan, rows=32):
        return jax.make_jaxpr(functools.partial(function, scan))(w, u, x[:, :rows])

    plain, ours = jaxpr(run, lax.scan), jaxpr(run, jaxrnn.scan)
    assert products_in_innermost_loops(ours) == products_in_innermost_loops(plain) == [2]
    assert products_in_innermost_loops(jaxpr(run, jaxrnn.scan, rows=16)) == [1]
    assert products_in_innermost_loops(jaxpr(gradient, jaxrnn.scan)) == [1, 1]
    for function in (run, gradient):
        assert_same(
            jax.jit(functools.partial(function, jaxrnn.scan))(w, u, x),
            jax.jit(functools.partial(function, lax.scan))(w, u, x),
            scale=10,
        )


def products_of_elman(w, u, x, gates=1):
    """The products in the innermost loops of results, and of their gradient."""

    def run(w, u, x):
        def body(h, x):
            h = sum(jnp.split(jnp.tanh(x @ w + h @ u), gates, axis=-1))
            return h, h

        return jaxrnn.scan(body, jnp.zeros((x.shape[1], len(u))), x)

    def gradient(*operands):
        return jax.grad(lambda *o: scalar_of(run(*o)), (0, 1, 2))(*operands)

    results, slopes = (jax.make_jaxpr(function)(w, u, x) for function in (run, gradient))
    return products_in_innermost_loops(results), products_in_innermost_loops(slopes)


@pytest.mark.parametrize(
    ("samples", "features", "gates", "held"),
    [(33, 257, 1, [2]), (33, 256, 1, [1]), (16, 257, 1, [1]), (33, 257, 2, [1])],
)
def test_results_of_a_large_product_without_gates_come_from_the_plain_loop(
    samples, features, gates, held
):
    """In a loop as outside of it all cores make a product with more than 2**16 numbers."""
    w, u, x = (
        ones(shape)
        for shape in [(features, gates * 256), (256, gates * 256), (16, samples, features)]
    )

    assert products_of_elman(w, u, x, gates) == (held, [1, 1])


@pytest.mark.parametrize(
    ("samples", "multiplied", "left"), [(33, True, 1), (16, True, 0), (33, False, 0)]
)
def test_tokens_are_looked_up_in_the_loop_for_a_product_that_stays_there(samples, multiplied, left):
    """That of 32 rows and a small matrix, in what makes results alone."""
    features = 64 if multiplied else 128
    table, w, u = (ones(shape) for shape in [(100, features), (features, 128), (128, 128)])
    tokens = np.zeros((16, samples), np.int32)

    def run(scan, table, w, u):
        def body(h, token):
            x = table[token]
            h = jnp.tanh((x @ w if multiplied else x) + h @ u)
            return h, h

        return scan(body, jnp.zeros((samples, 128)), tokens)

    def gathers(function):
        program = jax.make_jaxpr(function)(table, w, u)
        return sum(e.primitive.name == "gather" for e, times in equations(program) if times > 1)

    def gradient(*operands):
        return jax.grad(lambda *o: scalar_of(run(jaxrnn.scan, *o)), (0, 1, 2))(*operands)

    assert gathers(functools.partial(run, lax.scan)) == 1
    assert gathers(functools.partial(run, jaxrnn.scan)) == left
    assert gathers(gradient) == 0


@pytest.mark.parametrize(
    ("samples", "time", "held"), [(1, 24, [2]), (2, 24, [1]), (2, 8, [2]), (1, 512, [1])]
)
def test_results_of_little_work_come_from_the_plain_loop_and_gradients_do_not(samples, time, held):
    """What leaves the loop makes 2048 multiply-adds for each sample and step."""
    w, u, x = (ones(shape) for shape in [(64, 32), (32, 32), (time, samples, 64)])

    assert products_of_elman(w, u, x) == (held, [1, 1])


@pytest.mark.parametrize(
    ("samples", "time", "is_split"),
    [(16, 1, False), (1, 7, False), (2, 7, True), (1, 8, True), (16, 2, True)],
)
def test_gradients_of_one_step_and_of_few_with_one_sample_are_left_alone(samples, time, is_split):
    w, u, x = (ones(shape) for shape in [(64, 32), (32, 32), (time, samples, 64)])

    def gradient(scan):
        def loss(w, u, x):
            def body(h, x):
                h = jnp.tanh(x @ w + h @ u)
                return h, h

            return scalar_of(scan(body, jnp.zeros((samples, 32)), x))

        return products_in_innermost_loops(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(w, u, x))

    assert (gradient(jaxrnn.scan) == [1, 1]) == is_split
    assert (gradient(jaxrnn.scan) == gradient(lax.scan)) != is_split


def test_blocks_cover_time_with_a_shorter_one_last():
    u, w = ones((UNITS, UNITS)), ones((FEATURES, UNITS))

    def lengths(chunk, time):
        def body(h, x):
            h = jnp.tanh(x @ w + h @ u)
            return h, h

        program = jax.make_jaxpr(
            lambda xs: jaxrnn.scan(body, u[:BATCH], xs, method="sequential", chunk=chunk)
        )(ones((time, BATCH, FEATURES)))
        return [
            (times, e.params["length"]) for e, times in equations(program) if e.primitive is SCAN
        ]

    assert lengths(4, 8) == [(1, 2), (2, 4)]
    assert lengths(4, 11) == [(1, 2), (2, 4), (1, 3)]
    assert lengths(None, 11) == lengths(11, 11) == lengths(99, 11) == [(1, 11)]


@pytest.mark.parametrize(("units", "blocks"), [(512, 8), (2048, 2)])
def test_gradients_of_large_weights_are_added_to_less_often(units, blocks):
    """Of 16 MiB that the passes make a block makes 2, or half the bytes of the weights."""
    batch = 4
    time = (16 << 20) // (4 * batch * units)
    shapes = [(FEATURES, units), (units, units), (batch, units), (time, batch, FEATURES)]
    w, u, h, xs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def of(w, u, h, xs):
        def step(h, x):
            return jnp.tanh(x @ w + h @ u), None

        return scalar_of(jaxrnn.scan(step, h, xs)[0])

    gradient = jax.make_jaxpr(jax.grad(of, 1))(w, u, h, xs).jaxpr
    products = [(e.outvars[0].aval.shape, n) for e, n in equations(gradient) if e.primitive is DOT]
    assert [times for made, times in products if made == u.shape] == [blocks]


def blocks_of_the_gradient(body, init, xs):
    """The steps in a block of the tangent, or none if it is one block."""

    def loss(init, xs):
        return scalar_of(jaxrnn.scan(body, init, xs, method="sequential"))

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(init, xs).jaxpr
    outer = {
        equation.params["length"]
        for equation, _ in equations(jaxpr)
        if equation.primitive is SCAN and list(loops(equation.params["jaxpr"].jaxpr))
    }
    return {len(xs) // count for count in outer}


@pytest.mark.parametrize(("n", "time", "blocks"), [(32, 192, {32}), (64, 64, set())])
def test_blocks_are_short_where_passes_go_over_rows_like_a_large_state(n, time, blocks):
    """A small memory is read by a pass, a large one by the loop, where it lies."""

    def linear_attention(memory, x):
        q, k, v = jnp.split(x @ jnp.ones((1, 3 * n)), 3, axis=-1)
        memory = 0.9 * memory + k[:, :, None] * v[:, None, :]
        return memory, jnp.einsum("bk,bkv->bv", q, memory)

    memory, xs = ones((8, n, n)), ones((time, 8, 1))
    assert blocks_of_the_gradient(linear_attention, memory, xs) == blocks


@pytest.mark.parametrize(
    ("update", "sizes", "flags", "share"),
    [
        (decay, {}, {}, 1 / 8),  # in blocks of 8 steps
        (decay, {"units": 128, "time": 256}, {}, 1 / 32),
        (decay, {"units": 128}, {}, 1),  # 8 MiB in all
        (decay, {"samples": 16}, {}, 1),  # 4 MiB at each step
        (decay, {}, {"chunk": 8}, 1),
        (jnp.sin, {}, {}, 1),
        (lambda memory: 0.9 * jnp.swapaxes(memory, 1, 2), {}, {}, 1),
    ],
)
def test_large_memories_are_kept_between_blocks_alone(update, sizes, flags, share):
    """Unless they take little, or to run a step again takes much."""
    run, operands = memories(update, **sizes)

    def backward(*operands):
        return jax.vjp(functools.partial(run, jaxrnn.scan, **flags), *operands)[1]

    kept = sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, *operands)))
    whole = len(operands[2]) * operands[1].nbytes
    assert 0.9 * share <= kept / whole <= 1.3 * share


def test_memories_that_are_kept_between_blocks_have_every_derivative():
    """34 steps are four blocks of 8 and two; a count has no derivative."""
    run, operands = memories(decay)
    moves = [operand[::-1] for operand in operands]

    def derivatives(scan):
        def loss(*operands):
            memory, outputs, _ = run(scan, *operands)
            return scalar_of((memory[:, :2], outputs))

        gradient = jax.grad(loss, (0, 1, 2))
        values = run(scan, *operands)
        _, moved = jax.jvp(lambda *a: run(scan, *a)[:2], operands, moves)
        return values, moved, jax.jvp(gradient, operands, moves)

    ours, plain = (jax.jit(functools.partial(derivatives, scan))() for scan in SCANS)
    assert_same(ours, plain, scale=10)


@pytest.mark.parametrize(("samples", "units", "together"), [(4, 128, 2), (1, 256, 1), (2, 128, 1)])
def test_gradients_of_large_memories_take_two_steps_per_iteration(samples, units, together):
    """Where several samples have 256 KiB of them."""
    run, operands = memories(decay, samples, units)
    gradient = jax.grad(lambda *a: scalar_of(run(jaxrnn.scan, *a)[1]))
    program = jax.make_jaxpr(gradient)(*operands)
    innermost = [
        e.params["unroll"]
        for e, _ in equations(program)
        if e.primitive is SCAN and not list(loops(e.params["jaxpr"]))
    ]
    assert innermost == [1, together]


def test_a_state_that_is_passed_through_shortens_no_blocks():
    def reader(carry, x):
        h, table = carry
        h = jnp.tanh(x @ jnp.ones((1, 32)) + h @ jnp.ones((32, 32)) + table[:, :1])
        return (h, table), h**2

    start = ones((8, 32)), ones((8, 2048))
    assert blocks_of_the_gradient(reader, start, ones((128, 8, 1))) == set()


@pytest.mark.parametrize("write", ["slice", "set", "add", "max"])
@pytest.mark.parametrize(
    ("time", "samples", "features", "left_alone"),
    [(8, 8, 32, True), (8, 8, 512, False), (8, 4, 32, False), (128, 8, 32, False)],
)
def test_a_large_cache_is_left_alone_unless_much_leaves_the_loop(
    time, samples, features, left_alone, write
):
    """To keep it whole for the gradient takes longer than all that is gained beside it.

    Of many steps it is not kept.
    """
    w, xs = np.ones((features, 64), np.float32), np.ones((time, samples, features), np.float32)

    def products(scan):
        def step(carry, x):
            rows, t = carry
            if write == "slice":
                rows = lax.dynamic_update_index_in_dim(rows, x @ w, t, 1)
            else:
                rows = getattr(rows.at[:, t], write)(x @ w)
            return (rows, t + 1), jnp.einsum("bth,bh->bt", rows, x @ w)

        start = np.zeros((samples, 128, 64), np.float32), 0
        return products_in_innermost_loops(
            jax.make_jaxpr(jax.grad(lambda xs: scalar_of(scan(step, start, xs)[1])))(xs)
        )

    assert (products(jaxrnn.scan) == products(lax.scan)) == left_alone


def test_a_large_ring_buffer_that_is_read_at_one_place_is_not_left_alone():
    """Unlike a cache that is read whole, it need not be kept for the gradient: what is read is."""
    params, xs = np.ones((2, 32, 32), np.float32), np.ones((8, 8, 32), np.float32)

    def products(scan):
        def loss(params, xs):
            def step(carry, x):
                ring, t = carry
                old = lax.dynamic_index_in_dim(ring, t % 256, 0, keepdims=False)
                new = jnp.tanh(x @ params[0] + old @ params[1])
                return (lax.dynamic_update_index_in_dim(ring, new, t % 256, 0), t + 1), new

            return scalar_of(scan(step, (np.zeros((256, 8, 32), np.float32), 0), xs)[1])

        return products_in_innermost_loops(jax.make_jaxpr(jax.grad(loss))(params, xs))

    assert products(lax.scan) == [2, 3]
    assert products(jaxrnn.scan) == [1, 1]
