"""Keras 3 on JAX: the layer as a pure function of its weights."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras

from benchmarks.problem import Problem
from benchmarks.worker import Candidate
from benchmarks.workers import through_jax

LAYERS = {
    "lstm": keras.layers.LSTM,
    "gru": keras.layers.GRU,
    "elman": keras.layers.SimpleRNN,
}


def build(cell: str, variant: str, problem: Problem) -> Candidate:
    """The layer with default options."""
    layer = LAYERS[cell](problem.reference.shape[-1], return_sequences=True)
    layer.build(problem.inputs.shape)
    layer.set_weights([problem.weights[k] for k in ("kernel", "recurrent_kernel", "bias")])
    rest = [variable.value for variable in layer.non_trainable_variables]

    def forward(params, inputs):
        outputs, _ = layer.stateless_call(params, rest, inputs)
        return outputs

    params = [variable.value for variable in layer.trainable_variables]
    return through_jax.candidate(forward, params, problem)


if __name__ == "__main__":
    through_jax.serve_jax(build, keras=keras.__version__)
