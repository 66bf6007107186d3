"""`vmap`, `checkpoint`, closures and rules of the user's own, as under `jax.lax.scan`."""

import functools

import jax
import jax.numpy as jnp
import pytest
from bodies import spike, straight_through
from gated import (
    ENGINE,
    FEATURES,
    TIME,
    UNITS,
    assert_agree,
    directions,
    draw,
    floats,
    loss,
    run,
    scalar_of,
)
from jax import lax
from jax.ad_checkpoint import checkpoint_name

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
        scales = jnp.array([0.5, 1.0, 1.5])  # thrice as large, the loss has no digits in float32
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


def test_second_derivatives_are_taken_of_the_rules_of_a_custom_vjp():
    """Such a function has no forward mode, but its rules have one."""

    @jax.custom_vjp
    def doubled(z):
        return jnp.tanh(z)

    def forward(z):
        return jnp.tanh(z), jnp.tanh(z)

    doubled.defvjp(forward, lambda y, g: (2 * g * (1 - y * y),))
    p, h, xs = floats()

    def second(scan, u, h, xs):
        def of(u, h):
            def body(h, x):
                inner = scan(lambda h, _: (doubled(h), None), h, length=2)[0]
                h = doubled(x @ p["w"][:, :UNITS] + inner @ u)
                return h, h @ p["v"]

            return scalar_of(scan(body, h, xs))

        gradient = jax.grad(of, (0, 1))
        return jax.jvp(gradient, (u, h), directions((u, h)))

    assert_agree(second, p["u"][:, :UNITS], h, xs, scale=50)


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
