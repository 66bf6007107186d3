"""What states and constants look like."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from cases.table import (
    FEATURES,
    HEIGHT,
    OUTPUTS,
    UNITS,
    WIDTH,
    case,
    dense,
    lstm_update,
    one_state,
    two_states,
)


class Memory(NamedTuple):
    """A state container whose first field has the shape of the output."""

    h: Any
    c: Any


@case(
    params=lambda d: dense(d, 4) | {"v": d.normal(UNITS, OUTPUTS)},
    states=lambda d: {"h": d.normal(d.batch, UNITS), "c": d.normal(d.batch, UNITS)},
)
def dict_state(xp, p):
    def step(x, states):
        h, c = lstm_update(xp, x @ p["w"] + states["h"] @ p["u"] + p["b"], states["c"])
        return h @ p["v"], {"h": h, "c": c}

    return step


@case(params=lambda d: dense(d, 4), states=lambda d: Memory(*two_states(d)))
def namedtuple_state(xp, p):
    def step(x, states):
        h, c = lstm_update(xp, x @ p["w"] + states.h @ p["u"] + p["b"], states.c)
        return h, Memory(h, c)

    return step


@case(
    params=dense,
    states=lambda d: (
        d.normal(d.batch, UNITS),
        {"c": d.normal(d.batch, UNITS), "trace": (d.normal(d.batch, HEIGHT, WIDTH),)},
    ),
)
def nested_states(xp, p):
    def step(x, states):
        h, memory = states
        trace = 0.5 * memory["trace"][0] + x[:, None, :]
        c = 0.9 * memory["c"] + x @ p["w"] * trace.mean(axis=(1, 2))[:, None]
        h = xp.tanh(c + h @ p["u"] + p["b"])
        return h, (h, {"c": c, "trace": (trace,)})

    return step


@case(params=dense, states=lambda d: d.normal(d.batch, UNITS))
def bare_state(xp, p):
    """``initial_states`` is one array; the step sees a list of one."""

    def step(x, states):
        (h,) = states
        h = xp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, [h]

    return step


@case(params=lambda d: {"a": d.normal()}, states=lambda d: [d.normal(d.batch)])
def rank_1_state(xp, p):
    """States and outputs of shape [B]."""

    def step(x, states):
        mean = p["a"] * states[0] + x.mean(axis=-1)
        return mean, [mean]

    return step


@case(
    params=lambda d: {"a": d.normal(HEIGHT, WIDTH), "b": d.normal(WIDTH, WIDTH)},
    inputs=lambda d: d.normal(d.batch, d.time, HEIGHT, WIDTH),
    states=lambda d: [d.normal(d.batch, HEIGHT, WIDTH)],
)
def rank_3_state(xp, p):
    """A state with two spatial axes, mixed along one of them as a convolution does."""

    def step(x, states):
        (s,) = states
        s = xp.tanh(x + p["a"] * s + xp.roll(s, 1, axis=1) @ p["b"])
        return s, [s]

    return step


@case(params=dense, states=lambda d: [d.normal(d.batch, UNITS), d.integers(5, d.batch)])
def counter(xp, p):
    """An integer state, and an integer output beside a float one."""

    def step(x, states):
        h, n = states
        h = xp.tanh(x @ p["w"] + h @ p["u"] + 0.1 * n.astype(h.dtype)[:, None])
        return (h, n), [h, n + 1]

    return step


@case(
    params=dense,
    states=lambda d: [d.normal(d.batch, UNITS), d.integers(2, d.batch).astype(bool)],
)
def boolean_state(xp, p):
    def step(x, states):
        h, seen = states
        seen = seen | (x[:, 0] > 0.4)
        h = xp.where(seen[:, None], xp.tanh(x @ p["w"] + h @ p["u"]), h)
        return h, [h, seen]

    return step


@case(
    states=lambda d: [d.normal(d.batch, FEATURES) for _ in range(3)],
)
def swapped_states(xp, p):
    """Two states change places and a third is passed through."""

    def step(x, states):
        a, b, kept = states
        return a + kept, [b, xp.tanh(a + x), kept]

    return step


@case(params=dense, states=one_state, compute_dtype="bfloat16", smooth=False)
def bfloat16_compute(xp, p):
    """Computes and gives out bfloat16; the state is float32 and stays so."""

    def narrow(x):
        return x.astype(jnp.bfloat16)

    def step(x, states):
        z = narrow(x) @ narrow(p["w"]) + narrow(states[0]) @ narrow(p["u"]) + narrow(p["b"])
        h = xp.tanh(narrow(z))
        return h, [h]

    return step


@case(params=dense, states=lambda d: [d.normal(d.batch, UNITS).astype(jnp.bfloat16)],
      compute_dtype="bfloat16", smooth=False)  # fmt: skip
def bfloat16_state(xp, p):
    """Computes and gives out float32; the state is bfloat16 and stays so."""

    def step(x, states):
        h = xp.tanh(x @ p["w"] + states[0].astype(x.dtype) @ p["u"] + p["b"])
        return h, [h]

    return step


@case(
    inputs=lambda d: d.integers(HEIGHT, d.batch, d.time, 1),
    params=lambda d: dense(d) | {"table": d.normal(HEIGHT, FEATURES)},
    states=one_state,
)
def tokens(xp, p):
    """Integer inputs that index an embedding."""

    def step(x, states):
        h = xp.tanh(p["table"][x[:, 0]] @ p["w"] + states[0] @ p["u"])
        return h, [h]

    return step


# Constants, and states that cannot be held.


@case(
    params=lambda d: {"b": d.normal(UNITS)},
    states=one_state,
    constants=lambda d: [
        d.normal(FEATURES, UNITS),
        {"u": d.normal(UNITS, UNITS), "gain": d.normal(d.batch, UNITS)},
    ],
)
def constants(xp, p):
    """Weights and a per-sample gain come as constants, one of them a pytree."""

    def step(x, states):
        h, w, other = states
        h = xp.tanh(x @ w + (h * other["gain"]) @ other["u"] + p["b"])
        return h, [h]

    return step


@case(params=lambda d: {"w": d.normal(FEATURES, UNITS)}, states=lambda _: [], holdable=False)
def stateless(xp, p):
    def step(x, states):
        return xp.tanh(x @ p["w"]), []

    return step


@case(
    params=dense,
    states=lambda d: [d.normal(d.batch, UNITS), d.normal()],
    holdable=False,
)
def unbatched_state(xp, p):
    """The second state is a scalar that all samples share."""

    def step(x, states):
        h, level = states
        h = xp.tanh(x @ p["w"] + h @ p["u"] + level)
        return h, [h, 0.5 * level + h.mean()]

    return step
