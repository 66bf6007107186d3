"""Derivative rules of the user's own, where fewer calls of them would be noticed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from jax import lax

import jaxrnn

SAMPLES, UNITS, TIME = 3, 16, 8


def draw(*shape, seed=0):
    return np.float32(0.3 * np.random.default_rng(seed).normal(size=shape))


W, U, H = draw(UNITS, UNITS), draw(UNITS, UNITS, seed=1), draw(SAMPLES, UNITS, seed=2)
XS = draw(TIME, SAMPLES, UNITS, seed=3)
split = functools.partial(jaxrnn.scan, method="sequential", chunk=4)


def identity_with(backward):
    """The identity, whose cotangent g becomes `backward(w, g)`."""

    @jax.custom_vjp
    def identity(w):
        return w

    identity.defvjp(lambda w: (w, w), lambda w, g: (backward(w, g),))
    return identity


def step_with(rule):
    """A step that reads its weights through `rule`."""

    def step(h, x, w, u):
        h = jnp.tanh(x @ rule(w) + h @ rule(u))
        return h, h @ u

    return step


def gradient(scan, step, w=W, u=U):
    def loss(w, u):
        h, ys = scan(lambda h, x: step(h, x, w, u), H, XS)
        return jnp.sum(jnp.sin(ys)) + jnp.sum(h**2)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(w, u)


def printed(g):
    jax.debug.print("{}", g[0, 0])
    return g


@jax.custom_vjp
def pair(w):
    return w, 2 * w


pair.defvjp(lambda w: (pair(w), w), lambda w, g: (w * g[0] + jnp.concatenate([g[1][:3], w[3:]]),))

scaled = identity_with(lambda _, g: 2 * g)
clipped = identity_with(lambda _, g: jnp.clip(g, -0.1, 0.1))

LINEAR = {
    "identity": lambda _, g: g,
    "within_a_range": lambda w, g: jnp.where(jnp.abs(w) < 0.2, g, 0.0),
    "scaled_by_what_is_known": lambda w, g: -g * jnp.tanh(w) / jnp.sqrt(w.size) + 3 * g.T,
    "nothing": lambda _, g: jnp.zeros_like(g),
    "projected": lambda w, g: g - w * jnp.sum(w * g) / jnp.sum(w * w),
    "product": lambda w, g: w @ g @ w,
    "padded": lambda _, g: jnp.pad(g[1:, :-1], ((0, 1), (1, 0))),
    "by_a_linear_rule": lambda w, g: g * scaled(w),
}
OTHERS = {
    "clipped": lambda _, g: jnp.clip(g, -0.1, 0.1),
    "normalised": lambda _, g: g / jnp.linalg.norm(g),
    "signs": lambda _, g: jnp.sign(g),
    "squared": lambda _, g: g * g,
    "something_added": lambda w, g: g + 0.01 * w,
    "nothing_of_the_gradient": lambda w, _g: 0.01 * w,
    "selected_by_itself": lambda _, g: jnp.where(g > 0, g, 0.0),
    "a_padding_that_counts": lambda _, g: jnp.pad(g[1:], ((0, 1), (0, 0)), constant_values=0.1),
    "in_whole_numbers": lambda _, g: (10 * g).astype(int).astype(g.dtype),
    "printed": lambda _, g: printed(g),
    "of_few_digits": lambda _, g: g.astype(jnp.bfloat16).astype(g.dtype),
    "by_another_rule": lambda w, g: g * clipped(w),
}


def explain(rule):
    step, w, u = step_with(identity_with(rule)), jnp.asarray(W), jnp.asarray(U)
    return jaxrnn.explain_scan(lambda h, x: step(h, x, w, u), H, XS, method="sequential")


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_rule_of_weights_is_called_once(name):
    step = step_with(identity_with(LINEAR[name]))
    assert_same(gradient(split, step), gradient(lax.scan, step), scale=20)
    assert "once, from parameters alone\n  custom_vjp_call x2\n" in explain(LINEAR[name])


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_rule_of_weights_is_called_at_each_step(name):
    assert "a custom_vjp function or draw" in explain(OTHERS[name])


def test_a_rule_with_two_cotangents_of_which_one_is_not_all_linear():
    def step(h, x, w, u):
        half, whole = pair(w)
        h = jnp.tanh(x @ half + h @ u + x @ whole)
        return h, h @ u

    assert_same(gradient(split, step), gradient(lax.scan, step), scale=20)


def added_by(rule):
    """A sum of which the second term's cotangent, over samples, becomes `rule` of that."""

    @jax.custom_vjp
    def add(x, b):
        return x + b

    add.defvjp(lambda x, b: (x + b, None), lambda _, g: (g, rule(g.sum(0))))
    return add


SUMS = {"clipped": lambda g: jnp.clip(g, -0.1, 0.1), "linear": lambda g: 2 * g}
PLACES = {
    "into_the_state": lambda add, h, x, b: (jnp.tanh(add(x @ W, b) + h @ U), h),
    "of_inputs": lambda add, h, x, b: (jnp.tanh(add(x, b) @ W + h @ U), h),
    "under_jit": lambda add, h, x, b: (jnp.tanh(jax.jit(add)(x @ W, b) + h @ U), h),
    "under_a_checkpoint": lambda add, h, x, b: (
        jnp.tanh(jax.checkpoint(add)(x @ W, b) + h @ U),
        h,
    ),
    "after_the_loop": lambda add, h, x, b: (
        jnp.tanh(x @ W + h @ U),
        h * add(lax.stop_gradient(h @ W), b),
    ),
}


@pytest.mark.parametrize("options", [{"chunk": 4}, {"remat": True}], ids=["blocks", "remat"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SUMS)
def test_a_rule_of_inputs_is_called_at_each_step_where_weights_alone_have_a_gradient(
    name, place, options
):
    step = functools.partial(PLACES[place], added_by(SUMS[name]))

    def of_bias(scan):
        def loss(b):
            return jnp.sum(scan(lambda h, x: step(h, x, b), H, XS)[1])

        return jax.jit(jax.grad(loss))(jnp.zeros(UNITS))

    scan = functools.partial(jaxrnn.scan, method="sequential", **options)
    expected = of_bias(lax.scan)
    assert jnp.max(jnp.abs(expected)) > 0.1, "or it could be one call's"
    assert_same(of_bias(scan), expected, scale=20)


def test_a_mistake_in_a_rule_is_no_mistake_without_a_gradient():
    def of_another_shape(w, g):
        return g[1:]

    step = step_with(identity_with(of_another_shape))

    def run(scan):
        return scan(lambda h, x: step(h, x, W, U), H, XS)

    assert_same(run(split), run(lax.scan))
    with pytest.raises(ValueError, match="shape"):
        gradient(split, step)


@jax.custom_jvp
def seen_from_afar(x):
    return jnp.sin(x)


@seen_from_afar.defjvp
def _seen_from_afar_jvp(primals, tangents):
    jax.debug.print("rule {}", primals[0][0, 0])
    return jnp.sin(primals[0]), 2 * jnp.cos(primals[0]) * tangents[0]


@jax.custom_vjp
def seen_both_ways(x):
    return jnp.sin(x)


def _forward(x):
    jax.debug.print("forward {}", x[0, 0])
    return jnp.sin(x), x


def _backward(x, g):
    jax.debug.print("backward {}", g[0, 0])
    return (2 * jnp.cos(x) * g,)


seen_both_ways.defvjp(_forward, _backward)


@jax.custom_vjp
def seen_backwards(x):
    return jnp.sin(x)


seen_backwards.defvjp(lambda x: (jnp.sin(x), x), _backward)


@pytest.mark.parametrize("function", [seen_from_afar, seen_both_ways, seen_backwards])
def test_what_a_rule_prints_is_printed_at_each_step(function, capfd):
    def step(h, x, w, u):
        h = jnp.tanh(function(x @ w) + function(h @ u))
        return h, h @ u

    def run(scan):
        gradients = jax.block_until_ready(gradient(scan, step))
        jax.effects_barrier()
        lines = capfd.readouterr().out.splitlines()
        kinds = sorted(line.split()[0] for line in lines)
        return gradients, kinds, np.sort([float(re.split(" ", line)[1]) for line in lines])

    gradients, kinds, numbers = run(split)
    expected, kinds_expected, numbers_expected = run(lax.scan)
    assert kinds == kinds_expected
    np.testing.assert_allclose(numbers, numbers_expected, rtol=1e-3, atol=1e-5)
    assert_same(gradients, expected, scale=20)


@jax.custom_jvp
def other_once_differentiated(x):
    return jnp.sin(x)


@other_once_differentiated.defjvp
def _other_once_differentiated_jvp(primals, tangents):
    return 1.5 * jnp.sin(primals[0]), jnp.cos(primals[0]) * tangents[0]


def test_values_of_a_rule_are_taken_where_a_derivative_is():
    def value_and_gradient(scan):
        def loss(u):
            def body(h, x):
                h = jnp.tanh(other_once_differentiated(x @ W) + other_once_differentiated(h @ u))
                return h, h

            return jnp.sum(scan(body, H, XS)[1])

        return jax.jit(jax.value_and_grad(loss))(U)

    assert_same(value_and_gradient(split), value_and_gradient(lax.scan), scale=20)
