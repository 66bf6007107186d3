"""`method="parallel"`: states that are affine in themselves, all steps of a block at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from jax import lax
from structure import equations, is_inexact, loops, over_floats, sum_of_sines

import jaxrnn

B, T, D, H = 3, 7, 4, 5
PARALLEL = functools.partial(jaxrnn.scan, method="parallel")
RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(0.5 * RNG.standard_normal(shape), jnp.float32)


PARAMS = {"W": draw(D, H), "V": draw(D, H), "angle": draw(H), "U": draw(H, H)}
XS, H0 = draw(T, B, D), draw(B, H)


def min_gru(p):
    """A gate and a candidate of the input, and a readout of the state that is not linear."""

    def step(h, x):
        z = jax.nn.sigmoid(x @ p["W"])
        h = (1 - z) * h + z * (x @ p["V"])
        return h, jnp.tanh(h) @ p["U"]

    return step


def momentum(p):
    """A state that enters another one, and a number of steps."""

    def step(carry, x):
        m, w, n = carry
        m = 0.9 * m + x @ p["W"]
        w = w - (m - 0.1 * w) / (2 + jnp.cos(p["angle"]))
        return (m, w, n + 1), (w, m * w, n)

    return step


def rotation(p):
    """Two states that enter each other, and change places."""
    cos, sin = jnp.cos(p["angle"]), jnp.sin(p["angle"])

    def step(carry, x):
        a, b, c = carry
        u = x @ p["W"]
        return (b, a * sin + b * cos + u - c, a * cos - b * sin), a + b

    return step


def layers(p):
    """A state that another one is no linear function of, and whose gradient ends now and then."""

    def step(carry, x):
        below, above = carry
        below = p["angle"] * below + x @ p["W"]
        above = jnp.where(x[:, :1] > 0, 0.5 * above + jnp.tanh(below), lax.stop_gradient(above))
        above = above + jnp.exp(-(below**2))
        return (below, above), (above, jnp.sin(above) * below)

    return step


def retention(p):
    """A matrix for each sample, which keys and queries read and write."""

    def step(memory, x):
        k, v = x @ p["W"], x @ p["V"]
        memory = 0.8 * memory + k[:, :, None] * v[:, None, :]
        return memory, jnp.einsum("bi,bij->bj", k, memory)

    return step


def complex_diagonal(p):
    """Complex numbers, one of which is the same for all samples."""

    def step(carry, x):
        h, total = carry
        h = jnp.exp(1j * p["angle"]) * 0.9 * h + x @ p["W"]
        return (h, total + jnp.sum(x)), (h.real * h.imag, total)

    return step


def shift_register(p):
    """States that remember inputs, and one that begins anew at each step."""

    def step(carry, x):
        last, before, constant = carry
        return (x @ p["W"], last, jnp.zeros_like(constant)), (before * constant, last + before)

    return step


def noisy(p):
    """Noise of a key that is handed on."""

    def step(carry, x):
        key, h = carry
        key, now = jax.random.split(key)
        h = p["angle"] * h + x @ p["W"] + 0.1 * jax.random.normal(now, h.shape)
        return (key, h), h**2

    return step


COUNT = jnp.int32(2)
CASES = {
    min_gru: H0,
    momentum: (H0, 2 * H0, COUNT),
    rotation: (H0, 2 * H0, -H0),
    layers: (H0, 2 * H0),
    retention: draw(B, H, H),
    complex_diagonal: (H0 + 1j, jnp.float32(1)),
    shift_register: (H0, 2 * H0, -H0),
    noisy: (jax.random.PRNGKey(3), H0),
}
SETTINGS = {
    "plain": {},
    "uneven_chunks_reverse": {"chunk": 3, "reverse": True},
    "remat": {"remat": True},
    "single_steps": {"chunk": 1},
}


def value_and_gradient(scan, make):
    def scalar_and_results(operands):
        params, init, xs = operands
        results = scan(make(params), init, xs)
        floats = filter(is_inexact, jax.tree.leaves(results))
        return sum_of_sines([x.real + 2 * x.imag for x in floats]), results

    run, floats = over_floats(scalar_and_results, (PARAMS, CASES[make], XS))
    return jax.jit(jax.value_and_grad(run, has_aux=True))(floats)


@functools.cache
def expected_of(make, reverse):
    return value_and_gradient(functools.partial(lax.scan, reverse=reverse), make)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_values_and_gradients_are_those_of_lax_scan(make, setting):
    flags = SETTINGS[setting]
    actual = value_and_gradient(functools.partial(PARALLEL, **flags), make)
    expected = expected_of(make, flags.get("reverse", False))
    assert_same(actual, expected, "float32", scale=10)


@pytest.mark.parametrize("make", [make for make in CASES if make is not noisy])
def test_no_loop_is_left(make):
    """Of results, and of a gradient, all steps of which are in one block here."""

    def loss(params):
        floats = filter(is_inexact, jax.tree.leaves(PARALLEL(make(params), CASES[make], XS)))
        return sum_of_sines([x.real for x in floats])

    for function in (loss, jax.grad(loss)):
        assert not list(loops(jax.make_jaxpr(function)(PARAMS).jaxpr))


def test_the_rounds_grow_with_the_logarithm_of_time():
    def operations(time):
        run = functools.partial(PARALLEL, min_gru(PARAMS), H0, chunk=None)
        return len(list(equations(jax.make_jaxpr(run)(jnp.ones((time, B, D))).jaxpr)))

    each = operations(2**5) - operations(2**4)
    assert operations(2**10) - operations(2**9) == each > 0


def test_every_transformation():
    def loss(scan, params, init):
        return sum_of_sines(jax.tree.leaves(scan(layers(params), init, XS)))

    def everything(scan):
        run = functools.partial(loss, scan)
        init = CASES[layers]
        slopes = jax.jvp(functools.partial(run, init=init), [PARAMS], [PARAMS])
        curvature = jax.hessian(lambda angle: run(PARAMS | {"angle": angle}, init))
        stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
        ensemble = jax.vmap(jax.grad(run), (0, None))(stacked, init)
        again = jax.grad(jax.checkpoint(run), argnums=1)(PARAMS, init)
        _, linear = jax.linearize(functools.partial(run, PARAMS), init)
        return slopes, curvature(PARAMS["angle"]), ensemble, again, linear(init)

    actual, expected = (
        jax.jit(functools.partial(everything, scan))() for scan in (PARALLEL, lax.scan)
    )
    assert_same(actual, expected, "float32", scale=100)


def test_masks_lengths_and_resets_of_rnn():
    lengths, mask = np.array([7, 2, 5]), RNG.random((B, T)) > 0.3
    reset = RNG.random((B, T)) > 0.6
    valid = mask & (np.arange(T) < lengths[:, None])
    inputs = jnp.where(valid[..., None], jnp.moveaxis(XS, 0, 1), jnp.nan)

    def step(x, states):
        total, rate = states
        rate = 0.5 * rate + jnp.log1p(x[:, :1] ** 2)
        total = total * jax.nn.sigmoid(x @ PARAMS["W"]) + rate * (x @ PARAMS["V"])
        return jnp.tanh(total), [total, rate]

    def loss(method, inputs, states):
        results = jaxrnn.rnn(
            step, inputs, states, mask=mask, input_length=lengths, reset=reset, method=method
        )
        return sum_of_sines(jax.tree.leaves(results)), results

    def of(method):
        run = jax.value_and_grad(functools.partial(loss, method), (0, 1), has_aux=True)
        return jax.jit(run)(inputs, [H0, H0[:, :1]])

    (actual, gradient), expected = of("parallel"), of("lax")
    assert_same((actual, gradient), expected, "float32", scale=10)
    assert np.isfinite(np.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])).all()


def narrow(h, x):
    return 0.5 * h + x[:, :1].astype(jnp.bfloat16), h


def test_a_state_keeps_its_dtype():
    h, ys = PARALLEL(narrow, H0.astype(jnp.bfloat16), XS)
    expected = lax.scan(narrow, H0.astype(jnp.bfloat16), XS)
    assert_same((h, ys), expected, "bfloat16")


def swapped(carry, x):
    a, b = carry
    return (b, a), a + x


NOT_FINITE = {
    "taken from the input": (lambda h, x: (x, h), -jnp.inf, jnp.arange(4.0)),
    "held": (lambda h, x: (jnp.where(x > 0, x, h), h), 0.0, jnp.array([1, jnp.inf, 2, -3, 4])),
    "begun": (lambda h, x: (jnp.where(x == 0, x, 0.5 * h) + x, h), jnp.nan, jnp.arange(4.0)),
    "swapped": (swapped, (jnp.inf, 1.0), jnp.arange(4.0)),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_what_is_dropped_may_be_infinite_or_nan(case):
    body, init, xs = NOT_FINITE[case]
    init = jax.tree.map(jnp.float32, init)
    assert_same(PARALLEL(body, init, xs), lax.scan(body, init, xs))


def test_a_reset_keeps_nan_in_its_episode():
    reset = jnp.arange(T) == 3
    inputs = jnp.moveaxis(XS, 0, 1).at[:, 1].set(jnp.nan)

    def loss(weight, method):
        def step(x, states):
            h = 0.5 * states[0] + x @ weight
            return jnp.log(jnp.maximum(h, 0)), [h]

        _, outputs, _ = jaxrnn.rnn(
            step, inputs, [H0], reset=jnp.stack([reset] * B), mask=jnp.ones((B, T)), method=method
        )
        return sum_of_sines(jnp.exp(outputs[:, 3:])), outputs

    actual, expected = (
        jax.value_and_grad(loss, has_aux=True)(PARAMS["W"], method)
        for method in ("parallel", "lax")
    )
    (_, outputs), _ = expected
    assert np.isnan(outputs[:, 1]).all()
    assert np.isneginf(outputs[:, 3:]).any()
    assert np.isfinite(actual[0][0])
    assert_same(actual[0], expected[0], scale=10)


def test_second_derivatives_at_coefficients_of_zero():
    def loss(scan, a):
        step = lambda h, x: (jnp.where(x[:1] > 9, h, a * h) + x, h)  # noqa: E731
        return sum_of_sines(scan(step, H0[0], XS[:, 0, :1])[1])

    actual, expected = (
        jax.hessian(functools.partial(loss, scan))(0.0) for scan in (PARALLEL, lax.scan)
    )
    assert_same(actual, expected, scale=10)


def test_states_of_several_dtypes():
    def step(carry, x):
        wide, narrow = carry
        return (
            0.5 * wide + narrow.astype(jnp.float32) + x,
            (0.3 * wide).astype(jnp.bfloat16),
        ), wide

    init = jnp.float32(1), jnp.bfloat16(2)
    xs = jnp.arange(4.0)
    assert_same(PARALLEL(step, init, xs), lax.scan(step, init, xs), "bfloat16")


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_keys_flags_and_counts_beside_a_state(make_key):
    def step(carry, x):
        key, n, done, h = carry
        key, now = jax.random.split(key)
        h = jnp.where(done, 0, 0.9 * h) + n * x
        return (key, (n + 1) % 3, x > 2, h), h * jax.random.bernoulli(now)

    def loss(scan, xs):
        init = make_key(1), jnp.int32(1), jnp.bool_(False), jnp.float32(0)
        last, ys = scan(step, init, xs)
        return jnp.sum(jnp.sin(ys)), (last, ys)

    actual, expected = (
        jax.value_and_grad(functools.partial(loss, scan), has_aux=True)(jnp.arange(5.0))
        for scan in (PARALLEL, lax.scan)
    )
    assert_same(actual, expected, scale=10)


def test_a_truth_value_is_held_at_masked_steps():
    def step(x, states):
        h = 0.9 * states[0] + x @ PARAMS["W"]
        return (h, h > 0), [h]

    actual, expected = (
        jaxrnn.rnn(step, jnp.moveaxis(XS, 0, 1), [H0], input_length=[7, 0, 3], method=method)
        for method in ("parallel", "lax")
    )
    assert_same(actual, expected)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


def test_functions_with_a_derivative_of_their_own():
    def loss(scan, xs):
        step = lambda h, x: (0.9 * h + clipped(x[:, :1]), clipped(h @ PARAMS["U"]))  # noqa: E731
        return sum_of_sines(scan(step, H0, xs)[1])

    actual, expected = (
        jax.grad(functools.partial(loss, scan))(XS) for scan in (PARALLEL, lax.scan)
    )
    assert_same(actual, expected, scale=10)


def test_bits_that_depend_on_the_batching_are_refused():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), T)
    with pytest.raises(ValueError, match="random_bits is not run for many steps at once"):
        PARALLEL(lambda h, key: (0.9 * h + jax.random.normal(key), h), 0.0, keys)


@pytest.mark.parametrize(
    ("word", "body"),
    [
        ("tanh", lambda h, x: (jnp.tanh(h) + x @ PARAMS["W"], h)),
        ("dot_general", lambda h, x: (h @ PARAMS["U"] + x @ PARAMS["W"], h)),
        ("mul", lambda h, x: (h * (h + x @ PARAMS["W"]), h)),
        ("div", lambda h, x: (1 / (h + x @ PARAMS["W"]), h)),
        ("gt", lambda h, x: (jnp.where(h > 0, h, x @ PARAMS["W"]), h)),
        ("max", lambda h, x: (jnp.maximum(h, x @ PARAMS["W"]), h)),
        ("cond", lambda h, x: (h + lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x @ PARAMS["W"]), h)),
        ("cond", lambda h, x: (lax.cond(x[0, 0] > 0, lambda h: 2 * h, lambda h: h, h), h)),
        ("effects", lambda h, x: (jax.debug.print("{}", x) or h, h)),
    ],
)
def test_what_is_in_the_way_is_named(word, body):
    with pytest.raises(ValueError, match=f"method='parallel'.*{word}"):
        PARALLEL(body, H0, XS)


def test_explain_says_it():
    report = jaxrnn.explain_scan(min_gru(PARAMS), H0, XS, method="parallel").splitlines()
    assert report[0] == f'method "parallel" over {T} steps, in blocks of {T}'
    assert "all steps at once: recurrence" in report
