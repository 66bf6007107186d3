"""What an algebra might get wrong."""

import jax
import jax.numpy as jnp
from jax import lax

from bodies.table import BATCH, FEATURES, UNITS, body, elman, gates, layer, state, two_states


@body(consts=lambda d: layer(2)(d) | {"v": d(UNITS, UNITS)}, init=two_states)
def sums_in_many_roles(p):
    """One pre-activation that is split, added on, multiplied, and given out whole."""

    def f(carry, x):
        h, c = carry
        z = p["b"] + (h @ p["u"] + (x @ p["w"] + p["b"])) + c.sum(-1, keepdims=True)
        a, b = jnp.split(z, 2, axis=-1)
        h = jnp.tanh(a - b) + z[:, 1 : UNITS + 1] * z[:, ::2]
        c = 0.1 * c - (x @ p["w"])[:, :UNITS] @ p["v"] - c @ p["v"]
        return (jnp.tanh(h), c), (z, z[..., None] * a[:, None, :])

    return f


@body(consts=lambda d: layer(4)(d) | {"s": d(UNITS, 4)}, init=two_states)
def gates_by_index(p):
    """Gates on an axis of their own, each scaled by a number that is made of the state."""

    def f(carry, x):
        h, c = carry
        z = (x @ p["w"] + h @ p["u"]).reshape(BATCH, 4, UNITS)
        z = z * (h @ p["s"])[..., None] + p["b"].reshape(4, UNITS)
        h, c = gates([z[:, n] for n in range(4)], c)
        return (h, c), h

    return f


@body(consts=layer(4), init=state())
def ranges_of_scaled_sums(p):
    """Taken along the last axis and along that of the samples, and arranged anew."""

    def f(h, x):
        z = (x @ p["w"] + h @ p["u"] + p["b"]) * h[:, :1]
        two, one, other = z[:, : 2 * UNITS], z[:, 2 * UNITS : 3 * UNITS], z[:, 3 * UNITS :]
        pairs = two.reshape(BATCH, 2, UNITS)
        rows = (x @ p["w"][:, :UNITS] + h @ p["u"][:, :UNITS]) * h[:, 1:2]
        turned = jnp.concatenate([rows[1:], rows[:1]])
        return jnp.tanh(pairs.sum(axis=1) + one - other + turned), pairs

    return f


@body(consts=lambda d: {"k": d(2 * UNITS + 2 * FEATURES, UNITS), "v": d(UNITS + FEATURES, UNITS)},
      init=two_states)  # fmt: skip
def concatenations_in_many_roles(p):
    """Interleaved, repeated, nested, along another axis, and read as a whole."""

    def f(carry, x):
        h, c = carry
        joined = jnp.concatenate([x, h, jnp.concatenate([c, x], axis=1)], axis=1)
        new = jnp.tanh(joined @ p["k"] + jnp.concatenate([h, x], axis=1) @ p["v"])
        rows = jnp.concatenate([h, x @ p["v"][:FEATURES]], axis=0) @ p["k"][:UNITS]
        c = jnp.tanh(rows[:BATCH] + rows[BATCH:] + p["k"].T[:, :BATCH].T)
        return (new, c), joined

    return f


@body(consts=lambda d: {"u": d(UNITS, UNITS), "v": d(UNITS, 2), "w": d(2, UNITS)}, init=two_states)
def products_of_one_state(p):
    """Equal, transposed, low-rank and chained weights, some of the products needed elsewhere."""

    def f(carry, x):
        h, c = carry
        a, b, low = h @ p["u"], h @ p["u"].T, h @ p["v"]
        chained = (h @ p["u"]) @ p["u"] + low @ p["w"]
        new = jnp.tanh(a * b + chained + (x + low) @ p["w"])
        c = jnp.tanh(c @ p["u"] + new @ p["u"])
        return (new, c), (a, h @ (p["u"] + 1.0), jnp.einsum("bi,bj->bij", h, c) @ p["u"])

    return f


@body(
    consts=lambda d: {
        "w": d(2 * UNITS, FEATURES),
        "u": d(2, UNITS, UNITS),
        "v": d(UNITS, BATCH),
        "r": d(2, UNITS, 3),
    },
    init=two_states,
)
def products_the_other_way_round(p):
    """Weights on the left and of three axes; results cut, selected, or wanted as they lie."""

    def f(carry, x):
        h, c = carry
        precision = (lax.Precision.HIGHEST, lax.Precision.DEFAULT)
        z = jnp.einsum("ui,bi->ub", p["w"], x, precision=precision)
        a, b = jnp.split(jnp.where(z > 0, z, jnp.expm1(z)) * 2.0, 2)
        new, old = jnp.einsum("gui,bi->gub", p["u"], h)
        gate = jax.nn.sigmoid(a + new * p["v"])[::-1].T
        rows = jnp.einsum("guk,bsu->gkbs", p["r"], jnp.stack([h, c], axis=1))
        h = jnp.tanh(gate * h + (b - old).T * rows[1, 0, :, :1])
        c = jnp.tanh(lax.clamp(-0.5, (b + c.T).T, 0.5)) + rows[:, 2].sum((0, 2))[:, None]
        return (h, 0.3 * c), (z, rows[0], (p["u"][0] @ h.T)[1:], p["u"][1] @ x[0].repeat(2))

    return f


@body(
    consts=lambda d: {"u": d(UNITS, UNITS), "memory": d(BATCH, UNITS, UNITS)},
    init=lambda d: (d(BATCH, UNITS), d(BATCH, UNITS, UNITS)),
    xs=lambda d: d.rows(BATCH, UNITS),
)
def matrix_memory(p):
    """Linear attention: a state that is a matrix per sample, products between states."""

    def f(carry, x):
        h, m = carry
        key = x @ p["u"]
        m = 0.9 * m + key[:, :, None] * x[:, None, :]
        h = jnp.tanh(jnp.einsum("bij,bj->bi", m, h) + jnp.einsum("bij,bj->bi", p["memory"], x))
        return (h, m), jnp.einsum("bi,bij->bj", x @ p["u"].T, m)

    return f


@body(consts=layer(), init=state())
def calls_without_results(p):
    """Control flow that gives nothing back."""

    def f(h, x):
        jax.checkpoint(lambda _: None)(h)
        lax.cond(x[0, 0] > 0, lambda: None, lambda: None)
        lax.scan(lambda c, _: (c, None), (), None, 3)
        h = elman(p, x, h)
        return h, (None, ())

    return f


@body(consts=lambda d: layer()(d) | {"k": d.integers(5, UNITS, UNITS)},
      init=lambda d: (d(BATCH, UNITS), d.integers(5, BATCH, UNITS)))  # fmt: skip
def integer_products(p):
    """Products of integers, which wrap around and have no derivative."""

    def f(carry, x):
        h, n = carry
        n = n @ p["k"] + jnp.concatenate([n, n], axis=1)[:, UNITS:] @ p["k"] * 7
        h = elman(p, x, h) * (n % 2)
        return (h, n), (n @ p["k"]) % 11

    return f


@body(consts=layer(2), init=state())
def extreme_of_one_activated_part(p):
    """Of what is activated and then split one part is kept for the gradient, and one is not."""

    def f(h, x):
        z = x @ p["w"] + h @ p["u"]
        first, second = lax.split(jnp.tanh(z), (UNITS, UNITS), 1)
        h = second * first.max(-1, keepdims=True) + 0.1 * z[:, :UNITS]
        return h, h

    return f
