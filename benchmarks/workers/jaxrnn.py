"""jaxrnn: the naive steps as they are, and the library's own cells."""

from collections.abc import Callable

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
    forward, arrange = forward_of(cell, variant, batch, units)
    return through_jax.candidate(forward, arrange(problem.weights), problem)


def forward_of(
    cell: str, variant: str, batch: int, units: int, dtype: str = "float32"
) -> tuple[Callable, Callable]:
    """`(params, inputs) -> outputs` of such a variant, and how weights are arranged for it."""
    if variant == "cell":
        own = CELLS[cell](units, param_dtype=dtype)
        arrange, step = dict, own.step
        states = own.initial_states(batch)
    else:
        naive = NAIVE[cell, variant.removesuffix("_remat")]
        arrange, step = naive.arrange, naive.step
        states = [jnp.zeros((batch, units), dtype)] * STATES[cell]
    options = {"remat": True} if variant.endswith("_remat") else {}

    def forward(params, inputs):
        _, outputs, _ = jaxrnn.rnn(step(params), inputs, states, **options)
        return outputs

    return forward, arrange


if __name__ == "__main__":
    through_jax.serve_jax(build, jaxrnn=jaxrnn.__version__)
