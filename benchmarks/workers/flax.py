"""Flax nnx: the faster of its cells, in `nnx.RNN`."""

from typing import Any

import flax
import numpy as np
from flax import nnx

from benchmarks.problem import Problem, Weights
from benchmarks.worker import Candidate
from benchmarks.workers import through_jax

CELLS = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell, "elman": nnx.SimpleCell}


def _arrange(cell: str, weights: Weights) -> dict[tuple[str, str], np.ndarray]:
    kernel, recurrent_kernel = weights["kernel"], weights["recurrent_kernel"]
    bias, bias_owner = weights["bias"], "dense_h" if cell == "lstm" else "dense_i"
    if cell == "gru":

        def swapped(array):
            z, r, h = np.split(array, 3, axis=-1)
            return np.concatenate([r, z, h], axis=-1)

        kernel, recurrent_kernel, bias = map(swapped, (kernel, recurrent_kernel, bias.sum(0)))
    return {
        ("dense_i", "kernel"): kernel,
        ("dense_h", "kernel"): recurrent_kernel,
        (bias_owner, "bias"): bias,
    }


def build(cell: str, variant: str, problem: Problem) -> Candidate:
    """An `nnx.RNN` as a pure function of its parameters."""
    (batch, _, features), units = problem.inputs.shape, problem.reference.shape[-1]
    module: Any = nnx.RNN(CELLS[cell](features, units, rngs=nnx.Rngs(0)), rngs=False)
    for (layer, name), value in _arrange(cell, problem.weights).items():
        parameter = getattr(getattr(module.cell, layer), name)
        assert parameter.get_value().shape == value.shape
        parameter.set_value(value)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def forward(params, inputs):
        layer = nnx.merge(graph, params, rest)
        carry = layer.cell.initialize_carry((batch, features), nnx.Rngs(0))
        return layer(inputs, initial_carry=carry)

    return through_jax.candidate(forward, params, problem)


if __name__ == "__main__":
    through_jax.serve_jax(build, flax=flax.__version__)
