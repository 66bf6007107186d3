"""Haiku: `hk.LSTM` and `hk.GRU` under `hk.dynamic_unroll`."""

import haiku as hk
import jax
import numpy as np

from benchmarks.problem import Problem, Weights
from benchmarks.worker import Candidate
from benchmarks.workers import through_jax

CELLS = {"lstm": hk.LSTM, "gru": hk.GRU}

# Haiku's GRU resets the state before the matmul, unlike all the others.
MATH = {"lstm": "reference", "gru": "reset_before"}


def _arrange(cell: str, weights: Weights) -> dict[str, dict[str, np.ndarray]]:
    if cell == "gru":
        # Haiku's update gate is one minus ours.
        def negated(array):
            z, r, h = np.split(array, 3, axis=-1)
            return np.concatenate([-z, r, h], axis=-1)

        gru = {
            "w_i": negated(weights["kernel"]),
            "w_h": negated(weights["recurrent_kernel"]),
            "b": negated(weights["bias"].sum(0)),
        }
        return {"gru": gru}

    def swapped(array):
        i, f, g, o = np.split(array, 4, axis=-1)
        return np.concatenate([i, g, f, o], axis=-1)

    kernel = np.concatenate([weights["kernel"], weights["recurrent_kernel"]])
    bias = np.split(weights["bias"], 4)
    bias[1] = bias[1] - 1  # Haiku adds one to the forget gate itself.
    linear = {"w": swapped(kernel), "b": swapped(np.concatenate(bias))}
    return {"lstm/linear": linear}


def build(cell: str, variant: str, problem: Problem) -> Candidate:
    """The core unrolled over batch-major inputs."""
    batch, _, units = problem.reference.shape

    def network(inputs):
        core = CELLS[cell](units)
        states = core.initial_state(batch)
        outputs, _ = hk.dynamic_unroll(core, inputs, states, time_major=False)
        return outputs

    transformed = hk.without_apply_rng(hk.transform(network))
    params = _arrange(cell, problem.weights)
    expected = jax.eval_shape(transformed.init, jax.random.key(0), problem.inputs)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
    return through_jax.candidate(transformed.apply, params, problem, MATH[cell])


if __name__ == "__main__":
    through_jax.serve_jax(build, haiku=hk.__version__)
