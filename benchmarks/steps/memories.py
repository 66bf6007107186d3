"""Steps whose state is a memory: a matrix for each sample, or several numbers for each unit."""

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.steps.forms import Draw, Loop, Size, loop


def fast_weights(draw: Draw, size: Size) -> Loop:
    """Linear attention: a matrix as state, written by outer products and read by queries."""
    B, T, D, H = size

    def body(p):
        def step(memory, x):
            q, k, v = jnp.split(x @ p, 3, axis=-1)
            memory = 0.95 * memory + k[..., :, None] * v[..., None, :]
            return memory, jnp.einsum("bk,bkv->bv", q, memory)

        return step

    return loop(body, draw.weight(D, 3 * H), draw.normal(B, H, H), draw.normal(T, B, D))


def delta_rule(draw: Draw, size: Size) -> Loop:
    """A matrix as state in which what is stored under a key is replaced."""
    B, T, D, H = size

    def body(p):
        def step(memory, x):
            q, k, v = (x @ p[name] for name in "QKV")
            k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
            change = jax.nn.sigmoid(x @ p["b"]) * (v - jnp.einsum("bk,bkv->bv", k, memory))
            memory = memory + k[..., :, None] * change[..., None, :]
            return memory, jnp.einsum("bk,bkv->bv", q, memory)

        return step

    params = {name: draw.weight(D, H) for name in "QKV"} | {"b": draw.weight(D, 1)}
    return loop(body, params, draw.normal(B, H, H), draw.normal(T, B, D))


def test_time_training(draw: Draw, size: Size) -> Loop:
    """A linear model for a state, trained at every step by the gradient of a loss on the input."""
    B, T, D, H = size

    def body(p):
        def reconstruction(weights, key, value):
            z = key @ weights
            z = (z - z.mean()) / jnp.sqrt(z.var() + 1e-6)
            return 0.5 * jnp.sum((z + key - value) ** 2)

        def step(weights, x):
            query, key, value = x @ p["Q"], x @ p["K"], x @ p["V"]
            slope = jax.vmap(jax.grad(reconstruction))(weights, key, value)
            weights = weights - 0.1 * slope
            return weights, jnp.einsum("bi,bij->bj", query, weights) + query

        return step

    params = {name: draw.weight(D, H) for name in "QKV"}
    return loop(body, params, draw.normal(B, H, H, scale=0.3), draw.normal(T, B, D))


def retention(draw: Draw, size: Size) -> Loop:
    """Retention: a memory for each of four heads that decays, read out and normalised."""
    B, T, D, H = size
    heads, width = 4, H // 4
    decay = 1 - 2.0 ** -jnp.arange(5, 5 + heads)

    def body(p):
        def step(memory, x):
            q, k, v = (x @ p[name] for name in "QKV")
            q, k, v = (z.reshape(B, heads, width) for z in (q, k, v))
            memory = decay[:, None, None] * memory + k[..., None] * v[..., None, :]
            y = jnp.einsum("bhk,bhkv->bhv", q, memory)
            y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5)
            return memory, (jax.nn.silu(x @ p["G"]) * y.reshape(B, H)) @ p["O"]

        return step

    params = {name: draw.weight(D, H) for name in "QKVG"} | {"O": draw.weight(H, D)}
    return loop(body, params, draw.normal(B, heads, width, width), draw.normal(T, B, D))


def rotated_retention(draw: Draw, size: Size) -> Loop:
    """Retention whose queries and keys are turned by an angle that grows from step to step."""
    B, T, D, H = size
    heads = min(4, H // 2)
    width = H // heads
    decay = 1 - 2.0 ** -jnp.arange(5, 5 + heads)
    angles = 1e4 ** -jnp.linspace(0, 1, width // 2)

    def turned(z, t):
        z = z.reshape(B, heads, width // 2, 2)
        even, odd, cos, sin = z[..., 0], z[..., 1], jnp.cos(t * angles), jnp.sin(t * angles)
        return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(
            B, heads, width
        )

    def body(p):
        def step(carry, x):
            memory, t = carry
            q, k, v = turned(x @ p["Q"], t), turned(x @ p["K"], t), x @ p["V"]
            memory = decay[:, None, None] * memory
            memory = memory + k[..., None] * v.reshape(B, heads, 1, width)
            y = jnp.einsum("bhk,bhkv->bhv", q, memory).reshape(B, H)
            return (memory, t + 1), (jax.nn.silu(x @ p["G"]) * y) @ p["O"]

        return step

    params = {name: draw.weight(D, H) for name in "QKVG"} | {"O": draw.weight(H, D)}
    init = (draw.normal(B, heads, width, width), jnp.zeros(()))
    return loop(body, params, init, draw.normal(T, B, D))


def matrix_lstm(draw: Draw, size: Size) -> Loop:
    """The cell of xLSTM whose memory is a matrix for each of four heads, exponential gates."""
    B, T, D, H = size
    heads, width = 4, H // 4

    def body(p):
        def step(carry, x):
            memory, norm, largest = carry
            q, k, v = ((x @ p[name]).reshape(B, heads, width) for name in "QKV")
            k = k * width**-0.5
            write, keep = x @ p["i"], jax.nn.log_sigmoid(x @ p["f"])
            new = jnp.maximum(keep + largest, write)
            keep, write = jnp.exp(keep + largest - new)[..., None], jnp.exp(write - new)[..., None]
            memory = keep[..., None] * memory + (write * v)[..., :, None] * k[..., None, :]
            norm = keep * norm + write * k
            y = jnp.einsum("bhvk,bhk->bhv", memory, q)
            y = y / jnp.maximum(jnp.abs(jnp.sum(norm * q, -1, keepdims=True)), 1)
            return (memory, norm, new), jax.nn.sigmoid(x @ p["o"]) * y.reshape(B, H)

        return step

    params = {name: draw.weight(D, H) for name in "QKVo"}
    params |= {name: draw.weight(D, heads) for name in "if"}
    init = (
        draw.normal(B, heads, width, width),
        draw.normal(B, heads, width),
        jnp.zeros((B, heads)),
    )
    return loop(body, params, init, draw.normal(T, B, D))


def selective(draw: Draw, size: Size) -> Loop:
    """A selective state space model: 16 numbers for each unit, that the input decays and writes."""
    B, T, D, H = size

    def body(p):
        def step(h, x):
            u = x @ p["in"]
            rate = jax.nn.softplus(u @ p["rate"])
            h = jnp.exp(-rate[..., None] * jnp.exp(p["decay"])) * h
            h = h + (rate * u)[..., None] * (u @ p["write"])[:, None, :]
            return h, (jnp.einsum("bhn,bn->bh", h, u @ p["read"]) + u) @ p["out"]

        return step

    shapes = {"in": (D, H), "rate": (H, H), "write": (H, 16), "read": (H, 16), "out": (H, D)}
    params = {name: draw.weight(*shape) for name, shape in shapes.items()}
    params |= {"decay": draw.normal(H, 16)}
    return loop(body, params, draw.normal(B, H, 16), draw.normal(T, B, D))


def key_value_cache(draw: Draw, size: Size) -> Loop:
    """Attention to all steps so far, whose keys and values are written into the state."""
    B, T, D, H = size

    def body(p):
        def step(carry, x):
            keys, values, t = carry
            q, k, v = (x @ p[name] for name in "QKV")
            keys = lax.dynamic_update_index_in_dim(keys, k, t, 1)
            values = lax.dynamic_update_index_in_dim(values, v, t, 1)
            score = jnp.einsum("bh,bth->bt", q, keys) * H**-0.5
            weight = jax.nn.softmax(jnp.where(jnp.arange(T) <= t, score, -1e30))
            return (keys, values, t + 1), jnp.einsum("bt,bth->bh", weight, values) @ p["O"]

        return step

    params = {name: draw.weight(D, H) for name in "QKV"} | {"O": draw.weight(H, D)}
    init = (jnp.zeros((B, T, H)), jnp.zeros((B, T, H)), jnp.zeros((), jnp.int32))
    return loop(body, params, init, draw.normal(T, B, D))


def polynomial_memory(draw: Draw, size: Size) -> Loop:
    """HiPPO-LegS by the bilinear rule: a solve with another matrix at each step."""
    B, T, D, H = size
    order = jnp.arange(H)
    scale = jnp.sqrt(2.0 * order + 1)
    below = jnp.where(order[:, None] > order, scale[:, None] * scale, 0)
    transition = below + jnp.diag(order + 1.0)

    def body(p):
        def step(carry, x):
            memory, t = carry
            forward = jnp.eye(H) - transition / (2 * t)
            backward = jnp.eye(H) + transition / (2 * t)
            right = forward @ memory.T + scale[:, None] * (x @ p).T / t
            memory = jnp.linalg.solve(backward, right).T
            return (memory, t + 1), memory

        return step

    return loop(body, draw.weight(D, 1), (draw.normal(B, H), jnp.ones(())), draw.normal(T, B, D))


def dilated(draw: Draw, size: Size) -> Loop:
    """An Elman network whose state is that of 16 steps ago, held in a delay line."""
    B, T, D, H = size

    def body(p):
        def step(line, x):
            h = jnp.tanh(x @ p["W"] + line[0] @ p["U"] + p["b"])
            return jnp.concatenate([line[1:], h[None]]), h

        return step

    return loop(body, draw.gates(1, D, H), draw.normal(16, B, H), draw.normal(T, B, D))


def mamba(draw: Draw, size: Size) -> Loop:
    """A block of Mamba: a short convolution with a state, then a selective state space."""
    B, T, D, H = size
    inner, numbers, rank, width = 2 * H, 8, 4, 4

    def body(p):
        def step(carry, x):
            window, memory = carry
            z, gate = jnp.split(x @ p["W"], 2, axis=-1)
            window = jnp.concatenate([window[:, 1:], z[:, None]], axis=1)
            u = jax.nn.silu((window * p["filter"]).sum(1) + p["b"])
            time, key, query = jnp.split(u @ p["S"], [rank, rank + numbers], axis=-1)
            time = jax.nn.softplus(time @ p["time"] + p["c"])
            memory *= jnp.exp(-jnp.exp(p["log_rate"]) * time[..., None])
            memory += (time * u)[..., None] * key[:, None]
            y = jnp.einsum("bin,bn->bi", memory, query) + p["skip"] * u
            return (window, memory), (y * jax.nn.silu(gate)) @ p["V"]

        return step

    params = {
        "W": draw.weight(D, 2 * inner),
        "filter": draw.normal(width, inner, scale=0.5),
        "S": draw.weight(inner, rank + 2 * numbers),
        "time": draw.weight(rank, inner),
        "log_rate": draw.normal(inner, numbers),
        "V": draw.weight(inner, D),
    } | {name: draw.normal(inner) for name in ("b", "c", "skip")}
    init = (draw.normal(B, width, inner), draw.normal(B, inner, numbers))
    return loop(body, params, init, draw.normal(T, B, D))


def blocks_of_keys(draw: Draw, size: Size) -> Loop:
    """16 queries of each sample that meet 16 keys a step: softmax attention as running sums."""
    B, T, _, H = size
    count = 16

    def body(queries):
        def step(carry, block):
            most, total, read = carry
            keys, values = block
            scores = jnp.einsum("bqd,bkd->bqk", queries, keys)
            new = jnp.maximum(most, scores.max(-1))
            weights, fades = jnp.exp(scores - new[..., None]), jnp.exp(most - new)
            read = read * fades[..., None] + jnp.einsum("bqk,bkd->bqd", weights, values)
            return (new, total * fades + weights.sum(-1), read), None

        return step

    init = (draw.normal(B, count), jnp.ones((B, count)), draw.normal(B, count, H))
    xs = (draw.normal(T, B, count, H), draw.normal(T, B, count, H))
    return loop(body, draw.normal(B, count, H), init, xs)
