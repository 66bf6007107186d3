"""The table of scan bodies: everything that somebody may hand to `lax.scan`.

Beside the steps of `cases.py`, which any recurrent layer may look like, these are what an engine
that takes bodies apart has to survive: other ways to write the same layer, states that are not
vectors of floats, control flow, derivative rules of the user's own, odd dtypes and shapes.

A body is entered by its maker ``make(consts) -> f``, ``f`` as `lax.scan` takes it. All float
leaves of consts, init and xs are differentiated; axes have different lengths.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BATCH, TIME = 3, 7
FEATURES, UNITS, OUTPUTS = 2, 4, 5


class Operands(NamedTuple):
    """What a body is scanned with."""

    consts: Any
    init: Any
    xs: Any


@dataclasses.dataclass(frozen=True)
class Body:
    """A scan body with builders for its operands.

    Attributes:
        name: the name of its maker.
        make: ``consts -> f``.
        consts, init: ``Draw -> pytree`` of arrays.
        xs: the same, time-major, or None for a scan over nothing.
        compute_dtype: the narrowest dtype that values go through.
        second_order: whether `lax.scan` differentiates it twice.
        forward: whether `lax.scan` knows its jvp (a `custom_vjp` has none).
        reverse_mode: whether `lax.scan` can differentiate it backwards (a `while` can't).
    """

    name: str
    make: Callable[[Any], Callable]
    consts: Callable[["Draw"], Any]
    init: Callable[["Draw"], Any]
    xs: Callable[["Draw"], Any] | None
    compute_dtype: str
    forward: bool
    reverse_mode: bool

    def operands(self, time: int = TIME, seed: int = 0) -> Operands:
        """The operands of one problem; equal seeds give equal values."""
        draw = Draw(time, seed)
        return Operands(self.consts(draw), self.init(draw), self.xs and self.xs(draw))

    def run(self, scan: Callable, operands: Operands, time: int = TIME, **flags: Any):
        """Calls `scan` with this body."""
        consts, init, xs = operands
        return scan(self.make(consts), init, xs, time if xs is None else None, **flags)


class Draw:
    """Draws operands as JAX arrays."""

    def __init__(self, time: int, seed: int):
        self.time, self.seed = time, seed
        self._rng = np.random.default_rng(seed)

    def __call__(self, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
        """Normal values, small enough to keep tanh away from saturation."""
        return jnp.asarray(0.5 * self._rng.standard_normal(shape), dtype)

    def integers(self, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(high, size=shape), jnp.int32)

    def rows(self, *shape: int, **kwargs: Any) -> jax.Array:
        return self(self.time, *shape, **kwargs)


BODIES: dict[str, Body] = {}


def body(
    *, init, consts=lambda _: {}, xs=lambda d: d.rows(BATCH, FEATURES),
    compute_dtype="float32", forward=True, reverse_mode=True,
):  # fmt: skip
    """Enters the decorated maker of a body into `BODIES` under its own name."""

    def enter(make):
        name = make.__name__
        BODIES[name] = Body(name, make, consts, init, xs, compute_dtype, forward, reverse_mode)
        return make

    return enter


def layer(gates: int = 1, features: int = FEATURES, **kwargs: Any):
    return lambda d: {
        "w": d(features, gates * UNITS, **kwargs),
        "u": d(UNITS, gates * UNITS, **kwargs),
        "b": d(gates * UNITS, **kwargs),
    }


def state(*shape: int, **kwargs: Any):
    return lambda d: d(*(shape or (BATCH, UNITS)), **kwargs)


def two_states(d: Draw):
    return d(BATCH, UNITS), d(BATCH, UNITS)


def gates(z, c):
    i, f, g, o = z
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def elman(p, x, h):
    return jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])


# One layer, many hands.


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


# What states are like.


@body(consts=layer(), init=lambda d: {"n": d.integers(5, BATCH), "seen": d.integers(2, BATCH) > 0,
                                      "h": d(BATCH, UNITS)})  # fmt: skip
def integers_and_booleans(p):
    def f(carry, x):
        n, seen = carry["n"], carry["seen"] ^ (x[:, 0] > 0)
        h = jnp.where(seen[:, None], elman(p, x, carry["h"]), carry["h"] * 0.5)
        h = h * (1 + 0.1 * (n % 3)[:, None])
        return {"n": n + seen, "seen": seen, "h": h}, {"n": n, "out": h @ p["u"]}

    return f


@body(consts=layer(), init=lambda d: tuple(d(BATCH, UNITS) for _ in range(5)))
def swapped_and_passed_through(p):
    """A ring of three states, one passed through, one that nobody reads."""

    def f(carry, x):
        a, b, c, kept, _ = carry
        new = jnp.tanh(x @ p["w"] + c @ p["u"] + kept)
        return (new, a, b, kept, x @ p["w"]), a @ p["u"]

    return f


@body(consts=layer(), init=two_states)
def swapped_each_step(p):
    def f(carry, x):
        a, b = carry
        return (b, jnp.tanh(a @ p["u"] + x @ p["w"])), (a @ p["u"], kept_apart(b))

    def kept_apart(b):
        return b * p["b"]

    return f


@body(consts=layer(), init=lambda d: (d(BATCH, UNITS), layer()(d)))
def params_as_carry(p):
    """Weights that change: a fast-weight network, by a gradient inside."""

    def f(carry, x):
        h, q = carry
        gradient = jax.grad(lambda q: (elman(q, x, h) ** 2).mean())(q)
        q = jax.tree.map(lambda v, g: v - 0.1 * g, q, gradient)
        h = elman(q, x, h) + x @ p["w"]
        return (h, q), h

    return f


@body(consts=layer(), init=lambda d: (d(BATCH, UNITS), layer()(d)))
def params_passed_as_carry(p):
    """Weights that do not change but go through the carry, as in module libraries."""

    def f(carry, x):
        h, q = carry
        h = elman(q, x, h) + x @ p["w"]
        return (h, q), h @ q["u"]

    return f


@body(consts=layer(), init=state())
def output_ignores_state(p):
    def f(h, x):
        return h * 0.5 + (x @ p["w"]).sum(-1, keepdims=True), jnp.sin(x @ p["w"])

    return f


@body(consts=layer(), init=state())
def state_ignores_itself(p):
    """The new state is a function of the input alone."""

    def f(h, x):
        return jnp.tanh(x @ p["w"]), h @ p["u"]

    return f


@body(consts=layer(), init=state())
def no_output(p):
    def f(h, x):
        return elman(p, x, h), None

    return f


@body(consts=layer(), init=state(), xs=lambda d: {"x": d.rows(BATCH, FEATURES), "no": None})
def constant_outputs(p):
    """Outputs that are literals, constants, rows of xs, the old state, or one thing twice."""

    def f(h, x):
        new = elman(p, x["x"], h)
        outs = (1.0, p["u"], x["x"], h, new, new, jnp.zeros((2,), jnp.int32), p["u"] @ p["u"])
        return new, (outs, None)

    return f


@body(consts=layer(), init=lambda d: (d(BATCH, UNITS), d(BATCH, UNITS)))
def constant_state(p):
    """After one step a state is a constant, and it feeds the other."""

    def f(carry, x):
        h, c = carry
        return (elman(p, x, h) + c, jnp.zeros_like(c)), h

    return f


@body(consts=layer(), init=lambda _: ())
def stateless(p):
    def f(carry, x):
        return carry, jnp.tanh(x @ p["w"])

    return f


@body(consts=lambda d: {"u": d(UNITS, UNITS)}, init=state(), xs=None)
def autonomous(p):
    def f(h, _):
        h = jnp.tanh(h @ p["u"])
        return h, h @ p["u"]

    return f


@body(consts=layer(dtype=jnp.complex64), init=state(dtype=jnp.complex64),
      compute_dtype="complex64")  # fmt: skip
def complex_state(p):
    def f(h, x):
        h = h @ p["u"] + x.astype(h.dtype) @ p["w"] + p["b"] * jnp.conj(h)
        h = h / (1 + jnp.abs(h))
        return h, (h @ p["u"]).real

    return f


@body(consts=lambda d: {"a": d(UNITS), "b": d(UNITS), "c": d(UNITS, FEATURES)},
      init=lambda d: lax.complex(d(BATCH, UNITS), d(BATCH, UNITS)),
      xs=lambda d: d.rows(BATCH, UNITS), compute_dtype="complex64")  # fmt: skip
def linear_recurrent_unit(p):
    """A complex diagonal state over real inputs, as in LRU and S4D."""

    def f(h, x):
        decay = jnp.exp(lax.complex(-jnp.abs(p["a"]), p["b"]))
        h = decay * h + x
        return h, h.real @ p["c"] + jnp.abs(h).sum()

    return f


# What an algebra might get wrong.


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


# Odd dtypes and shapes.


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


# Rules and control flow inside.


@jax.custom_jvp
def own_tanh(x):
    return jnp.tanh(x)


@own_tanh.defjvp
def _own_tanh_jvp(primals, tangents):
    y = own_tanh(primals[0])
    return y, tangents[0] * (1 - y * y)


@jax.custom_jvp
def spike(x):
    """A threshold with the slope of something smooth, as in spiking networks."""
    return (x > 0).astype(x.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    return spike(primals[0]), tangents[0] / (1 + jnp.abs(primals[0])) ** 2


@jax.custom_vjp
def straight_through(x, w):
    """A product that is rounded, with a gradient that is not that of rounding."""
    return jnp.round(4 * (x @ w)) / 4


def _straight_through_forward(x, w):
    return straight_through(x, w), (x, w)


def _straight_through_backward(kept, g):
    x, w = kept
    return 0.5 * g @ w.T, 3.0 * x.T @ g


straight_through.defvjp(_straight_through_forward, _straight_through_backward)


@jax.custom_vjp
def clipped_gradient(x):
    return x


clipped_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@body(consts=layer(), init=state())
def custom_jvp_inside(p):
    def f(h, x):
        h = own_tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, own_tanh(jax.nn.relu(h @ p["u"]))

    return f


@body(consts=layer(), init=two_states)
def spiking(p):
    """A leaky integrate-and-fire layer."""

    def f(carry, x):
        v, s = carry
        v = 0.9 * v * (1 - s) + x @ p["w"] + s @ p["u"] + p["b"]
        s = spike(v)
        return (v, s), s @ p["u"]

    return f


@body(consts=layer(), init=state(), forward=False)
def custom_vjp_inside(p):
    def f(h, x):
        h = jnp.tanh(straight_through(x, p["w"]) + clipped_gradient(h @ p["u"]) + p["b"])
        return h, straight_through(h, p["u"])

    return f


@body(consts=layer(), init=state())
def inner_scan(p):
    """Pondering: the recurrent product three times at each step, and a scan over the input."""

    def f(h, x):
        def ponder(v, _):
            return jnp.tanh(v @ p["u"] + x @ p["w"]), v @ p["u"]

        h, seen = lax.scan(ponder, h, None, 3)
        total, _ = lax.scan(lambda a, b: (a + jnp.sin(b), None), jnp.zeros(BATCH), x.T)
        return h, (seen, total)

    return f


@body(consts=layer(), init=state())
def inner_cond(p):
    def f(h, x):
        h = lax.cond(
            x.sum() > 0,
            lambda: elman(p, x, h),
            lambda: 0.5 * h + x @ p["w"],
        )
        chosen = lax.switch((x[0, 0] > 0).astype(int) + (x[1, 0] > 0), [
            lambda v: v @ p["u"], jnp.sin, lambda v: v + p["b"],
        ], h)  # fmt: skip
        return h, (chosen, lax.cond(x[0, 1] > 0, lambda: x @ p["w"], lambda: jnp.ones_like(h)))

    return f


@body(consts=layer(), init=state(), reverse_mode=False)
def inner_while(p):
    """Another number of rounds at each step."""

    def f(h, x):
        def more(loop):
            return (loop[0] < 3) & (jnp.abs(loop[1]).sum() > 2.5)

        _, h = lax.while_loop(more, lambda loop: (loop[0] + 1, elman(p, x, loop[1])), (0, h))
        rounds, _ = lax.while_loop(
            lambda loop: loop[1] > 0.1, lambda loop: (loop[0] + 1, loop[1] / 2), (0, x[0, 0])
        )
        return elman(p, x, h), rounds

    return f


@body(consts=layer(), init=state())
def inner_checkpoint(p):
    @jax.checkpoint
    def cell(h, x):
        return elman(p, x, h)

    def f(h, x):
        h = cell(h, x)
        return h, jax.checkpoint(lambda h: jnp.sin(h @ p["u"]))(h)

    return f


@body(consts=layer(), init=state())
def inner_fori_and_updates(p):
    """A state written to at an index that changes, and a gather from it."""

    def f(h, x):
        h = h.at[:, 0].set(jnp.tanh(x @ p["w"])[:, 1])
        h = lax.fori_loop(0, 2, lambda i, v: v.at[:, i].add(x[:, i]), h)
        h = elman(p, x, lax.dynamic_update_slice_in_dim(h, x, 1, axis=1))
        return h, jnp.take_along_axis(h, jnp.argsort(x, axis=-1), axis=-1)

    return f


@body(consts=layer(), init=state())
def vmapped_inside(p):
    def f(h, x):
        h = jax.vmap(lambda h, x: jnp.tanh(p["w"].T @ x + p["u"].T @ h))(h, x)
        return h, jax.vmap(jnp.outer)(h, x)

    return f


@body(consts=layer(), init=state())
def stopped_gradient(p):
    def f(h, x):
        h = elman(p, x, lax.stop_gradient(h))
        return h, lax.stop_gradient(h) @ p["u"]

    return f


@body(consts=layer(), init=lambda d: (jax.random.key(d.seed), d(BATCH, UNITS)))
def noise_by_key(p):
    """A typed random key in the state; dropout on the state and noise on the output."""

    def f(carry, x):
        key, h = carry
        key, one, other = jax.random.split(key, 3)
        h = elman(p, x, h * jax.random.bernoulli(one, 0.8, h.shape))
        return (key, h), h @ p["u"] + jax.random.normal(other, h.shape)

    return f


@body(consts=layer(), init=lambda d: (jax.random.key(d.seed, impl="rbg"), d(BATCH, UNITS)))
def noise_by_rbg_key(p):
    return noise_by_key(p)


@body(consts=layer(), init=state(),
      xs=lambda d: (jax.random.split(jax.random.key(d.seed, impl="rbg"), d.time),
                    d.rows(BATCH, FEATURES)))  # fmt: skip
def noise_by_rbg_keys_of_xs(p):
    """Random bits that must not be drawn for many steps at once: rbg's depend on batching."""

    def f(h, x):
        key, x = x
        h = elman(p, x * jax.random.bernoulli(key, 0.7, x.shape), h)
        return h, jax.random.uniform(key, (BATCH, UNITS)) @ p["u"]

    return f


@body(
    consts=lambda d: layer()(d) | {"key": jax.random.key(d.seed)},
    init=lambda d: (d(BATCH, UNITS), 0),
)
def noise_by_step_number(p):
    """A key closed over, folded with a counter that is a Python number at first."""

    def f(carry, x):
        h, n = carry
        noise = jax.random.normal(jax.random.fold_in(p["key"], n), x.shape)
        h = elman(p, x + noise, h)
        return (h, n + 1), h

    return f
