"""Random numbers that a step draws: the same ones, made outside the loop where that may be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_identical, assert_same
from jax import lax
from structure import DOT, count, equations, innermost_loops, loops, primitive_of, sum_of_sines

import jaxrnn

SEQUENTIAL = functools.partial(jaxrnn.scan, method="sequential", chunk=4)
TIME, BATCH, UNITS = 7, 3, 16
KEY = jax.random.key(5)
SHIFT = primitive_of(lax.shift_left, np.uint32(1), np.uint32(1))  # which nothing else makes
BITS = primitive_of(jax.random.bits, KEY)
APART = primitive_of(lax.optimization_barrier, 1.0)
TANH = primitive_of(jnp.tanh, 1.0)
NARROW = (jnp.uint8, jnp.uint16)


@pytest.fixture(params=[True, False], ids=["partitionable", "not partitionable"])
def counting(request):
    """Both ways in which JAX counts the numbers that threefry encrypts."""
    with jax.threefry_partitionable(request.param):
        yield


def drawing(dtypes, shape):
    """A step that draws bits with keys made in every way, and in every dtype with one of them."""

    def step(carry, key_of_x):
        key, n = carry
        key, *others = jax.random.split(key, 3)
        pair = jax.random.split(others[0], (2, 1))
        folded = jax.random.fold_in(others[1], n)
        keys = [key, pair[1, 0], folded, key_of_x]
        drawn = [jax.random.bits(k, shape, jnp.uint32) for k in keys]
        drawn += [jax.random.bits(key, shape, dtype) for dtype in dtypes]
        each = jax.vmap(lambda k: jax.random.bits(k, shape))(pair[:, 0])
        return (key, n + 1), (drawn, each, jax.random.key_data(folded))

    return step


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("shape", [(), (3, 5), (0, 2)], ids=str)
def test_bits_are_those_of_lax_scan(shape):
    init, xs = (KEY, np.int32(3)), jax.random.split(jax.random.key(1), TIME)
    with jax.enable_x64(True):
        step = drawing((*NARROW, jnp.uint64), shape)
        actual, expected = (scan(step, init, xs) for scan in (SEQUENTIAL, lax.scan))
    (key, n), ys = actual
    (expected_key, expected_n), expected_ys = expected
    assert key.dtype == expected_key.dtype
    assert_identical(
        (jax.random.key_data(key), n, ys),
        (jax.random.key_data(expected_key), expected_n, expected_ys),
    )


def half_under_a_setting(key, _):
    with jax.threefry_partitionable(False):
        key, now, then = jax.random.split(key, 3)
        drawn = jax.random.bits(now, (5,))
    return key, (drawn, jax.random.bits(then, (5,)))


@pytest.mark.parametrize("flags", [{}, {"method": "sequential", "chunk": 3, "remat": True}])
def test_a_setting_of_the_step_holds_for_what_is_drawn_under_it(flags):
    key, drawn = jaxrnn.scan(half_under_a_setting, KEY, length=TIME, **flags)
    expected_key, expected = lax.scan(half_under_a_setting, KEY, length=TIME)
    assert_identical(drawn, expected)
    assert_same(key, expected_key)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_bits_of_many_keys_at_once(make_key):
    """An ensemble, a batch of keys in the state, and both under `jit`."""

    def run(scan, key):
        def step(keys, _):
            keys = jax.vmap(lambda key: jax.random.split(key)[1])(keys)
            return keys, jax.vmap(lambda key: jax.random.bits(key, (5,)))(keys)

        return scan(step, jax.random.split(key, BATCH), None, TIME)[1]

    keys = jax.vmap(make_key)(jnp.arange(4))
    for ensemble in (jax.vmap, lambda run: jax.jit(jax.vmap(run))):
        actual, expected = (
            ensemble(functools.partial(run, scan))(keys) for scan in (SEQUENTIAL, lax.scan)
        )
        assert_identical(actual, expected)


def noisy_elman(p, make_key):
    """Dropout between state and state, and noise on it."""

    def step(carry, x):
        key, h = carry
        key, one, other = jax.random.split(key, 3)
        h = jnp.where(jax.random.bernoulli(one, 0.9, h.shape), h / 0.9, 0)
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + 0.1 * jax.random.normal(other, h.shape))
        return (key, h), h

    return step, make_key(0)


def by_step_number(p, make_key):
    """A key that is closed over, folded with the number of the step."""

    def step(carry, x):
        n, h = carry
        kept = jax.random.bernoulli(jax.random.fold_in(make_key(1), n), 0.9, h.shape)
        h = jnp.tanh(x @ p["w"] + jnp.where(kept, h, 0) @ p["u"])
        return (n + 1, h), h

    return step, np.int32(0)


def problem(make, make_key):
    rng = np.random.default_rng(0)
    shapes = {"w": (UNITS, UNITS), "u": (UNITS, UNITS), "xs": (TIME, BATCH, UNITS)}
    drawn = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    xs = drawn.pop("xs")

    def run(scan, p, xs):
        step, first = make(p, make_key)
        return scan(step, (first, jnp.ones((BATCH, UNITS))), xs)

    return run, drawn, xs


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("make", [noisy_elman, by_step_number])
def test_nothing_is_drawn_in_the_loop_of_the_states(make, make_key):
    run, p, xs = problem(make, make_key)
    split = functools.partial(run, SEQUENTIAL)
    gradient = jax.grad(lambda p, xs: sum_of_sines(split(p, xs)[1]), (0, 1))
    for function in (split, gradient):
        program = jax.make_jaxpr(function)(p, xs)
        with_states = [body for body in innermost_loops(program) if count(body, DOT)]
        assert with_states
        assert not any(count(body, SHIFT) + count(body, BITS) for body in with_states)
    assert_same(jax.jit(gradient)(p, xs), jax.jit(jax.grad(
        lambda p, xs: sum_of_sines(run(lax.scan, p, xs)[1]), (0, 1)))(p, xs), scale=10)  # fmt: skip


def test_the_rounds_of_the_cipher_are_no_loop():
    """A primitive that draws bits becomes a loop in a compiled program for a CPU."""
    step, keys = drawing(NARROW, (5,)), jax.random.split(KEY, TIME)
    program = jax.make_jaxpr(functools.partial(SEQUENTIAL, step))((KEY, np.int32(3)), keys)
    loops_when_compiled = {"random_bits", "random_split", "random_fold_in", "threefry2x32"}
    assert not loops_when_compiled & {str(e.primitive) for e, _ in equations(program)}


def walk(carry, x):
    key, h = carry
    key, now = jax.random.split(key)
    h = jnp.tanh(h + x * jax.random.normal(now, h.shape))
    return (key, h), h


def test_keys_are_made_apart_from_what_is_drawn_with_them():
    """In one kernel, keys of a few steps would take minutes to compile, each within the next."""
    init, xs = (KEY, jnp.zeros((BATCH, UNITS))), np.ones((TIME, 1), np.float32)
    program = jax.make_jaxpr(functools.partial(SEQUENTIAL, walk))(init, xs)
    of_keys = [body for body in innermost_loops(program) if count(body, SHIFT)]
    assert of_keys
    assert all(count(body, APART) == 1 for body in of_keys)


def test_noise_leaves_a_step_without_products():
    xs = np.ones((TIME, 1), np.float32)
    init = (KEY, jnp.zeros((BATCH, 256)))  # enough numbers for any JAX
    program = jax.make_jaxpr(functools.partial(jaxrnn.scan, walk))(init, xs)
    (body,) = [body for body in innermost_loops(program) if count(body, TANH)]
    assert not count(body, SHIFT) + count(body, BITS)

    def loss(scan, h, xs):
        return sum_of_sines(scan(walk, (KEY, h), xs)[1])

    actual, expected = (
        jax.value_and_grad(functools.partial(loss, scan), (0, 1))(init[1], xs)
        for scan in (jaxrnn.scan, lax.scan)
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_bits_of_other_generators_stay_in_the_loop(impl):
    """They depend on how many keys there are at once."""
    key = jax.random.key(0, impl=impl)
    init, xs = (key, jnp.zeros((BATCH, UNITS))), np.ones((TIME, 1), np.float32)
    program = jax.make_jaxpr(functools.partial(jaxrnn.scan, walk))(init, xs)
    assert sum(count(body, BITS) for body in loops(program)) == 1
    assert_identical(jaxrnn.scan(walk, init, xs)[1], lax.scan(walk, init, xs)[1])


def test_what_a_gradient_keeps_of_a_mask_is_the_mask():
    run, p, xs = problem(noisy_elman, jax.random.key)
    split = functools.partial(run, SEQUENTIAL)
    _, backward = jax.vjp(lambda p, xs: split(p, xs)[1], p, xs)
    rows = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == (TIME, BATCH, UNITS)]
    dtypes = sorted(str(leaf.dtype) for leaf in rows)
    assert dtypes.count("bool") == 1
    assert "uint32" not in dtypes
