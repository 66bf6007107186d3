"""Gated cells and the Elman cell: by the book, written in other ways, and built upon.

Letters: B samples, T timesteps, D input features, H units.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxrnn
from benchmarks.steps.forms import Draw, Loop, Size, loop


def gated(gates: Iterable[Array], c: Array) -> tuple[Array, Array]:
    """From an LSTM's gates before activation, in the order i, f, g, o, to h and c."""
    i, f, g, o = gates
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def lstm_cell(p: dict[str, Array], x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """One step of an LSTM: h and c."""
    return gated(jnp.split(x @ p["W"] + h @ p["U"] + p["b"], 4, axis=-1), c)


def lstm_column(p: dict[str, Array], carry: tuple[Array, Array], x: Array) -> tuple:
    """One step of an LSTM for one sample, weights on the left: the carry, and h."""
    h, c = carry
    h, c = gated(jnp.split(p["W"] @ x + p["U"] @ h + p["b"], 4), c)
    return (h, c), h


def gru_gated(from_input: Iterable[Array], from_state: Iterable[Array], h: Array) -> Array:
    """From a GRU's gates before activation, in the order z, r, n, to h; reset after the matmul."""
    (xz, xr, xn), (hz, hr, hn) = from_input, from_state
    z = jax.nn.sigmoid(xz + hz)
    return z * h + (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)


def gru_cell(p: dict[str, Array], x: Array, h: Array) -> Array:
    """One step of a GRU."""
    from_input = jnp.split(x @ p["W"] + p["b"], 3, axis=-1)
    return gru_gated(from_input, jnp.split(h @ p["U"], 3, axis=-1), h)


def elman(draw: Draw, size: Size) -> Loop:
    """The plain recurrent network."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            h = jnp.tanh(x @ p["W"] + h @ p["U"] + p["b"])
            return h, h

        return step

    return loop(body, draw.gates(1, D, H), draw.normal(B, H), draw.normal(T, B, D))


def lstm(draw: Draw, size: Size, under: Callable[[Callable], Callable] | None = None) -> Loop:
    """One matmul for the input, one for the state, then a split."""
    B, T, D, H = size

    def body(p):
        def step(carry, x):
            h, c = lstm_cell(p, x, *carry)
            return (h, c), h

        return under(step) if under else step

    init = (draw.normal(B, H), draw.normal(B, H))
    return loop(body, draw.gates(4, D, H), init, draw.normal(T, B, D))


def lstm_checkpointed(draw: Draw, size: Size) -> Loop:
    """Nothing but the states is to be kept."""
    return lstm(draw, size, jax.checkpoint)


def lstm_checkpointed_in_part(draw: Draw, size: Size) -> Loop:
    """Of the cell nothing but the states is to be kept; a readout is beside it."""
    B, T, D, H = size
    cell = jax.checkpoint(lstm_cell)

    def body(p):
        def step(carry, x):
            h, c = cell(p["cell"], x, *carry)
            return (h, c), h @ p["readout"]

        return step

    params = {"cell": draw.gates(4, D, H), "readout": draw.normal(H, D, scale=H**-0.5)}
    return loop(body, params, (draw.normal(B, H), draw.normal(B, H)), draw.normal(T, B, D))


def lstm_four_matmuls(draw: Draw, size: Size) -> Loop:
    """Every gate with weights of its own."""
    B, T, D, H = size

    def body(p):
        def step(carry, x):
            h, c = carry
            h, c = gated((x @ p[k]["W"] + h @ p[k]["U"] + p[k]["b"] for k in "ifgo"), c)
            return (h, c), h

        return step

    params = {k: draw.gates(1, D, H) for k in "ifgo"}
    return loop(body, params, (draw.normal(B, H), draw.normal(B, H)), draw.normal(T, B, D))


def lstm_concatenating(draw: Draw, size: Size) -> Loop:
    """One matmul over input and state side by side."""
    B, T, D, H = size

    def body(p):
        def step(carry, x):
            h, c = carry
            z = jnp.concatenate([x, h], axis=-1) @ p["K"] + p["b"]
            h, c = gated(jnp.split(z, 4, axis=-1), c)
            return (h, c), h

        return step

    params = {"K": draw.weight(D + H, 4 * H), "b": draw.normal(4 * H, scale=0.1)}
    return loop(body, params, (draw.normal(B, H), draw.normal(B, H)), draw.normal(T, B, D))


def lstm_columns(draw: Draw, size: Size) -> Loop:
    """Weights on the left of one sample's column, under `vmap`, as in Equinox."""
    B, T, D, H = size

    def body(p):
        return jax.vmap(functools.partial(lstm_column, p))

    params = jax.tree.map(jnp.transpose, draw.gates(4, D, H))
    return loop(body, params, (draw.normal(B, H), draw.normal(B, H)), draw.normal(T, B, D))


def lstm_mapped(draw: Draw, size: Size) -> Loop:
    """The loop of one sample, and `vmap` around it, as in Equinox."""
    B, T, D, H = size

    def run(scan):
        def one(p, init, xs):
            return scan(functools.partial(lstm_column, p), init, xs)

        return jax.vmap(one, (None, 0, 1), (0, 1))

    params = jax.tree.map(jnp.transpose, draw.gates(4, D, H))
    init = (draw.normal(B, H), draw.normal(B, H))
    return Loop((params, init, draw.normal(T, B, D)), run(lax.scan), run(jaxrnn.scan))


def gru_einsum(draw: Draw, size: Size) -> Loop:
    """An axis of its own for the gates, in front."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            from_input = jnp.einsum("bi,gij->gbj", x, p["W"]) + p["b"][:, None]
            h = gru_gated(from_input, jnp.einsum("bi,gij->gbj", h, p["U"]), h)
            return h, h

        return step

    params = {
        "W": draw.normal(3, D, H, scale=D**-0.5),
        "U": draw.normal(3, H, H, scale=H**-0.5),
        "b": draw.normal(3, H, scale=0.1),
    }
    return loop(body, params, draw.normal(B, H), draw.normal(T, B, D))


def gru(draw: Draw, size: Size) -> Loop:
    """Reset after the matmul."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            h = gru_cell(p, x, h)
            return h, h

        return step

    return loop(body, draw.gates(3, D, H), draw.normal(B, H), draw.normal(T, B, D))


def two_layers(draw: Draw, size: Size) -> Loop:
    """Two LSTMs, one above the other, in one step."""
    B, T, D, H = size

    def body(p):
        def step(carry, x):
            lower = lstm_cell(p[0], x, *carry[0])
            upper = lstm_cell(p[1], lower[0], *carry[1])
            return (lower, upper), upper[0]

        return step

    init = tuple((draw.normal(B, H), draw.normal(B, H)) for _ in range(2))
    return loop(body, (draw.gates(4, D, H), draw.gates(4, H, H)), init, draw.normal(T, B, D))


def attention_readout(draw: Draw, size: Size) -> Loop:
    """An LSTM whose output looks things up in a memory of 64 slots."""
    B, T, D, H = size

    def body(p):
        def step(carry, x):
            h, c = lstm_cell(p, x, *carry)
            scores = jax.nn.softmax((h @ p["Q"]) @ p["memory"].T)
            return (h, c), scores @ p["memory"]

        return step

    params = draw.gates(4, D, H) | {"Q": draw.weight(H, D), "memory": draw.normal(64, D)}
    return loop(body, params, (draw.normal(B, H), draw.normal(B, H)), draw.normal(T, B, D))


def layer_norm_lstm(draw: Draw, size: Size) -> Loop:
    """Pre-activation and cell state normalised over their features."""
    B, T, D, H = size

    def normalised(z):
        z = z - z.mean(-1, keepdims=True)
        return z * lax.rsqrt((z * z).mean(-1, keepdims=True) + 1e-5)

    def body(p):
        def step(carry, x):
            h, c = carry
            z = p["gain"] * normalised(x @ p["W"] + h @ p["U"]) + p["b"]
            i, f, g, o = jnp.split(z, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(normalised(c))
            return (h, c), h

        return step

    params = draw.gates(4, D, H) | {"gain": 1 + draw.normal(4 * H, scale=0.1)}
    return loop(body, params, (draw.normal(B, H), draw.normal(B, H)), draw.normal(T, B, D))


def hyper_lstm(draw: Draw, size: Size) -> Loop:
    """An LSTM whose gates, taken by index, are scaled by what a smaller one says."""
    B, T, D, H = size
    small = max(H // 8, 1)

    def body(p):
        def step(carry, x):
            h, c, hyper_h, hyper_c = carry
            z = jnp.concatenate([x, h], axis=-1) @ p["hyper_W"] + hyper_h @ p["hyper_U"]
            hyper_h, hyper_c = gated(jnp.split(z, 4, axis=-1), hyper_c)
            z = (x @ p["W"]).reshape(B, 4, H) + (h @ p["U"]).reshape(B, 4, H)
            z = z * (hyper_h @ p["scale"])[..., None] + p["b"].reshape(4, H)
            h, c = gated([z[:, gate] for gate in range(4)], c)
            return (h, c, hyper_h, hyper_c), h

        return step

    params = draw.gates(4, D, H)
    params |= {"hyper_W": draw.weight(D + H, 4 * small), "hyper_U": draw.weight(small, 4 * small)}
    params |= {"scale": draw.weight(small, 4)}
    init = tuple(draw.normal(B, units) for units in (H, H, small, small))
    return loop(body, params, init, draw.normal(T, B, D))


def phased_lstm(draw: Draw, size: Size) -> Loop:
    """Each unit is open for a short part of a period of its own (Neil et al. 2016)."""
    B, T, D, H = size

    def body(p):
        def step(carry, row):
            (h, c), (x, time) = carry, row
            h_new, c_new = lstm_cell(p, x, h, c)
            phase = jnp.mod(time[:, None] - p["shift"], jnp.exp(p["log_period"]))
            phase = phase / jnp.exp(p["log_period"])
            up, down = 40 * phase, 2 - 40 * phase
            gate = jnp.where(phase < 0.025, up, jnp.where(phase < 0.05, down, 0.001 * phase))
            c, h = gate * c_new + (1 - gate) * c, gate * h_new + (1 - gate) * h
            return (h, c), h

        return step

    params = draw.gates(4, D, H) | {"log_period": draw.normal(H), "shift": draw.normal(H)}
    init = draw.normal(B, H), draw.normal(B, H)
    times = jnp.cumsum(jnp.abs(draw.normal(T, B)), axis=0)
    return loop(body, params, init, (draw.normal(T, B, D), times))


def conv_lstm(draw: Draw, size: Size) -> Loop:
    """An LSTM over 16 places, connected by convolutions of width 3."""
    B, T, D, H = size

    def convolved(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    def body(p):
        def step(carry, x):
            h, c = carry
            z = convolved(x, p["W"]) + convolved(h, p["U"]) + p["b"]
            h, c = gated(jnp.split(z, 4, axis=-1), c)
            return (h, c), h

        return step

    params = {
        "W": draw.normal(3, D, 4 * H, scale=(3 * D) ** -0.5),
        "U": draw.normal(3, H, 4 * H, scale=(3 * H) ** -0.5),
        "b": draw.normal(4 * H, scale=0.1),
    }
    init = (draw.normal(B, 16, H), draw.normal(B, 16, H))
    return loop(body, params, init, draw.normal(T, B, 16, D))


def masked(draw: Draw, size: Size) -> Loop:
    """Padded sequences: `rnn` with a mask against the loop that holds states by hand."""
    B, T, D, H = size
    mask = np.arange(T)[:, None] < np.linspace(T // 2, T, B).astype(int)

    def plain(p, init, xs):
        def step(carry, x_and_mask):
            x, valid = x_and_mask
            *states, held = carry
            h, c = lstm_cell(p, x, *states)
            h, c, held = (
                jnp.where(valid[:, None], new, old)
                for new, old in zip((h, c, h), carry, strict=True)
            )
            return (h, c, held), held

        (h, c, _), outputs = lax.scan(step, (*init, init[0]), (xs, jnp.asarray(mask)))
        return [h, c], outputs

    def ours(p, init, xs):
        def step(x, states):
            h, c = lstm_cell(p, x, *states)
            return h, [h, c]

        _, outputs, states = jaxrnn.rnn(step, xs, init, mask=jnp.asarray(mask), time_major=True)
        return states, outputs

    init = [draw.normal(B, H), draw.normal(B, H)]
    return Loop((draw.gates(4, D, H), init, draw.normal(T, B, D)), plain, ours)


def cond(draw: Draw, size: Size) -> Loop:
    """A slow cell: the state moves on at every third step only."""
    B, T, D, H = size

    def body(p):
        def step(carry, x):
            t, h = carry
            h = lax.cond(t % 3 == 0, lambda h: gru_cell(p, x, h), lambda h: h, h)
            return (t + 1, h), h

        return step

    init = (jnp.zeros((), jnp.int32), draw.normal(B, H))
    return loop(body, draw.gates(3, D, H), init, draw.normal(T, B, D))


def cond_per_sample(draw: Draw, size: Size) -> Loop:
    """A mask as one would write it for one sample, under `vmap`, as in Equinox."""
    B, T, D, H = size

    def body(p):
        def one(h, x):
            h = lax.cond(x[0] > -1, lambda h: gru_cell(p, x, h), lambda h: h, h)
            return h, h

        return jax.vmap(one)

    return loop(body, draw.gates(3, D, H), draw.normal(B, H), draw.normal(T, B, D))
