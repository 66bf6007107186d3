"""What is left in the loops of a gradient and what is kept for them, counted in the jaxpr."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bodies import BODIES, table
from helpers import assert_same
from jax import lax
from structure import (
    DOT,
    SCAN,
    TIME,
    count,
    equations,
    innermost_loops,
    loops,
    multiply_adds,
    primitive_of,
    programs,
    sum_of_sines,
)

import jaxrnn

BATCH, FEATURES, UNITS = 3, 5, 16
SPLIT = {"method": "sequential", "chunk": 4}
COS = primitive_of(jnp.cos, 0.0)
EXP = primitive_of(jnp.exp, 0.0)
LOGISTIC = primitive_of(lax.logistic, 0.0)
REDUCE_SUM = primitive_of(jnp.sum, np.ones(2))
TANH = primitive_of(jnp.tanh, 0.0)


def test_weight_gradients_contract_over_one_axis():
    """Time and batch as one: over two axes XLA transposes its operand first."""
    _, gradient = programs("lstm_split", **SPLIT)
    products = [equation for equation, _ in equations(gradient) if equation.primitive is DOT]
    assert products
    for equation in products:
        (contracted, _), _ = equation.params["dimension_numbers"]
        assert len(contracted) == 1


def test_gates_are_not_computed_again_for_the_gradient():
    """Their results tell their derivatives. The tanh of the cell state is no gate."""
    forward, gradient = programs("lstm_split", **SPLIT)
    assert (count(forward, LOGISTIC), count(forward, TANH)) == (3, 2)
    assert (count(gradient, LOGISTIC), count(gradient, TANH)) == (3, 2 + 1)


def test_gates_activated_before_their_split_are_kept_as_their_parts():
    """The transposed loop then reads whole rows, and writes one row for all gates."""
    name = "lstm_activated_before_the_split"
    forward, gradient = programs(name, **SPLIT)
    assert (count(forward, TANH), count(gradient, TANH)) == (2, 2 + 1)
    last = list(loops(gradient))[-1]
    samples, units = last.outvars[0].aval.shape
    part, whole = (samples, units), (samples, 4 * units)
    assert [v.aval.shape for v in last.outvars] == [part, part, whole]
    # A row, or the number of one that is read where it lies.
    read = [v.aval.shape for v in last.invars if v.aval.shape != (4 * units, units)]
    assert set(read) <= {part, (TIME, *part), ()}


@pytest.mark.parametrize(
    ("weigh", "maxima", "keeps_terms"),
    [
        (lambda pairs, most: jnp.exp(pairs - lax.stop_gradient(most)), 1, False),
        (lambda pairs, most: jnp.exp(pairs - most), 2, True),
        (lambda pairs, most: jnp.where(pairs < lax.stop_gradient(most), 0.1, pairs), 2, False),
    ],
    ids=["softmax", "differentiated", "compared"],
)
def test_sums_and_maxima_of_many_terms_are_kept_and_their_terms_are_not(weigh, maxima, keeps_terms):
    """Unless rounding might tell: a term computed again need not equal the maximum that it was."""
    samples, states, steps = 2, 8, 32

    def step(alpha, x):
        pairs = alpha[:, :, None] + jnp.log(jnp.arange(1.0, states + 1)) * x
        weights = weigh(pairs, jnp.max(pairs, axis=1, keepdims=True))
        alpha = jnp.tanh(jnp.sum(weights, axis=1))
        return alpha @ jnp.eye(states), alpha[:, 0]

    def derivative(scan):
        return jax.jit(jax.grad(lambda *operands: sum_of_sines(scan(step, *operands)), (0, 1)))

    split = derivative(functools.partial(jaxrnn.scan, **SPLIT))
    operands = jnp.ones((samples, states)), jnp.ones((steps, states, states))
    # In the jaxpr stands what nobody reads, too.
    assert split.lower(*operands).compile().as_text().count(" maximum(") == maxima
    gradient = jax.make_jaxpr(split)(*operands)
    kept = [v.aval.size for e, _ in equations(gradient) if e.primitive is SCAN for v in e.outvars]
    assert (max(kept) >= steps * samples * states * states) == keeps_terms
    assert_same(split(*operands), derivative(lax.scan)(*operands))


@pytest.mark.parametrize(("units", "columns"), [(48, 3 * 48), (128, 128)])
def test_gates_of_few_columns_have_one_weight_gradient(units, columns):
    """A product that makes many numbers of long sums is faster than several of few each."""
    samples, steps = 64, 3
    shapes = {"w": (FEATURES, 3 * units), "u": (units, 3 * units), "b": 3 * units}
    p = {name: np.ones(shape) for name, shape in shapes.items()}

    def loss(p):
        xs = np.ones((steps, samples, FEATURES))
        body = BODIES["gru_reset_after"].make(p)
        return sum_of_sines(jaxrnn.scan(body, np.ones((samples, units)), xs, method="sequential"))

    gradient = jax.make_jaxpr(jax.grad(loss))(p)
    made = [e.outvars[0].aval.shape for e, _ in equations(gradient) if e.primitive is DOT]
    of_u = [shape for shape in made if shape[1] == units and shape[0] != samples]
    assert of_u == [(columns, units)] * (3 * units // columns)


@pytest.mark.parametrize(
    ("name", "arrays"),
    [("lstm_split", 1), ("lstm_slices", 1), ("lstm_concatenated", 1), ("gru_reset_after", 4)],
)
def test_gates_of_many_samples_are_put_together_by_the_transposed_loop(name, arrays):
    """It writes one row for all gates that are added in pairs, and each weight has one product."""
    samples, units, gates = 8, table.UNITS, 3 if name.startswith("gru") else 4
    w, u = np.ones((FEATURES, gates * units)), np.ones((units, gates * units))
    p = {"w": w, "u": u, "k": np.concatenate([w, u]), "b": np.ones(gates * units)}
    h, xs = np.ones((samples, units)), np.ones((TIME, samples, FEATURES))
    init = h if name.startswith("gru") else (h, h)

    def loss(*operands):
        p, *rest = operands
        return sum_of_sines(jaxrnn.scan(BODIES[name].make(p), *rest, **SPLIT))

    gradient = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(p, init, xs)
    last = list(loops(gradient))[-1]
    states = len(jax.tree.leaves(init))
    written = [v.aval.shape for v in last.outvars[states:]]
    assert written == [(samples, 4 * units // arrays)] * arrays
    if arrays == 1:
        assert count(gradient, DOT) == 6  # of x, of h; by x, by h, by both weights


def test_rematerialisation_repeats_the_forward_pass_and_no_more():
    once, _ = programs("lstm_split", **SPLIT)
    _, gradient = programs("lstm_split", **SPLIT)
    _, rematerialised = programs("lstm_split", **SPLIT, remat=True)
    assert multiply_adds(rematerialised) <= multiply_adds(gradient) + multiply_adds(once)


def test_a_state_that_is_read_after_its_change_is_kept_as_it_is_then():
    """Or the gradient would have to change it again."""

    def run(state, xs):
        def body(state, x):
            state = lax.erf_inv(x) - state
            return state, jnp.sin(state) @ jnp.eye(UNITS)

        return jaxrnn.scan(body, state, xs, **SPLIT)

    change = primitive_of(lax.erf_inv, 1.0)
    operands = np.ones((BATCH, UNITS)), np.ones((TIME, BATCH, UNITS))
    gradient = jax.grad(lambda state: sum_of_sines(run(state, operands[1])))
    assert count(jax.make_jaxpr(gradient)(operands[0]), change) == 1


def test_what_a_product_is_scaled_by_is_not_computed_again_in_the_loop():
    """Rotated by its step, as a position is told, a key is kept as it is then."""
    w, state, xs = np.ones((UNITS, UNITS)), np.ones(UNITS), np.ones((TIME, UNITS))

    def run(w, state, xs):
        def body(state, step):
            x, n = step
            state = jnp.tanh(state @ w) * (x @ w * jnp.cos(n))
            return state, state

        return jaxrnn.scan(body, state, (xs, np.arange(TIME, dtype=np.float32)), **SPLIT)

    cosine = primitive_of(jnp.cos, 0.0)
    gradient = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(run(w, state, xs)[1])))(w)
    innermost = innermost_loops(gradient)
    assert [count(body, cosine) for body in innermost] == [0] * len(innermost)


def time_gate(h, x, p):
    phase = jnp.mod(x[:, :1], p["scale"]) / p["scale"]
    return jnp.where(phase < 0.5, phase, 1 - phase) * h


def angle(h, x, p):
    return jnp.arctan2(h, p["scale"]) * h


def likelihood(h, x, p):
    return h * lax.lgamma(jnp.exp(x @ p["w"]))


@pytest.mark.parametrize(
    ("change", "slow"),
    [
        (time_gate, {lax.rem_p: 1}),
        (angle, {lax.atan2_p: 1}),
        (likelihood, {lax.lgamma_p: 1, lax.digamma_p: 1}),
    ],
)
def test_slow_functions_are_computed_once(change, slow):
    """For the forward pass and its gradient, in loops and in passes together."""
    rng = np.random.default_rng(0)
    sizes = {"w": (0.1, FEATURES, UNITS), "u": (0.1, UNITS, UNITS), "scale": (1, UNITS)}
    p = {
        name: jnp.asarray(largest * rng.uniform(0.5, 1, shape), jnp.float32)
        for name, (largest, *shape) in sizes.items()
    }
    state, xs = (
        jnp.asarray(rng.uniform(0.1, 1, shape), jnp.float32)
        for shape in ((BATCH, UNITS), (TIME, BATCH, FEATURES))
    )

    def gradient(scan, **flags):
        def loss(p, state, xs):
            def step(h, x):
                h = jnp.tanh(x @ p["w"] + change(h, x, p) @ p["u"])
                return h, h

            return sum_of_sines(scan(step, state, xs, **flags))

        return jax.grad(loss, (0, 1, 2))

    program = jax.make_jaxpr(gradient(jaxrnn.scan, **SPLIT))(p, state, xs)
    runs = {
        primitive: sum(
            times * e.outvars[0].aval.size
            for e, times in equations(program)
            if e.primitive is primitive
        )
        for primitive in slow
    }
    assert runs == {k: times * TIME * BATCH * UNITS for k, times in slow.items()}
    assert_same(gradient(jaxrnn.scan, **SPLIT)(p, state, xs), gradient(lax.scan)(p, state, xs))


def masked_weights(u, x):
    return u * (x[0, 0] > u)


def scaled_weights(u, x):
    return u / (1 + x[0, 0] ** 2)


@pytest.mark.parametrize("weights", [masked_weights, scaled_weights])
@pytest.mark.parametrize(("units", "in_a_pass"), [(32, True), (64, False)])
def test_large_weights_of_each_step_are_made_in_the_loop_of_the_gradient(weights, units, in_a_pass):
    """And their gradients added up there: those of all steps would fill the memory."""
    rng = np.random.default_rng(0)
    shapes = (FEATURES, units), (units, units), (BATCH, units), (TIME, BATCH, FEATURES)
    operands = [jnp.asarray(rng.uniform(-0.3, 0.3, shape), jnp.float32) for shape in shapes]

    def gradient(scan, **flags):
        def loss(w, u, state, xs):
            def step(h, x):
                h = jnp.tanh(x @ w + h @ weights(u, x))
                return h, h

            return sum_of_sines(scan(step, state, xs, **flags))

        return jax.grad(loss, (0, 1, 2, 3))

    program = jax.make_jaxpr(gradient(jaxrnn.scan, **SPLIT))(*operands)
    sizes = [v.aval.size for e, _ in equations(program) for v in e.outvars]
    assert (max(sizes) >= SPLIT["chunk"] * units**2) == in_a_pass
    kernels = [
        e.outvars[0].aval.shape
        for body in innermost_loops(program)
        for e, _ in equations(body)
        if e.primitive is DOT and e.outvars[0].aval.shape == (FEATURES, units)
    ]
    assert not kernels
    assert_same(gradient(jaxrnn.scan, **SPLIT)(*operands), gradient(lax.scan)(*operands))


def test_the_gradient_of_a_kernel_is_in_no_loop():
    """XLA's is slow there on a CPU; the forward pass keeps its blocks."""
    kernel, xs = np.ones((3, 2, 2), np.float32), np.ones((TIME, BATCH, 5, 2), np.float32)

    def run(kernel, xs):
        def body(h, x):
            convolved = lax.conv_general_dilated(
                x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
            h = jnp.tanh(convolved + 0.5 * h)
            return h, h

        return jaxrnn.scan(body, xs[0], xs, **SPLIT)[1]

    convolution = lax.conv_general_dilated_p
    forward = jax.make_jaxpr(run)(kernel, xs)
    gradient = jax.make_jaxpr(jax.grad(lambda *a: sum_of_sines(run(*a)), (0, 1)))(kernel, xs)
    assert [count(body, convolution) for body in loops(forward)] == [1, 0]
    kernels = [
        e
        for body in loops(gradient)
        for e, _ in equations(body)
        if e.primitive is convolution and e.outvars[0].aval.shape == kernel.shape
    ]
    assert not kernels
    assert count(gradient, convolution) == 3


def test_the_weight_gradient_is_contracted_over_whole_blocks():
    """No product with the shape of a recurrent kernel is added up step by step."""
    _, gradient = programs("lstm_split", **SPLIT)
    _, before = programs("lstm_split", lax.scan)
    kernels = {(4, 16), (16, 4), (4, 4), (2, 16), (16, 2), (2, 4), (4, 2)}

    def kernels_in_innermost_loops(program):
        return [
            e.outvars[0].aval.shape
            for body in innermost_loops(program)
            for e, _ in equations(body)
            if e.outvars and e.outvars[0].aval.shape in kernels
        ]

    assert kernels_in_innermost_loops(before)
    assert not kernels_in_innermost_loops(gradient)


def memory(scan, decay, key, value, state, xs, **flags):
    """A matrix for each sample, written by outer products of rotated keys and read by them."""
    angles = np.linspace(1, 2, key.shape[1] // 2, dtype=np.float32)

    def body(carry, x):
        matrix, n = carry
        even, odd = jnp.split(x @ key, 2, axis=-1)
        cos, sin = jnp.cos(n * angles), jnp.sin(n * angles)
        k = jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], -1)
        matrix = decay * matrix + k[..., None] * (x @ value)[:, None]
        return (matrix, n + 1), jnp.einsum("bk,bkv->bv", k, matrix)

    return scan(body, (state, 0.0), xs, **flags)


def test_rows_of_a_memory_are_made_in_the_loop_of_its_gradient():
    """Nor summed up in a pass, though the decay of each number has its own gradient made there."""
    units, rng = 16, np.random.default_rng(0)
    weights = (units, units), (FEATURES, units), (FEATURES, units)
    shapes = *weights, (1, units, units), (TIME, 1, FEATURES)
    operands = [jnp.asarray(rng.uniform(-0.5, 0.5, shape), jnp.float32) for shape in shapes]

    def gradient(scan, **flags):
        run = functools.partial(memory, scan, **flags)
        return jax.grad(lambda *a: sum_of_sines(run(*a)), range(len(shapes)))

    in_one_block = gradient(jaxrnn.scan, method="sequential", chunk=None)
    program = jax.make_jaxpr(in_one_block)(*operands)
    sums_in_passes = [
        e.outvars[0].aval.shape
        for e, times in equations(program)
        if e.primitive is REDUCE_SUM and times == 1 and e.invars[0].aval.size == TIME * units**2
    ]
    assert sums_in_passes == [(1, units, units)]  # that of the decay
    # Nor is an angle's cosine computed for each number of a memory.
    innermost = innermost_loops(program)
    assert [count(body, COS) > 0 for body in innermost] == [True, False]
    assert_same(in_one_block(*operands), gradient(lax.scan)(*operands))


def test_exponentials_of_a_product_free_gradient_are_in_no_loop():
    """The transposes of shifts would each compute them again: a sum over paths, as for CTC."""
    rng = np.random.default_rng(0)
    w, state, xs = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((FEATURES, UNITS), (BATCH, UNITS), (TIME, BATCH, FEATURES))
    )

    def run(scan, w, state, xs, **flags):
        def body(paths, x):
            moved = jnp.pad(paths[:, :-1], ((0, 0), (1, 0)), constant_values=-1e30)
            paths = jnp.logaddexp(paths, moved) + jax.nn.log_softmax(x @ w)
            return paths, jax.nn.logsumexp(paths, axis=-1)

        return scan(body, state, xs, **flags)

    def gradient(scan, **flags):
        return jax.grad(lambda *a: sum_of_sines(run(scan, *a, **flags)), (0, 1, 2))

    program = jax.make_jaxpr(gradient(jaxrnn.scan, **SPLIT))(w, state, xs)
    innermost = innermost_loops(program)
    assert [count(body, EXP) > 0 for body in innermost] == [True, False]
    assert_same(gradient(jaxrnn.scan, **SPLIT)(w, state, xs), gradient(lax.scan)(w, state, xs))
