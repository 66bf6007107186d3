"""What the engine keeps for the backward pass, in bytes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bodies import BODIES
from helpers import assert_same
from jax import lax
from structure import executions

import jaxrnn

BATCH, UNITS = 4, 32


def problem(time, make="lstm_split"):
    """A scan of a body of the table, and its arguments; inputs are one wide and weigh nothing."""
    gates = {"lstm_split": 4, "gru_reset_after": 3, "elman_cell": 1}[make]
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32)

    p = {
        "w": draw(1, gates * UNITS),
        "u": draw(UNITS, gates * UNITS),
        "b": draw(gates * UNITS),
    }
    h = draw(BATCH, UNITS)
    init = (h, h) if make == "lstm_split" else h

    def run(scan, p, init, xs, **flags):
        return scan(BODIES[make].make(p), init, xs, **flags)

    return run, (p, init, draw(time, BATCH, 1))


def kept_bytes(scan, time, make="lstm_split", **flags):
    """Bytes that the backward pass holds beside the arguments and the results."""
    run, operands = problem(time, make)
    results, backward = jax.vjp(lambda *a: run(scan, *a, **flags), *operands)
    known = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((operands, results))}
    leaves = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(backward)}
    return sum(leaf.nbytes for pointer, leaf in leaves.items() if pointer not in known)


def kept_per_step(scan):
    """Those bytes that grow with the number of steps, for each of them."""
    short, long = (kept_bytes(scan, time) for time in (16, 80))
    return (long - short) / 64


def scratch_bytes(scan, time, **flags):
    """Scratch memory of the compiled gradient of a loss on the last state."""
    run, operands = problem(time)

    def loss(*a):
        (h, _), _ = run(scan, *a, **flags)
        return (h**2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*operands).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# Measured once, however many settings of ours are held against them.
plain_kept_bytes = functools.cache(functools.partial(kept_bytes, lax.scan))
plain_scratch_bytes = functools.cache(functools.partial(scratch_bytes, lax.scan))


def loss_of_logits(h, x):
    h = jnp.tanh(x + h @ jnp.eye(UNITS))
    logits = h @ jnp.ones((UNITS, 1000))
    return h, jax.nn.logsumexp(logits, axis=-1)


def mean_of_noise(carry, x):
    h, key = carry
    key, now = jax.random.split(key)
    noise = jax.random.normal(now, (32, *h.shape)).mean(0)
    h = jnp.tanh(x + h @ jnp.eye(UNITS) + noise)
    return (h, key), h[:, 0]


@pytest.mark.parametrize("step", [loss_of_logits, mean_of_noise])
def test_what_a_pass_makes_on_its_way_is_not_there_for_all_steps(step):
    """Only compiled: for all steps it would be 250 MiB."""
    h, key = jnp.zeros((BATCH, UNITS)), jax.random.key(0)
    init = h if step is loss_of_logits else (h, key)
    xs = jax.ShapeDtypeStruct((1 << 14, BATCH, UNITS), jnp.float32)
    run = jax.jit(lambda xs: jaxrnn.scan(step, init, xs, method="sequential")[1])
    compiled = run.lower(xs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 25 << 20


@pytest.mark.parametrize("chunk", ["auto", 16, None])
@pytest.mark.parametrize(
    ("make", "arrays"),
    # Beside the outputs, which are one of the states. LSTM: four gates and the other state. GRU:
    # three gates, and the recurrent part of the candidate by itself. Elman: nothing, since the
    # output tells the derivative of its tanh.
    [("lstm_split", 5), ("gru_reset_after", 4), ("elman_cell", 0)],
)
def test_products_and_states_are_kept_and_no_more(make, arrays, chunk):
    time = 64
    kept = kept_bytes(jaxrnn.scan, time, make, chunk=chunk, method="sequential")
    weights = 4 * UNITS * (UNITS + 2) * 4
    assert kept <= (arrays + 0.2) * time * BATCH * UNITS * 4 + weights
    assert kept < plain_kept_bytes(time, make)


def test_what_is_made_of_kept_rows_is_no_row_of_its_own():
    """Gates and candidates of a minGRU are kept: a loop that reads them needs no products of both.

    Beside them there are the states, their cotangents, and one factor at a time.
    """
    time = 64

    def loss(p, xs):
        def body(h, x):
            z = jax.nn.sigmoid(x @ p["z"])
            h = (1 - z) * h + z * (x @ p["h"])
            return h, h

        start = jnp.ones((BATCH, UNITS))
        return (jaxrnn.scan(body, start, xs, method="sequential")[1] ** 2).sum()

    p = {name: jnp.ones((3, UNITS)) for name in "zh"}
    compiled = jax.jit(jax.grad(loss)).lower(p, jnp.ones((time, BATCH, 3))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 5.5 * time * BATCH * UNITS * 4


def test_under_a_checkpoint_states_are_kept_and_nothing_else():
    """That is the cell's state of an LSTM, of which the other is the output."""

    def per_step(scan, under=jax.checkpoint):
        return kept_per_step(lambda body, *a: scan(under(body), *a))

    state = BATCH * UNITS * 4
    ours, theirs = per_step(jaxrnn.scan), per_step(lax.scan)
    assert state <= ours <= state + 8  # and the number of the step
    assert theirs >= 2 * state  # the output once more, as a state
    assert per_step(jaxrnn.scan, lambda f: f) >= 5 * state


def test_beside_a_checkpoint_products_are_kept_as_ever():
    """Nothing under it but the states of an LSTM, and beside it 8 numbers for each sample."""
    narrow = 0.1 * jnp.ones((UNITS, 8))

    def per_step(under):
        def scan(body, *operands):
            def step(carry, x):
                carry, h = under(body)(carry, x)
                return carry, jnp.sin(h @ narrow)

            return jaxrnn.scan(step, *operands)

        return kept_per_step(scan)

    states, part, gates = (BATCH * n * 4 for n in (2 * UNITS, 8, 4 * UNITS))
    assert states + part <= per_step(jax.checkpoint) <= states + part + 8
    assert per_step(lambda f: f) >= states + part + gates


def test_rematerialised_blocks_keep_their_boundaries():
    time, chunk = 256, 16
    kept = kept_bytes(jaxrnn.scan, time, chunk=chunk, remat=True)
    weights, inputs = 4 * UNITS * (UNITS + 2) * 4, time * BATCH * 4
    assert kept <= 2 * (time // chunk) * BATCH * UNITS * 4 + inputs + 2 * weights


@pytest.mark.parametrize("method", ["auto", "lax"])
def test_rematerialisation_needs_a_third_of_the_memory_at_512_steps(method):
    plain = plain_scratch_bytes(512)
    assert scratch_bytes(jaxrnn.scan, 512, remat=True, method=method) <= plain / 3


def test_rematerialisation_needs_a_twentieth_of_the_memory_at_8192_steps():
    plain = plain_scratch_bytes(8192)
    assert scratch_bytes(jaxrnn.scan, 8192, remat=True) <= plain / 20


def test_the_gradient_in_blocks_needs_less_memory_than_that_of_lax_scan():
    plain = plain_scratch_bytes(512)
    assert scratch_bytes(jaxrnn.scan, 512, chunk=32) <= 0.75 * plain


def delay_line(buffer, x, w, u):
    new = jnp.tanh(x @ w + buffer[0] @ u)
    return jnp.concatenate([buffer[1:], new[None]]), new


def ring_buffer(carry, x, w, u):
    buffer, i = carry
    old = lax.dynamic_index_in_dim(buffer, i % len(buffer), keepdims=False)
    new = jnp.tanh(x @ w + old @ u)
    return (lax.dynamic_update_index_in_dim(buffer, new, i % len(buffer), 0), i + 1), new


def turned_buffer(buffer, x, w, u):
    new = jnp.tanh(x @ w + buffer[jnp.array([1, 3])].sum(0) @ u)
    return buffer[::-1].at[1].set(new), new


@pytest.mark.parametrize("step", [delay_line, ring_buffer, turned_buffer])
def test_of_a_buffer_what_each_step_reads_is_kept(step):
    """And not the buffer of each step, which is 16 times as large."""
    length, time = 16, 64
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.2, jnp.float32)

    buffer = draw(length, BATCH, UNITS)
    operands = draw(UNITS, UNITS), draw(UNITS, UNITS), buffer, draw(time, BATCH, UNITS)

    def gradient(scan, **flags):
        def loss(w, u, buffer, xs):
            init = (buffer, 0) if step is ring_buffer else buffer
            last, ys = scan(lambda carry, x: step(carry, x, w, u), init, xs, **flags)
            return (ys**2).sum() + jax.tree.leaves(last)[0].sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*operands).compile()

    ours, plain = gradient(jaxrnn.scan, method="sequential"), gradient(lax.scan)
    assert_same(ours(*operands), plain(*operands), scale=10)
    assert ours.memory_analysis().temp_size_in_bytes < time * buffer.nbytes / 2


def test_weights_that_each_sample_looks_up_are_kept_for_no_step():
    """A mixture of experts: neither the weights looked up nor their gradients exist per step."""
    time, experts = 32, 3
    rng = np.random.default_rng(0)
    shapes = {"gate": (UNITS, experts), "w": (1, UNITS), "u": (experts, UNITS, UNITS)}
    p = {name: jnp.asarray(rng.standard_normal(s) * 0.3, jnp.float32) for name, s in shapes.items()}
    h, xs = jnp.zeros((BATCH, UNITS)), jnp.asarray(rng.standard_normal((time, BATCH, 1)))

    def loss(scan, p, h, xs):
        def body(h, x):
            score, expert = lax.top_k(jax.nn.softmax(h @ p["gate"]), 2)
            moved = jnp.einsum("bh,bkhj->bkj", h, p["u"][expert])
            h = jnp.einsum("bk,bkj->bj", score, jnp.tanh((x @ p["w"])[:, None] + moved))
            return h, h

        return (scan(body, h, xs)[1] ** 2).sum()

    def compiled(scan):
        return jax.jit(jax.grad(lambda *a: loss(scan, *a), (0, 1, 2))).lower(p, h, xs).compile()

    ours, plain = compiled(jaxrnn.scan), compiled(lax.scan)
    looked_up_per_step = BATCH * 2 * UNITS * UNITS * 4
    assert plain.memory_analysis().temp_size_in_bytes > time * looked_up_per_step
    assert ours.memory_analysis().temp_size_in_bytes < 8 * looked_up_per_step
    assert_same(ours(p, h, xs), plain(p, h, xs))


def test_terms_of_a_sum_over_pairs_of_states_are_made_for_few_steps_at_once():
    """The gradient of a hidden Markov model: by its transitions it sums [B, K, K] at every step."""
    time, batch, states = 64, 8, 64
    rng = np.random.default_rng(0)
    log_a, emit, start, xs = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in [(states, states), (4, states), (batch, states), (time, batch, 4)]
    )

    def compiled(scan):
        def loss(log_a, emit, start, xs):
            def body(alpha, x):
                alpha = jax.nn.logsumexp(alpha[:, :, None] + log_a, axis=1) + x @ emit
                return alpha, None

            return scan(body, start, xs)[0].sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(log_a, emit, start, xs).compile()

    ours, plain = compiled(jaxrnn.scan), compiled(lax.scan)
    terms = time * batch * states * states * 4
    assert plain.memory_analysis().temp_size_in_bytes > terms
    assert ours.memory_analysis().temp_size_in_bytes < terms / 2
    operands = log_a, emit, start, xs
    assert_same(ours(*operands), plain(*operands), scale=10)


def test_results_alone_are_made_in_blocks_of_a_few_mebibytes():
    """Passes hand 16 MiB to the loop, 4 MiB in a block: of which the gates are cut once more."""
    batch, time, units = 16, 512, 128
    cell = jaxrnn.cells.lstm(units)
    params = cell.init(jax.random.key(0), 8)

    def last(params, inputs):
        states = cell.initial_states(batch)
        call = jaxrnn.rnn(cell.step(params), inputs, states, method="sequential")
        return call[0]

    compiled = jax.jit(last).lower(params, jnp.ones((batch, time, 8))).compile()
    outputs = time * batch * units * 4
    assert compiled.memory_analysis().temp_size_in_bytes < outputs + (9 << 20)


@pytest.mark.parametrize(
    ("dtype", "remat"),
    [("float32", False), ("bfloat16", False), ("float32", True), ("float16", True)],
)
def test_input_gradients_are_written_block_by_block(dtype, remat):
    """The compiled program never adds arrays of all steps, once per block."""
    run, operands = problem(64)
    p, init, xs = jax.tree.map(lambda leaf: leaf.astype(dtype), operands)

    def loss(xs):
        _, ys = run(jaxrnn.scan, p, init, xs, chunk=8, method="sequential", remat=remat)
        return ys.astype("float32").sum()

    text = jax.jit(jax.grad(loss)).lower(xs).compile().as_text()
    assert f"[64,{BATCH},1]" in text
    assert not re.search(rf"= \w+\[64,{BATCH},1\]\S* add\(", text)


@functools.cache
def second_derivative(time, make, reverse):
    """The compiled gradient of what the gradient gives, in blocks of 8 steps."""
    run, operands = problem(time, make)

    def loss(*a):
        _, ys = run(jaxrnn.scan, *a, chunk=8, method="sequential", reverse=reverse)
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(ys))

    def squares(*a):
        inner = jax.grad(loss, (0, 1, 2))(*a)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(inner))

    return jax.jit(jax.grad(squares, (0, 1, 2))).lower(*operands).compile().as_text()


def whole_arrays(text, time):
    """How often a program makes an array of all steps."""
    assert f"f32[{time},{BATCH},{UNITS}]" in text
    return executions(text, rf"= f32\[{time},{BATCH},{UNITS}\]\S* (add|broadcast|copy)\(")


@pytest.mark.parametrize("make", ["lstm_split", "gru_reset_after", "elman_cell"])
@pytest.mark.parametrize("reverse", [False, True])
def test_second_derivatives_make_no_array_of_all_steps_for_each_block(make, reverse):
    """Nor would their time grow with the square of the number of steps otherwise."""
    text = second_derivative(40, make, reverse)
    each_loop_once = re.sub(r'(?<="known_trip_count":{"n":")\d+', "1", text)
    assert each_loop_once != text
    assert whole_arrays(text, 40) == whole_arrays(each_loop_once, 40)


def test_second_derivatives_of_more_blocks_make_no_more_arrays_of_all_steps():
    short, long = (second_derivative(time, "elman_cell", True) for time in (40, 80))
    assert whole_arrays(short, 40) == whole_arrays(long, 80)


def test_inputs_are_not_turned_as_a_whole():
    """Blocks are cut from `[B, T, D]` and put back there; no array `[T, B, D]` is ever made."""
    batch, time, features, chunk = 3, 24, 5, 4
    cell = jaxrnn.cells.lstm(16)
    params = cell.init(jax.random.key(0), features)
    states = cell.initial_states(batch)

    def loss(params, inputs):
        outputs = jaxrnn.rnn(cell.step(params), inputs, states, chunk=chunk, method="sequential")[1]
        return (outputs**2).sum()

    inputs = jnp.ones((batch, time, features))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, inputs).compile()
    text = compiled.as_text()
    assert f"f32[{batch},{time},{features}]" in text
    for turned in ([time, batch, features], [time // chunk, chunk, batch, features]):
        assert f"f32[{','.join(map(str, turned))}]" not in text


@pytest.mark.parametrize("remat", [False, True])
def test_weights_in_the_carry_are_not_kept_step_by_step(remat):
    """As module libraries have them; and what meets them leaves the loop."""

    def saved(time, in_carry):
        w, h = jnp.ones((64, 64)) / 64, jnp.ones((8, 64))

        def loss(w):
            def closing(h, x):
                return jnp.tanh(x @ w + h @ w), None

            def carrying(carry, x):
                w, h = carry
                return (w, jnp.tanh(x @ w + h @ w)), None

            body, init = (carrying, (w, h)) if in_carry else (closing, h)
            last, _ = jaxrnn.scan(body, init, jnp.ones((time, 8, 64)), remat=remat)
            return jax.tree.leaves(last)[-1].sum()

        _, backward = jax.vjp(loss, w)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(backward))

    assert saved(64, True) == saved(64, False)
