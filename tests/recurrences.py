"""Recurrences that one kernel can run, in every form that fits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxrnn

TIME, UNITS, FEATURES = 5, 16, 8


def draw(*shape, seed=0, scale=0.4):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def matrix(gates=1, rows=UNITS, seed=1):
    return draw(rows, gates * UNITS, seed=seed, scale=0.3)


def lstm(split):
    def make(p):
        def body(carry, x):
            h, c = carry
            i, f, g, o = split(p, x, h)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        return body

    return make


def activated_before_the_split(p):
    def body(carry, x):
        h, c = carry
        z = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = (f + 1) * c + (i + 1) * g
        h = (o + 1) * jnp.tanh(c) * 0.3
        return (h, c), h

    return body


def gru(p):
    def body(h, x):
        xz, xr, xh = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
        hz, hr, hh = jnp.split(h @ p["u"], 3, axis=-1)
        z = jax.nn.sigmoid(xz + hz)
        h = z * h + (1 - z) * jnp.tanh(xh + jax.nn.sigmoid(xr + hr) * hh)
        return h, h

    return body


def elman(make_new):
    def make(p):
        def body(h, x):
            h = make_new(p, x @ p["w"] + p["b"], h)
            return h, h

        return body

    return make


def normalised(z):
    z = z - z.mean(-1, keepdims=True)
    return z * lax.rsqrt((z * z).mean(-1, keepdims=True) + 1e-3)


def masked(p):
    def body(h, x):
        x, keep = x[:, :-1], x[:, -1] > 0
        new = jnp.tanh(x @ p["w"][:-1] + h @ p["u"])
        h = jnp.where(keep[:, None], new, h)
        return h, jnp.where(keep[:, None], new, 0)

    return body


def readout(p):
    def body(h, x):
        h = jnp.tanh(x @ p["w"] + jnp.tanh(h @ p["u"]) @ p["v"])
        return h, (h @ p["v"], h)

    return body


def with_a_constant_per_sample(p):
    def body(h, x):
        h = jnp.tanh(x @ p["w"] + (h * p["drop"]) @ p["u"])
        return h, h

    return body


def transposed_weights(p):
    def body(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"].T)
        return h, h

    return body


def sliced(p):
    def body(h, x):
        z = x @ p["w"] + h @ p["u"]
        h = jnp.tanh(z[:, :UNITS]) * jax.nn.sigmoid(z[:, UNITS:])
        return h, h

    return body


# Name: gates, states, make(params) -> body.
FORMS = {
    "lstm": (
        4, 2, lstm(lambda p, x, h: jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 4, axis=-1))
    ),
    "lstm of four matmuls": (
        4, 2,
        lstm(lambda p, x, h: [
            x @ w + h @ u
            for w, u in zip(jnp.split(p["w"], 4, -1), jnp.split(p["u"], 4, -1), strict=True)
        ]),
    ),
    "lstm over both side by side": (
        4, 2,
        lstm(lambda p, x, h: jnp.split(
            jnp.concatenate([x, h], -1) @ jnp.concatenate([p["w"], p["u"]]), 4, axis=-1
        )),
    ),
    "activated before the split": (4, 2, activated_before_the_split),
    "gru": (3, 1, gru),
    "tanh": (1, 1, elman(lambda p, z, h: jnp.tanh(z + h @ p["u"]))),
    "custom_jvp": (1, 1, elman(lambda p, z, h: jax.nn.relu(z + h @ p["u"]) * 0.5)),
    "softmax": (1, 1, elman(lambda p, z, h: jax.nn.softmax(z + h @ p["u"]))),
    "layer norm": (1, 1, elman(lambda p, z, h: jnp.tanh(normalised(z + h @ p["u"]) * p["b"]))),
    "no product in the loop": (1, 1, elman(lambda p, z, h: jax.nn.sigmoid(z) * h + p["b"])),
    "masked": (1, 1, masked),
    "two products": (1, 1, readout),
    "a constant per sample": (1, 1, with_a_constant_per_sample),
    "transposed weights": (1, 1, transposed_weights),
    "slices": (2, 1, sliced),
}  # fmt: skip


def operands(form, batch=3):
    gates, states, make = FORMS[form]
    p = {
        "w": matrix(gates, FEATURES),
        "u": matrix(gates, seed=2),
        "v": matrix(seed=3),
        "b": draw(gates * UNITS, seed=4),
        "drop": (draw(batch, UNITS, seed=5) > 0) * 2.0,
    }
    init = [draw(batch, UNITS, seed=6 + i) for i in range(states)]
    return make, p, tuple(init) if states > 1 else init[0], draw(TIME, batch, FEATURES, seed=9)


def scalar_of(tree):
    return sum(jnp.sum(jnp.sin(leaf * (1 + i))) for i, leaf in enumerate(jax.tree.leaves(tree)))


def loss(make, scan, p, init, xs):
    return scalar_of(scan(make(p), init, xs))


FUSED = functools.partial(jaxrnn.scan, method="fused")


def flagged(p):
    def body(carry, x):
        h, on, n = carry
        h = jnp.where(on[:, None], jnp.tanh(jnp.array(x) @ p["w"] + jnp.copy(h) @ p["u"]), h)
        on = on | (h.max(1) > 0.5)
        return (h, on, n + on), (on, n)

    return body
