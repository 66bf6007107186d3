"""Odd dtypes and shapes."""

import jax
import jax.numpy as jnp
from jax import lax

from bodies.table import BATCH, FEATURES, UNITS, body, elman, gates, layer, state


@body(consts=layer(4, dtype=jnp.bfloat16), xs=lambda d: d.rows(BATCH, FEATURES, dtype=jnp.bfloat16),
      init=lambda d: (d(BATCH, UNITS, dtype=jnp.bfloat16), d(BATCH, UNITS)),
      compute_dtype="bfloat16")  # fmt: skip
def bfloat16_lstm(p):
    """Computes in bfloat16; one state is kept in float32."""

    def f(carry, x):
        h, c = carry
        z = x @ p["w"] + h @ p["u"] + p["b"]
        h, c = gates(jnp.split(z.astype(jnp.float32), 4, axis=-1), c)
        return (h.astype(jnp.bfloat16), c), h

    return f


@body(consts=layer(3, dtype=jnp.float16), init=state(dtype=jnp.float16),
      xs=lambda d: d.rows(BATCH, FEATURES, dtype=jnp.float16), compute_dtype="float16")  # fmt: skip
def float16_gru(p):
    """Float16 with sums in float32."""

    def f(h, x):
        dot = lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32)  # noqa: E731
        xz, xr, xh = jnp.split(dot(x, p["w"]) + p["b"], 3, axis=-1)
        hz, hr, hh = jnp.split(dot(h, p["u"]), 3, axis=-1)
        z, r = jax.nn.sigmoid(xz + hz), jax.nn.sigmoid(xr + hr)
        new = z * h + (1 - z) * jnp.tanh(xh + r * hh)
        return new.astype(h.dtype), new

    return f


@body(consts=layer(features=0), init=state(), xs=lambda d: d.rows(BATCH, 0))
def no_features(p):
    def f(h, x):
        h = elman(p, x, h)
        return h, x @ p["w"]

    return f


@body(consts=layer(), init=state(0, UNITS), xs=lambda d: d.rows(0, FEATURES))
def no_samples(p):
    def f(h, x):
        h = elman(p, x, h)
        return h, h @ p["u"]

    return f


@body(consts=layer(), init=state())
def precisions(p):
    def f(h, x):
        with jax.default_matmul_precision("float32"):
            z = x @ p["w"]
        z = z + jnp.dot(h, p["u"], precision=lax.Precision.HIGHEST)
        h = jnp.tanh(z + jnp.dot(h, p["u"], precision=lax.Precision.DEFAULT))
        return h, h @ p["u"]

    return f
