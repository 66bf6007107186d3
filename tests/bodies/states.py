"""What states are like."""

import jax
import jax.numpy as jnp
from jax import lax

from bodies.table import BATCH, FEATURES, UNITS, body, elman, layer, state, two_states


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


@body(consts=lambda d: layer()(d) | {"row": d(1, UNITS)}, init=lambda d: (d(BATCH, UNITS), d()))
def a_row_of_no_sample(p):
    """One output has a row for each sample, another a single one."""

    def f(carry, x):
        h, n = carry
        h, n = elman(p, x, h), 0.9 * n
        return (h, n), (h, n * p["row"])

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


@body(consts=layer(), init=state())
def shifted_states(p):
    """Units that meet their neighbours: padded, put together, and in a product."""

    def f(h, x):
        left = jnp.pad(h[:, 1:], ((0, 0), (0, 1)), constant_values=-1.0)
        right = jnp.concatenate([jnp.full((BATCH, 1), 0.5), h[:, :-1]], axis=1)
        new = jnp.tanh(jnp.logaddexp(h, left) - right**2 + x @ p["w"])
        return new, jnp.roll(h, 1, axis=1) @ p["u"]

    return f
