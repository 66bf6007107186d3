"""One layer, many hands."""

import jax
import jax.numpy as jnp
from jax import lax

from bodies.table import (
    BATCH,
    FEATURES,
    OUTPUTS,
    UNITS,
    body,
    elman,
    gates,
    layer,
    state,
    two_states,
)


@body(consts=layer(4), init=two_states)
def lstm_split(p):
    def f(carry, x):
        h, c = carry
        h, c = gates(jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 4, axis=-1), c)
        return (h, c), h

    return f


@body(consts=layer(4), init=two_states)
def lstm_activated_before_the_split(p):
    """As the library's own cell: a gate is made from its share of one tanh."""

    def f(carry, x):
        h, c = carry
        z = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = (0.5 + 0.5 * f) * c + (0.5 + 0.5 * i) * g
        h = (0.5 + 0.5 * o) * jnp.tanh(c)
        return (h, c), h

    return f


@body(consts=layer(4), init=two_states)
def lstm_slices(p):
    def f(carry, x):
        h, c = carry
        z = jnp.dot(h, p["u"]) + jnp.dot(x, p["w"]) + p["b"]
        h, c = gates([z[:, i * UNITS : (i + 1) * UNITS] for i in range(4)], c)
        return (h, c), (h, c)

    return f


@body(
    consts=lambda d: {
        "w": d(4 * UNITS, FEATURES),
        "u": d(4 * UNITS, UNITS),
        "b": d(4 * UNITS),
    },
    init=two_states,
)
def lstm_columns(p):
    """As Equinox's: weights on the left, one sample at a time, under `vmap`."""

    def cell(carry, x):
        h, c = carry
        h, c = gates(jnp.split(p["w"] @ x + p["u"] @ h + p["b"], 4), c)
        return (h, c), h

    return jax.vmap(cell)


@body(
    consts=lambda d: {"w": d(FEATURES, 4, UNITS), "u": d(UNITS, 4, UNITS), "b": d(4, UNITS)},
    init=two_states,
)
def lstm_einsum(p):
    """An axis of its own for the gates, in front, and unpacked."""

    def f(carry, x):
        h, c = carry
        z = jnp.einsum("bi,igh->gbh", x, p["w"]) + jnp.einsum("bi,igh->gbh", h, p["u"])
        h, c = gates([*(z + p["b"][:, None])], c)
        return (h, c), h

    return f


@body(consts=lambda d: {g: layer()(d) for g in "ifgo"}, init=two_states)
def lstm_four_matmuls(p):
    def f(carry, x):
        h, c = carry
        h, c = gates([x @ q["w"] + h @ q["u"] + q["b"] for q in map(p.get, "ifgo")], c)
        return (h, c), h

    return f


@body(
    consts=lambda d: {"k": d(FEATURES + UNITS, 4 * UNITS), "b": d(4 * UNITS)},
    init=two_states,
)
def lstm_concatenated(p):
    def f(carry, x):
        h, c = carry
        z = jnp.concatenate([x, h], axis=-1) @ p["k"] + p["b"]
        h, c = gates(jnp.split(z, 4, axis=-1), c)
        return (h, c), h

    return f


@body(consts=lambda d: {"k": d(UNITS + FEATURES + 1, 4 * UNITS)}, init=two_states)
def lstm_concatenated_with_ones(p):
    """The state first, and the bias as a column of ones."""

    def f(carry, x):
        h, c = carry
        z = jnp.concatenate([h, x, jnp.ones((*x.shape[:-1], 1))], axis=-1) @ p["k"]
        h, c = gates(jnp.split(z, 4, axis=-1), c)
        return (h, c), h

    return f


@body(consts=layer(4), init=two_states)
def lstm_jitted(p):
    @jax.jit
    def linear(v, w):
        return jax.jit(jnp.dot)(v, w)

    @jax.jit
    def f(carry, x):
        h, c = carry
        z = linear(x, p["w"]) + linear(h, p["u"]) + p["b"]
        h, c = jax.jit(gates)(jnp.split(z, 4, axis=-1), c)
        return (h, c), h

    return f


@body(consts=layer(4), init=two_states)
def lstm_peephole_clipped(p):
    """Elementwise parameters in the recurrence, a clip and a reshape of the gates."""

    def f(carry, x):
        h, c = carry
        z = (x @ p["w"] + h @ p["u"] + p["b"]).reshape(*x.shape[:-1], 4, UNITS)
        peep = p["b"].reshape(4, UNITS)
        i, f_, g, o = (z[..., k, :] + peep[k] * c for k in range(4))
        c = jnp.clip(jax.nn.sigmoid(f_) * c + jax.nn.sigmoid(i) * jnp.tanh(g), -3.0, 3.0)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return f


@body(consts=layer(3), init=state())
def gru_reset_after(p):
    def f(h, x):
        xz, xr, xh = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
        hz, hr, hh = jnp.split(h @ p["u"], 3, axis=-1)
        z, r = jax.nn.sigmoid(xz + hz), jax.nn.sigmoid(xr + hr)
        h = z * h + (1 - z) * jnp.tanh(xh + r * hh)
        return h, h

    return f


@body(consts=layer(3), init=state())
def gru_reset_before(p):
    def f(h, x):
        xs = x @ p["w"] + p["b"]
        zr = jax.nn.sigmoid(xs[:, : 2 * UNITS] + h @ p["u"][:, : 2 * UNITS])
        z, r = jnp.split(zr, 2, axis=-1)
        n = jnp.tanh(xs[:, 2 * UNITS :] + (r * h) @ p["u"][:, 2 * UNITS :])
        h = (1 - z) * n + z * h
        return h, h

    return f


@body(consts=layer(), init=state())
def elman_cell(p):
    def f(h, x):
        h = elman(p, x, h)
        return h, h

    return f


@body(consts=lambda d: [layer(4)(d), layer(4, UNITS)(d), d(UNITS, OUTPUTS)],
      init=lambda d: [two_states(d), two_states(d)])  # fmt: skip
def stacked_lstm(p):
    """Two layers and a readout in one body, the lower state passed up with a residual."""

    def f(carry, x):
        new, v = [], x
        for q, (old_h, old_c) in zip(p[:2], carry, strict=True):
            z = v @ q["w"] + old_h @ q["u"] + q["b"]
            h, c = gates(jnp.split(z, 4, axis=-1), old_c)
            new.append((h, c))
            v = h if v.shape != h.shape else h + v
        return new, v @ p[2]

    return f


@body(consts=lambda d: {"w": d(FEATURES, UNITS), "a": d(UNITS)}, init=state())
def diagonal_affine(p):
    def f(h, x):
        h = p["a"] * h + x @ p["w"]
        return h, h

    return f


@body(consts=lambda d: layer()(d) | {"c": d(UNITS, OUTPUTS)}, init=state())
def affine_with_readout(p):
    """A linear state space model."""

    def f(h, x):
        h = h @ p["u"] + x @ p["w"]
        return h, h @ p["c"]

    return f


@body(consts=layer(), init=state(UNITS), xs=lambda d: d.rows(FEATURES))
def vectors(p):
    """States without a batch axis, weights on the left."""

    def f(h, x):
        h = jnp.tanh(p["w"].T @ x + p["u"].T @ h + p["b"])
        return h, h

    return f


@body(consts=lambda d: {"u": d(), "v": d()}, init=state(), xs=lambda d: d.rows())
def scalars(p):
    def f(h, x):
        h = jnp.tanh(p["u"] * h + p["v"] * x)
        return h, h.sum() * p["v"]

    return f


@body(consts=layer(), init=state())
def einsum_forms(p):
    """Weights first, transposed weights, and a contraction over two axes."""

    def f(h, x):
        z = jnp.einsum("kd,bk->bd", p["w"], x) + jnp.einsum("dk,bd->bk", p["u"], h)
        h = jnp.tanh(z + jnp.einsum("ij,bi,bj->b", p["u"], h, h)[:, None] + h @ p["u"].T)
        return h, jnp.einsum("bd,bk->dk", h, x)

    return f


@body(consts=layer(), init=state())
def products_with_a_number(p):
    """On either side of `dot_general`, where weights or rows are on the other."""

    def f(h, x):
        half, outer = x.dtype.type(0.5), (((), ()), ((), ()))
        w, x = lax.dot_general(half, p["w"], outer), lax.dot_general(x, half, outer)
        h = jnp.tanh(x @ w + h @ p["u"])
        return h, h

    return f


@body(
    consts=lambda d: {"u": d(UNITS, UNITS), "v": d(2, 128)},
    init=state(),
    xs=lambda d: (d.rows(), d.rows(BATCH, 2, 128)),
)
def products_over_no_axis_and_over_all(p):
    """A number of each step times a matrix, and a matrix contracted as a whole with the input's."""

    def f(h, x):
        scale, x = x
        scaled = jnp.tensordot(scale, p["u"], 0)
        z = jnp.einsum("bij,ij->b", x, p["v"])[:, None] + scaled.sum(0)
        h = jnp.tanh(z + h @ p["u"])
        return h, scaled

    return f


@body(
    consts=lambda d: {"w": d(FEATURES, 2, UNITS), "u": d(2, UNITS, 2, UNITS)},
    init=state(BATCH, 2, UNITS),
)
def block_heads(p):
    """Kernels of rank three and four, and one product per head."""

    def f(h, x):
        z = jnp.einsum("bk,khd->bhd", x, p["w"]) + jnp.einsum("bhd,hdge->bge", h, p["u"])
        h = jnp.tanh(z + jnp.einsum("bhd,hde->bhe", h, p["u"][:, :, 0]))
        return h, h.mean(1)

    return f


@body(consts=lambda d: {"w": d(3, FEATURES, UNITS), "u": d(3, UNITS, UNITS)},
      init=state(BATCH, 6, UNITS), xs=lambda d: d.rows(BATCH, 6, FEATURES))  # fmt: skip
def convolutional(p):
    def conv(v, w):
        return lax.conv_general_dilated(v, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def f(h, x):
        h = jnp.tanh(conv(x, p["w"]) + conv(h, p["u"]))
        return h, h

    return f


@body(consts=lambda d: layer()(d) | {"g": d(UNITS), "v": d(UNITS, UNITS)}, init=state())
def layer_norm(p):
    def f(h, x):
        z = x @ p["w"] + h @ p["u"]
        z = (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 0.1)
        h = jnp.tanh(z * p["g"] + p["b"])
        return h, jax.nn.softmax(h @ p["v"])

    return f


@body(consts=lambda d: layer()(d) | {"g": d(UNITS)}, init=state())
def weight_normalised(p):
    def f(h, x):
        u = p["g"] * p["u"] / jnp.linalg.norm(p["u"], axis=0)
        h = jnp.tanh(x @ (p["w"] @ u) + h @ u + p["b"])
        return h, h

    return f


@body(consts=lambda d: layer()(d) | {"table": d(9, FEATURES)}, init=state(),
      xs=lambda d: d.integers(9, d.time, BATCH))  # fmt: skip
def embedding(p):
    def f(h, token):
        h = elman(p, p["table"][token], h)
        return h, h @ p["w"].T @ p["table"].T

    return f


@body(consts=lambda d: layer()(d) | {"table": d(9, FEATURES)},
      init=lambda d: (d(BATCH, UNITS), d.integers(9, BATCH)), xs=None)  # fmt: skip
def decoder(p):
    """Takes nothing: the token that it picked last comes back through the embedding."""

    def f(carry, _):
        h, token = carry
        h = elman(p, p["table"][token], h)
        logits = h @ p["w"].T @ p["table"].T
        token = jnp.argmax(logits, axis=-1).astype(token.dtype)
        return (h, token), (token, logits)

    return f


@body(consts=lambda d: layer()(d) | {"memory": d(BATCH, 6, UNITS)}, init=state())
def attention(p):
    """Attends to a fixed memory from the state of the last step."""

    def f(h, x):
        weights = jax.nn.softmax(jnp.einsum("bd,bmd->bm", h, p["memory"]))
        context = jnp.einsum("bm,bmd->bd", weights, p["memory"])
        h = elman(p, x, h + context)
        return h, weights

    return f
