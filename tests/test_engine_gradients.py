"""Derivatives of the engine are those of `jax.lax.scan`, in every mode and order."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bodies import BODIES
from gated import (
    BATCH,
    ENGINE,
    FEATURES,
    UNITS,
    assert_agree,
    directions,
    draw,
    floats,
    loss,
    operands,
    run,
    scalar_of,
)
from helpers import assert_same
from jax import lax
from jax.test_util import check_grads

import jaxrnn

# One argument alone: the tangents of the others are symbolic zeros.


@pytest.mark.parametrize("name", ["w", "u", "b", "v", "h", "x"])
def test_derivatives_with_respect_to_one_argument(name):
    p, h, xs = floats()

    def derivatives(scan, value):
        def of(value):
            q = p | {name: value} if name in p else p
            return loss(scan, q, value if name == "h" else h, value if name == "x" else xs)

        return jax.value_and_grad(of)(value), jax.jvp(of, (value,), (jnp.cos(value),))

    assert_agree(derivatives, {**p, "h": h, "x": xs}[name])


@pytest.mark.parametrize(
    "choose",
    [
        lambda last, _: last["h"],
        lambda _, ys: ys["y"],
        lambda _, ys: ys["h"][1],
        lambda last, ys: (last["n"].astype(float), ys["n"] * 0.5),
    ],
    ids=["last_state", "readout", "one_step", "integers"],
)
def test_cotangents_of_some_results_alone(choose):
    p, init, xs = operands()

    def gradient(scan, p, h, xs):
        def of(p, h, xs):
            return scalar_of(choose(*run(scan, p, init | {"h": h}, xs)))

        return jax.grad(of, (0, 1, 2))(p, h, xs)

    assert_agree(gradient, p, init["h"], xs)


def test_integers_have_tangents_of_no_size():
    p, init, xs = operands()
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), init["n"])
    tangent = {"h": jnp.ones_like(init["h"]), "n": zeros}

    def tangents(scan):
        return jax.jvp(lambda init: run(scan, p, init, xs), (init,), (tangent,))[1]

    actual, expected = tangents(ENGINE), tangents(lax.scan)
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)
    both = [[tree[0]["h"], tree[1]["h"], tree[1]["y"]] for tree in (actual, expected)]
    assert_same(*both, scale=10)
    _, backward = jax.vjp(lambda init: run(ENGINE, p, init, xs)[0]["h"], init)
    assert backward(init["h"])[0]["n"].dtype == jax.dtypes.float0


def seen_by_the_host(c):
    return jax.pure_callback(np.sin, jax.typeof(c), c, vmap_method="sequential")


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize(
    "step", [jnp.sqrt, seen_by_the_host, lambda c: jnp.nextafter(c, 1.0)],
    ids=["infinite", "unknown", "none"],
)  # fmt: skip
def test_a_state_without_a_tangent_is_not_differentiated(step, mode):
    """Its step may have no derivative, or an infinite one, of which zero times makes NaN."""
    p, h, xs = floats()

    def jacobian(scan, u):
        def of(u):
            def body(carry, x):
                h, c, late = carry
                h = jnp.tanh(h @ u + late + c + x @ p["w"][:, :UNITS])
                return (h, step(c), h), (h, c)

            return scan(body, (h, jnp.zeros(()), h), xs)[1]

        return mode(of)(u)

    assert_agree(jacobian, p["u"][:, :UNITS])


# Second order, and other modes.


@pytest.mark.parametrize("remat", [False, True])
def test_forward_over_reverse(remat):
    def products(scan, *arguments):
        scan = functools.partial(scan, **{"remat": True} if remat and scan is ENGINE else {})
        gradient = jax.grad(functools.partial(loss, scan), (0, 1, 2))
        return jax.jvp(gradient, arguments, directions(arguments))

    assert_agree(products, *floats(), scale=50)


def test_reverse_over_reverse():
    def gradient(scan, *arguments):
        def squares(*arguments):
            inner = jax.grad(functools.partial(loss, scan), (0, 1))(*arguments)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(inner))

        return jax.grad(squares, (0, 1, 2))(*arguments)

    assert_agree(gradient, *floats(), scale=100)


def test_forward_over_forward():
    def tangents(scan, *arguments):
        def tangent(*arguments):
            of = functools.partial(loss, scan)
            return jax.jvp(of, arguments, directions(arguments))[1]

        return jax.jvp(tangent, arguments, directions(arguments, seed=8))

    assert_agree(tangents, *floats(), scale=50)


@pytest.mark.parametrize("modes", ["fff", "frf", "rrr"])
def test_third_order(modes):
    """Along a line, each derivative forwards or backwards; what a block reads of others moves."""

    def third(scan, *arguments):
        def of(scale):
            moved = jax.tree.map(lambda a, d: a + scale * d, arguments, directions(arguments))
            return loss(scan, *moved)

        for mode in modes:
            of = jax.grad(of) if mode == "r" else jax.jacfwd(of)
        return of(0.0)

    assert_agree(third, *floats(), scale=50)


def test_hessian():
    p, h, xs = floats()

    def hessian(scan, u):
        return jax.hessian(lambda u: loss(scan, p | {"u": u}, h, xs[:3]))(u)

    assert_agree(hessian, p["u"], scale=50)


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_jacobians(jacobian):
    p, h, xs = floats()

    def of(scan, h, b):
        def last(h, b):
            init = {"h": h, "n": jnp.arange(BATCH)}
            return run(scan, p | {"b": b}, init, xs)[0]["h"]

        return jacobian(last, (0, 1))(h, b)

    assert_agree(of, h, p["b"])


def test_linearize_once_and_apply_often():
    arguments = floats()
    one, two = directions(arguments), directions(arguments, seed=3)

    def applied(scan, *arguments):
        value, tangent = jax.linearize(functools.partial(loss, scan), *arguments)
        return value, tangent(*one), tangent(*two)

    actual, expected = (
        jax.jit(functools.partial(applied, scan))(*arguments) for scan in (ENGINE, lax.scan)
    )
    assert_same(actual, expected, scale=10)
    _, tangent = jax.linearize(functools.partial(loss, ENGINE), *arguments)
    assert_same(tangent(*one), expected[1], scale=10)


def test_a_vjp_applied_often():
    arguments = floats()

    def gradients(scan, *arguments):
        value, backward = jax.vjp(functools.partial(loss, scan), *arguments)
        return jax.vmap(backward)(jnp.arange(3.0) + value)

    assert_agree(gradients, *arguments)


def test_the_transpose_of_a_linear_scan():
    p, h, xs = floats()

    def linear(scan, h, xs):
        def body(h, x):
            h = h @ p["u"][:, :UNITS] + x @ p["w"][:, :UNITS]
            return h, h @ p["v"]

        return scan(body, h, xs)

    def transposed(scan, h, xs):
        results = linear(scan, h, xs)
        return jax.linear_transpose(functools.partial(linear, scan), h, xs)(results)

    assert_agree(transposed, h, xs)


def test_derivatives_agree_with_differences():
    """No reference but the function itself, in float64."""
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda a: a.astype(jnp.float64), floats())
        of = jax.jit(functools.partial(loss, ENGINE))
        check_grads(of, arguments, order=1, atol=1e-5, rtol=1e-5)


# So many rows that results come from `lax.scan`, and only derivatives from the engine.


@pytest.mark.parametrize(
    "transformation",
    [
        lambda of: jax.grad(jax.jit(of), (0, 1, 2)),
        lambda of: lambda *a: jax.jvp(of, a, directions(a)),
        lambda of: lambda *a: jax.linearize(of, *a)[1](*directions(a)),
        lambda of: lambda *a: jax.jvp(jax.grad(of, (0, 1)), a, directions(a)),
        lambda of: lambda p, h, x: jax.vmap(jax.grad(of), (None, 0, None))(p, h[None], x),
        lambda of: (
            lambda p, h, x: jax.grad(lambda p: jax.vmap(of, (None, 0, None))(p, h[None], x)[0])(p)
        ),
        lambda of: jax.grad(jax.checkpoint(of), (0, 1, 2)),
    ],
    ids=["grad_of_jit", "jvp", "linearize", "second", "vmap_of_grad", "grad_of_vmap", "checkpoint"],
)
def test_many_rows(transformation):
    p, init, xs = operands(batch=128, time=3)

    def derivative(scan):
        def of(p, h, xs):
            return scalar_of(run(scan, p, init | {"h": h}, xs))

        return jax.jit(transformation(of))(p, init["h"], xs)

    assert_same(derivative(jaxrnn.scan), derivative(lax.scan), scale=10)


# So large a product for the inputs that each gate has one of its own (over 32 KiB a step).


def derivatives_of_wide_gates(scan, name, **flags):
    batch, time, units = 16, 5, 192
    gates = 3 if name == "gru_reset_after" else 4
    w, u = draw(FEATURES, gates * units), 0.1 * draw(units, gates * units, seed=1)
    p = {"w": w, "u": u, "k": jnp.concatenate([w, u]), "b": draw(gates * units)}
    h, xs = draw(batch, units), draw(time, batch, FEATURES)
    init = h if name == "gru_reset_after" else (h, h)

    def of(p, init, xs):
        return scalar_of(scan(BODIES[name].make(p), init, xs, **flags))

    return jax.jit(jax.value_and_grad(of, (0, 1, 2)))(p, init, xs)


# Neither blocks nor recomputing them change what it gives.
expected_of_wide_gates = functools.cache(functools.partial(derivatives_of_wide_gates, lax.scan))


@pytest.mark.parametrize("flags", [{}, {"reverse": True, "chunk": 2}, {"remat": True}])
@pytest.mark.parametrize("name", ["lstm_split", "gru_reset_after", "lstm_concatenated"])
def test_a_product_for_each_gate(name, flags):
    expected = expected_of_wide_gates(name, reverse=flags.get("reverse", False))
    assert_same(derivatives_of_wide_gates(jaxrnn.scan, name, **flags), expected, scale=10)


def contracted_axes(text, *shape):
    """Of all products of a shape in a compiled program, the axes contracted over."""
    product = rf"= f32\[{','.join(map(str, shape))}\]\S* dot\(.*"
    axes = r"lhs_contracting_dims=\{(\d)\}, rhs_contracting_dims=\{(\d)\}"
    return re.findall(product + axes, text)


@pytest.mark.parametrize(("columns", "expected"), [(128, ("1", "0")), (4, ("0", "0"))])
def test_gradients_of_wide_weights_are_products_of_transposes_that_lie_ready(columns, expected):
    """Rows are transposed before they are multiplied with what comes back, all steps at once."""
    w, xs = draw(FEATURES, columns), draw(4, BATCH, FEATURES)

    def of(w):
        return scalar_of(
            ENGINE(lambda h, x: (jnp.tanh(h + x @ w), None), jnp.ones((BATCH, columns)), xs)[0]
        )

    text = jax.jit(jax.grad(of)).lower(w).compile().as_text()
    assert contracted_axes(text, FEATURES, columns) == [expected]


@pytest.mark.parametrize(("gates", "expected"), [(1, ("0", "0")), (2, ("1", "0"))])
def test_one_transpose_serves_the_gradients_of_all_gates(gates, expected):
    """Of 400 features and 384 columns it does not pay, of twice as many it does."""
    ws, xs = [draw(400, 384, seed=i) for i in range(gates)], draw(4, BATCH, 400)

    def of(scan, ws):
        def step(h, x):
            for w in ws:
                h = jnp.tanh(h + x @ w)
            return h, None

        return scalar_of(scan(step, jnp.ones((BATCH, 384)), xs)[0])

    ours, theirs = (jax.jit(jax.grad(functools.partial(of, scan))) for scan in (ENGINE, lax.scan))
    program = ours.lower(ws).compile()
    assert contracted_axes(program.as_text(), 400, 384) == [expected] * gates
    assert_same(program(ws), theirs(ws), scale=10)
