"""Networks put together at random from usual parts: steps that nobody had in mind.

Letters: B samples, T timesteps, D input features, H units. Every part makes `[B, H]` from values
that are there before it, of which the first is x and the next ones are the states.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.steps.forms import Draw, Loop, Size, loop

# (params, the values so far, the number of the step) -> a value
Part = Callable[[list[Array], list[Array], Array], Array]
Option = TypeVar("Option")

ACTIVATIONS = (jnp.tanh, jax.nn.sigmoid, jax.nn.relu, jax.nn.gelu, jax.nn.silu, jax.nn.softmax)
SLOTS, ROWS = 9, 16


class _Builder:
    """Chooses parts and draws their parameters."""

    def __init__(self, number: int, draw: Draw, size: Size):
        self.rng = np.random.default_rng(number)
        self.draw, self.size = draw, size
        self.params: list[Array] = []
        self.states = int(self.rng.integers(1, 4))
        self.widths = [size.D] + [size.H] * self.states

    def choose(self, options: Sequence[Option]) -> Option:
        return options[int(self.rng.integers(len(options)))]

    def happens(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def read(self, most: int = 3) -> list[int]:
        """Which of the values there are a part reads."""
        count = int(self.rng.integers(1, most + 1))
        return [int(i) for i in self.rng.integers(len(self.widths), size=count)]

    def parameter(self, *shape: int) -> int:
        """The place of a new parameter, which keeps the size of what it multiplies."""
        self.params.append(self.draw.normal(*shape, scale=shape[-2] ** -0.5))
        return len(self.params) - 1

    def dense(self, sources: Sequence[int], width: int) -> Part:
        """A sum of products, or one product of a concatenation."""
        widths = [self.widths[i] for i in sources]
        bias = self.parameter(1, width)
        if self.happens(0.4):
            kernel = self.parameter(sum(widths), width)
            return lambda p, v, _: (
                jnp.concatenate([v[i] for i in sources], -1) @ p[kernel] + p[bias]
            )
        kernels = [(i, self.parameter(n, width)) for i, n in zip(sources, widths, strict=True)]
        return lambda p, v, _: sum(v[i] @ p[kernel] for i, kernel in kernels) + p[bias]


def _plain(b: _Builder) -> Part:
    return b.dense(b.read(), b.size.H)


def _activated(b: _Builder) -> Part:
    f, inner = b.choose(ACTIVATIONS), _plain(b)
    return lambda *given: f(inner(*given))


def _gate(b: _Builder) -> Part:
    gate, new = _plain(b), _plain(b)

    def apply(p, v, n):
        z = jax.nn.sigmoid(gate(p, v, n))
        return z * jnp.tanh(new(p, v, n)) + (1 - z) * v[1]

    return apply


def _gated_linear(b: _Builder) -> Part:
    both = b.dense(b.read(), 2 * b.size.H)
    return lambda *given: jax.nn.glu(both(*given))


def _reset_gate(b: _Builder) -> Part:
    from_all, from_state = b.dense(b.read(1), 2 * b.size.H), b.dense([1], 2 * b.size.H)

    def apply(*given):
        (xr, xn), (hr, hn) = (jnp.split(f(*given), 2, -1) for f in (from_all, from_state))
        return jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)

    return apply


def _layer_norm(b: _Builder) -> Part:
    inner = _plain(b)
    return lambda *given: jax.nn.standardize(inner(*given), epsilon=1e-2)


def _residual(b: _Builder) -> Part:
    inner = _activated(b)
    return lambda p, v, n: jax.nn.standardize(v[1] + inner(p, v, n), epsilon=1e-2)


def _attention(b: _Builder) -> Part:
    query = b.dense(b.read(1), ROWS)
    keys, values = b.parameter(SLOTS, ROWS), b.parameter(SLOTS, b.size.H)
    return lambda p, v, n: jax.nn.softmax(query(p, v, n) @ p[keys].T) @ p[values]


def _lookup(b: _Builder) -> Part:
    logits, table = b.dense(b.read(1), SLOTS), b.parameter(SLOTS, b.size.H)
    return lambda p, v, n: p[table][jnp.argmax(logits(p, v, n), -1)]


def _experts(b: _Builder) -> Part:
    gate, inner, kernels = b.dense(b.read(1), 3), _plain(b), b.parameter(3, b.size.H, b.size.H)

    def apply(p, v, n):
        weights = jax.nn.softmax(gate(p, v, n))
        return jnp.einsum("be,bi,eio->bo", weights, inner(p, v, n), p[kernels])

    return apply


def _blocks(b: _Builder) -> Part:
    inner, kernels = _plain(b), b.parameter(4, b.size.H // 4, b.size.H // 4)

    def apply(p, v, n):
        value = inner(p, v, n)
        parts = value.reshape(len(value), 4, -1)
        return jnp.einsum("bgi,gij->bgj", parts, p[kernels]).reshape(value.shape)

    return apply


def _low_rank(b: _Builder) -> Part:
    inner, kernel = b.dense(b.read(1), 4), b.parameter(4, b.size.H)
    return lambda p, v, n: inner(p, v, n) @ p[kernel]


def _weight_norm(b: _Builder) -> Part:
    inner, kernel = _activated(b), b.parameter(b.size.H, b.size.H)

    def apply(p, v, n):
        return inner(p, v, n) @ (p[kernel] * lax.rsqrt(jnp.sum(p[kernel] ** 2, 0)))

    return apply


def _dropout(b: _Builder) -> Part:
    inner = _activated(b)

    def apply(p, v, n):
        value = inner(p, v, n)
        key = jax.random.fold_in(jax.random.key(0), n)
        return value * jax.random.bernoulli(key, 0.8, value.shape) / 0.8

    return apply


def _branch(b: _Builder) -> Part:
    inner, kernel = _plain(b), b.parameter(b.size.H, b.size.H)

    def apply(p, v, n):
        def taken(value):
            return jnp.tanh(value @ p[kernel])

        return lax.cond(n % 2 == 0, taken, jnp.cos, inner(p, v, n))

    return apply


def _recomputed(b: _Builder) -> Part:
    inner, kernel = _activated(b), b.parameter(b.size.H, b.size.H)
    return jax.checkpoint(lambda p, v, n: jnp.tanh(inner(p, v, n) @ p[kernel]))


def _inner_loop(b: _Builder) -> Part:
    inner, kernel = _activated(b), b.parameter(b.size.H, b.size.H)

    def apply(p, v, n):
        value = inner(p, v, n)
        return lax.scan(lambda h, _: (jnp.tanh(h @ p[kernel] + value), None), value, None, 2)[0]

    return apply


PARTS = (
    _plain,
    _activated,
    _gate,
    _gated_linear,
    _reset_gate,
    _layer_norm,
    _residual,
    _attention,
    _lookup,
    _experts,
    _blocks,
    _low_rank,
    _weight_norm,
    _dropout,
    _branch,
    _recomputed,
    _inner_loop,
)


def _new_state(b: _Builder, place: int) -> Part:
    """The new state at a `place` among the values."""
    kind, inner = b.choose(("plain", "leaky", "gated", "norm")), _plain(b)
    gate = _plain(b) if kind == "gated" else None

    def apply(p, v, n):
        new = inner(p, v, n)
        if kind == "norm":
            return jax.nn.standardize(new, epsilon=1e-2)
        new = jnp.tanh(new)
        if kind == "plain":
            return new
        kept = jax.nn.sigmoid(gate(p, v, n)) if gate else 0.9
        return kept * v[place] + (1 - kept) * new

    return apply


def _memory(b: _Builder) -> Callable[..., tuple[Array, Array]]:
    """(params, values, number, memory `[B, 16, H]`) -> the new memory and what is read of it."""
    write, value = b.dense(b.read(1), ROWS), _plain(b)
    corrects = b.happens(0.5)

    def apply(p, v, n, memory):
        key = write(p, v, n)
        key *= lax.rsqrt(jnp.sum(key * key, -1, keepdims=True) + 0.1)
        new, old = value(p, v, n), jnp.einsum("bk,bkh->bh", key, memory)
        memory = (1 if corrects else 0.9) * memory + jnp.einsum(
            "bk,bh->bkh", key, 0.5 * (new - old) if corrects else 0.2 * new
        )
        return memory, old

    return apply


def size_of(number: int) -> Size:
    """The size at which a network is measured."""
    rng = np.random.default_rng([number, 1])
    options = (1, 3, 16, 40), (7, 20, 64, 128), (8, 16, 32, 96), (16, 32, 64, 96)
    return Size(*(int(rng.choice(values)) for values in options))


def network(number: int, draw: Draw, size: Size) -> Loop:
    """A network that is the same whenever it is made; different numbers make different ones."""
    B, T, D, H = size
    b = _Builder(number, draw, size)
    remember = _memory(b) if b.happens(0.3) else None
    if remember:
        b.widths.append(H)
    parts = []
    for _ in range(int(b.rng.integers(1, 6))):
        parts.append(b.choose(PARTS)(b))
        b.widths.append(H)
    new_states = [_new_state(b, 1 + i) for i in range(b.states)]
    read, readout = b.read(), b.dense(b.read(), b.choose((8, 3 * H)))
    masks = b.happens(0.3)

    def body(p: Any) -> Callable:
        def step(carry, xs):
            states, memory, n = carry
            x, counts = xs
            values = [x, *states]
            if remember:
                memory, old = remember(p, values, n, memory)
                values.append(old)
            for part in parts:
                values.append(part(p, values, n))
            new = [state(p, values, n) for state in new_states]
            if masks:
                pairs = zip(new, states, strict=True)
                new = [jnp.where(counts[:, None], new, old) for new, old in pairs]
            ys = [values[i] for i in read], readout(p, values, n)
            return (new, memory, n + 1), ys

        return step

    states = [draw.normal(B, H) for _ in range(b.states)]
    memory = draw.normal(B, ROWS, H, scale=0.3) if remember else None
    xs = draw.normal(T, B, D), draw.integers(5, T, B) > 0
    return loop(body, b.params, (states, memory, jnp.asarray(0, jnp.int32)), xs)
