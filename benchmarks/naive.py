"""Cells as a user writes them first, with no thought of speed: the steps handed to both loops.

Each takes parameters and returns a step function `(input_t, states) -> (output, new_states)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.problem import Weights

StepFunction = Callable[[Array, list[Array]], tuple[Array, list[Array]]]


class Naive(NamedTuple):
    """A naive cell.

    Attributes:
        arrange: weights in Keras's layout -> the parameters as this cell's author keeps them.
        step: parameters -> step function.
    """

    arrange: Callable[[Weights], Any]
    step: Callable[[Any], StepFunction]


def _gates_to_state(i: Array, f: Array, g: Array, o: Array, c: Array) -> tuple[Array, list[Array]]:
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return h, [h, c]


def lstm(params: dict[str, Array]) -> StepFunction:
    """One matmul for the input, one for the state, then a split into gates."""

    def step(x, states):
        h, c = states
        z = x @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"]
        return _gates_to_state(*jnp.split(z, 4, axis=-1), c)

    return step


def lstm_four_matmuls(params: dict[str, dict[str, Array]]) -> StepFunction:
    """Every gate with its own weights, as in the textbook."""

    def step(x, states):
        h, c = states

        def gate(name):
            p = params[name]
            return x @ p["kernel"] + h @ p["recurrent_kernel"] + p["bias"]

        return _gates_to_state(gate("i"), gate("f"), gate("g"), gate("o"), c)

    return step


def lstm_concatenating(params: dict[str, Array]) -> StepFunction:
    """One matmul over input and state side by side, as TensorFlow's old cells and Haiku do."""

    def step(x, states):
        h, c = states
        z = jnp.concatenate([x, h], axis=-1) @ params["kernel"] + params["bias"]
        return _gates_to_state(*jnp.split(z, 4, axis=-1), c)

    return step


def gru(params: dict[str, Array]) -> StepFunction:
    """Reset after the matmul."""

    def step(x, states):
        (h,) = states
        from_input = x @ params["kernel"] + params["bias"][0]
        from_state = h @ params["recurrent_kernel"] + params["bias"][1]
        xz, xr, xh = jnp.split(from_input, 3, axis=-1)
        hz, hr, hh = jnp.split(from_state, 3, axis=-1)
        z = jax.nn.sigmoid(xz + hz)
        r = jax.nn.sigmoid(xr + hr)
        h = z * h + (1 - z) * jnp.tanh(xh + r * hh)
        return h, [h]

    return step


def elman(params: dict[str, Array]) -> StepFunction:
    """The plain recurrent network."""

    def step(x, states):
        (h,) = states
        h = jnp.tanh(x @ params["kernel"] + h @ params["recurrent_kernel"] + params["bias"])
        return h, [h]

    return step


def _as_is(weights: Weights) -> Weights:
    return weights


def _per_gate(weights: Weights) -> dict[str, Weights]:
    split = {name: np.split(array, 4, axis=-1) for name, array in weights.items()}
    return {
        gate: {name: parts[position] for name, parts in split.items()}
        for position, gate in enumerate("ifgo")
    }


def _stacked(weights: Weights) -> Weights:
    kernel = np.concatenate([weights["kernel"], weights["recurrent_kernel"]])
    return {"kernel": kernel, "bias": weights["bias"]}


STATES = {"lstm": 2, "gru": 1, "elman": 1}

NAIVE = {
    ("lstm", "naive"): Naive(_as_is, lstm),
    ("lstm", "four_matmuls"): Naive(_per_gate, lstm_four_matmuls),
    ("lstm", "concatenating"): Naive(_stacked, lstm_concatenating),
    ("gru", "naive"): Naive(_as_is, gru),
    ("elman", "naive"): Naive(_as_is, elman),
}
