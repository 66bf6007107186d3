"""jaxrnn: the naive steps as they are, and the library's own cells."""

import jax.numpy as jnp

import jaxrnn
from benchmarks.naive import NAIVE, STATES
from benchmarks.problem import Problem
from benchmarks.worker import Candidate
from benchmarks.workers import through_jax

CELLS = {"lstm": jaxrnn.cells.lstm, "gru": jaxrnn.cells.gru, "elman": jaxrnn.cells.simple_rnn}


def build(cell: str, variant: str, problem: Problem) -> Candidate:
    """`variant` names a naive step, that with "_remat" behind it, or "cell" for our own cell."""
    batch, _, units = problem.reference.shape
    if variant == "cell":
        own = CELLS[cell](units)
        params, step = problem.weights, own.step
        states = own.initial_states(batch)
    else:
        naive = NAIVE[cell, variant.removesuffix("_remat")]
        params, step = naive.arrange(problem.weights), naive.step
        states = [jnp.zeros((batch, units))] * STATES[cell]
    options = {"remat": True} if variant.endswith("_remat") else {}

    def forward(params, inputs):
        _, outputs, _ = jaxrnn.rnn(step(params), inputs, states, **options)
        return outputs

    return through_jax.candidate(forward, params, problem)


if __name__ == "__main__":
    through_jax.serve_jax(build, jaxrnn=jaxrnn.__version__)
