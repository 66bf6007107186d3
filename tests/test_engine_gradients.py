"""Every transformation of JAX passes through the engine as it does through `jax.lax.scan`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bodies import BODIES, spike, straight_through
from helpers import assert_same
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.test_util import check_grads

import jaxrnn

BATCH, TIME, FEATURES, UNITS = 2, 5, 3, 4
# Two blocks of two steps and one of a single step; small as it is, the body is taken apart.
ENGINE = functools.partial(jaxrnn.scan, method="sequential", chunk=2)


def draw(*shape, seed=0):
    return jnp.asarray(0.5 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(batch=BATCH, time=TIME, seed=0):
    """Consts, init and xs of the bodies below."""
    p = {
        "w": draw(FEATURES, 2 * UNITS, seed=seed),
        "u": draw(UNITS, 2 * UNITS, seed=seed + 1),
        "b": draw(2 * UNITS, seed=seed + 2),
        "v": draw(UNITS, FEATURES, seed=seed + 3),
    }
    init = {"h": draw(batch, UNITS, seed=seed + 4), "n": jnp.arange(batch)}
    return p, init, draw(time, batch, FEATURES, seed=seed + 5)


def gated(p):
    """Two gates, an elementwise parameter in the recurrence, an integer state, and a readout."""

    def body(carry, x):
        h, n = carry["h"], carry["n"]
        f, g = jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 2, axis=-1)
        h = jax.nn.sigmoid(f + p["b"][:UNITS] * h) * h + jnp.tanh(g) * (1 + n[:, None] % 2)
        return {"h": h, "n": n + 1}, {"y": h @ p["v"], "h": h, "n": n}

    return body


def run(scan, p, init, xs):
    return scan(gated(p), init, xs)


def scalar_of(tree):
    total = 0.0
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            weights = np.cos(np.arange(leaf.size) + number, dtype=np.float32)
            total += jnp.sum(jnp.sin(leaf) * weights.reshape(leaf.shape))
    return total


def loss(scan, p, h, xs):
    """A scalar function of float arguments alone."""
    return scalar_of(run(scan, p, {"h": h, "n": jnp.arange(h.shape[0])}, xs))


def floats():
    p, init, xs = operands()
    return p, init["h"], xs


def directions(arguments, seed=9):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), arguments)


def assert_agree(function, *arguments, scale=10.0):
    """`function(scan, *arguments)` is the same for the engine and `lax.scan`."""
    ours = jax.jit(functools.partial(function, ENGINE))(*arguments)
    theirs = jax.jit(functools.partial(function, lax.scan))(*arguments)
    assert_same(ours, theirs, scale=scale)


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

    assert_agree(applied, *arguments)
    _, tangent = jax.linearize(functools.partial(loss, ENGINE), *arguments)
    assert_same(tangent(*one), applied(lax.scan, *arguments)[1], scale=10)


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
        check_grads(functools.partial(loss, ENGINE), arguments, order=1, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("flags", [{}, {"reverse": True, "chunk": 2}, {"remat": True}])
@pytest.mark.parametrize("name", ["lstm_split", "gru_reset_after", "lstm_concatenated"])
def test_a_product_for_each_gate(name, flags):
    batch, time, units = 16, 5, 192
    gates = 3 if name == "gru_reset_after" else 4
    w, u = draw(FEATURES, gates * units), 0.1 * draw(units, gates * units, seed=1)
    p = {"w": w, "u": u, "k": jnp.concatenate([w, u]), "b": draw(gates * units)}
    h, xs = draw(batch, units), draw(time, batch, FEATURES)
    init = h if name == "gru_reset_after" else (h, h)

    def of(scan, p, init, xs, **flags):
        return scalar_of(scan(BODIES[name].make(p), init, xs, **flags))

    def derivatives(scan, **flags):
        function = functools.partial(of, scan, **flags)
        return jax.jit(jax.value_and_grad(function, (0, 1, 2)))(p, init, xs)

    expected = derivatives(lax.scan, reverse=flags.get("reverse", False))
    assert_same(derivatives(jaxrnn.scan, **flags), expected, scale=10)


# vmap.


@pytest.mark.parametrize(
    "axes",
    [(0, None, None), (None, 0, None), (None, None, 2), (0, 1, 0), ({"w": 1, "v": 0}, None, 0)],
    ids=["params", "init", "xs", "all", "some_params"],
)
def test_vmap(axes):
    p, h, xs = floats()
    per_param = axes[0] if isinstance(axes[0], dict) else dict.fromkeys(p, axes[0])
    axes = ({name: per_param.get(name) for name in p}, *axes[1:])

    def several(leaf, axis):
        scales = jnp.arange(1.0, 4.0)
        return leaf if axis is None else jnp.stack([s * leaf for s in scales], axis)

    stacked = [{n: several(p[n], axes[0][n]) for n in p}, several(h, axes[1]), several(xs, axes[2])]

    def mapped(scan, *arguments):
        gradient = jax.value_and_grad(functools.partial(loss, scan), (0, 1, 2))
        return jax.vmap(gradient, axes)(*arguments)

    assert_agree(mapped, *stacked)


def test_vmap_of_vmap_of_a_single_vector():
    """A body without a batch axis, written for one sample, gets two of them."""
    p, _, _ = floats()
    h, xs = draw(2, 3, UNITS), draw(2, 3, TIME, FEATURES)

    def mapped(scan, p, h, xs):
        def single(p, h, xs):
            init = {"h": h[None], "n": jnp.zeros(1, int)}
            return scalar_of(run(scan, p, init, xs[:, None]))

        gradient = jax.value_and_grad(single, (0, 1, 2))
        return jax.vmap(jax.vmap(gradient, (None, 0, 0)), (None, 0, 0))(p, h, xs)

    assert_agree(mapped, p, h, xs)


def test_a_scan_inside_a_scan():
    """The outer body holds a whole engine, whose gradient is taken inside it."""
    p, h, xs = floats()

    def nested(scan, p, h, xs):
        def descend(p, x):
            value, gradient = jax.value_and_grad(functools.partial(loss, scan))(p, h, x)
            return jax.tree.map(lambda a, g: a - 0.01 * g, p, gradient), value

        return scan(descend, p, jnp.stack([xs, 2 * xs, -xs]))

    assert_agree(nested, p, h, xs, scale=50)


# checkpoint.


def dots_and_names(scan, p, h, xs):
    """A body with a name on one of its values."""

    def body(h, x):
        z = checkpoint_name(x @ p["w"] + h @ p["u"] + p["b"], "z")
        h = jnp.tanh(z[:, :UNITS] * jnp.sin(z[:, UNITS:]))
        return h, h @ p["v"]

    return scalar_of(scan(body, h, xs))


@pytest.mark.parametrize(
    "policy",
    [
        None,
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names("z"),
        jax.checkpoint_policies.everything_saveable,
    ],
    ids=["nothing", "dots", "names", "everything"],
)
def test_checkpoint_around_a_scan(policy):
    def gradient(scan, *arguments):
        of = jax.checkpoint(functools.partial(dots_and_names, scan), policy=policy)
        return jax.value_and_grad(of, (0, 1, 2))(*arguments)

    assert_agree(gradient, *floats())


# What a body closes over.


def test_gradients_of_values_made_inside_jit_and_closed_over():
    p, h, xs = floats()

    def gradient(scan, scale):
        @jax.jit
        def of(scale):
            q = jax.tree.map(lambda leaf: leaf * scale, p)
            x = xs * scale

            def body(carry, t):
                carry = jnp.tanh(x[t] @ q["w"][:, :UNITS] + carry @ q["u"][:, :UNITS] * scale)
                return carry, carry @ q["v"] * scale

            return scalar_of(scan(body, h * scale, jnp.arange(TIME)))

        return jax.value_and_grad(of)(scale), jax.hessian(of)(scale)

    assert_agree(gradient, jnp.float32(0.7), scale=50)


def test_levels_of_differentiation_do_not_mix():
    """The body closes over tracers of an outer jvp, vmap and grad at once."""
    p, h, xs = floats()

    def of(scan, b):
        def inner(scale, shift):
            def body(h, x):
                h = jnp.tanh(x @ (p["w"][:, :UNITS] * scale) + h @ p["u"][:, :UNITS] + shift)
                return h, h * scale

            return scalar_of(scan(body, h, xs))

        tangent = lambda shift: jax.jvp(lambda s: inner(s, shift), (1.5,), (1.0,))[1]  # noqa: E731
        return jax.vmap(jax.grad(tangent))(b)

    assert_agree(of, draw(3), scale=50)


# Rules of the user's own.


def test_a_custom_jvp_keeps_its_rule_to_second_order():
    """In forward mode; a gradient's own derivative loses such a rule under `lax.scan`, too."""

    def tangents(scan, *arguments):
        def of(p, h, xs):
            def body(h, x):
                h = 0.5 * h + spike(x @ p["w"][:, :UNITS] + h @ p["u"][:, :UNITS])
                return h, h @ p["v"]

            return scalar_of(scan(body, h, xs))

        def tangent(*arguments):
            return jax.jvp(of, arguments, directions(arguments))

        return jax.jvp(tangent, arguments, directions(arguments, seed=3))

    assert_agree(tangents, *floats(), scale=50)


def test_a_custom_vjp_that_takes_parameters_and_settings():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def scaled(factor, h, u):
        return jnp.tanh(h @ u)

    def forward(factor, h, u):
        return scaled(factor, h, u), (h, u)

    def backward(factor, kept, g):
        h, u = kept
        return factor * g @ u.T, factor * jnp.ones_like(h).T @ g

    scaled.defvjp(forward, backward)
    p, h, xs = floats()

    def gradient(scan, p, h, xs):
        def of(p, h, xs):
            def body(h, x):
                h = scaled(2.0, h, p["u"][:, :UNITS]) + straight_through(x, p["w"][:, :UNITS])
                return h, scaled(0.5, h, p["v"])

            return scalar_of(scan(body, h, xs))

        return jax.value_and_grad(of, (0, 1, 2))(p, h, xs)

    assert_agree(gradient, p, h, xs)


def test_a_custom_vjp_refuses_forward_mode_as_under_lax_scan():
    p, h, xs = floats()

    def tangent(scan):
        def of(w):
            return scan(lambda h, x: (h + straight_through(x, w), h @ p["u"]), h, xs)[0]

        w = p["w"][:, :UNITS]
        return jax.jvp(of, (w,), (w,))

    for scan in (lax.scan, ENGINE):
        with pytest.raises(TypeError, match="custom_vjp"):
            tangent(scan)


def test_reverse_mode_through_a_while_is_refused_as_under_lax_scan():
    p, h, xs = floats()

    def gradient(scan):
        def body(h, x):
            h = lax.while_loop(lambda h: h.sum() < 2, lambda h: h + 0.1, h @ p["u"][:, :UNITS])
            return h + x @ p["w"][:, :UNITS], None

        return jax.grad(lambda h: scan(body, h, xs)[0].sum())(h)

    for scan in (lax.scan, ENGINE):
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
            gradient(scan)
