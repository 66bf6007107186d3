"""The naive steps on plain `jax.lax.scan`, which every JAX library has inside."""

import jax.numpy as jnp
from jax import lax

from benchmarks.cases import GEMM_SIZE
from benchmarks.naive import NAIVE, STATES
from benchmarks.problem import Problem
from benchmarks.worker import Candidate
from benchmarks.workers import through_jax


def build(cell: str, variant: str, problem: Problem) -> Candidate:
    """The step of that name in the loop that a user would write around it."""
    if variant == "gemm":
        return through_jax.gemm(GEMM_SIZE)
    naive = NAIVE[cell, variant]
    batch, _, units = problem.reference.shape

    def forward(params, inputs):
        step = naive.step(params)

        def body(states, x):
            output, states = step(x, states)
            return states, output

        states = [jnp.zeros((batch, units))] * STATES[cell]
        _, outputs = lax.scan(body, states, jnp.swapaxes(inputs, 0, 1))
        return jnp.swapaxes(outputs, 0, 1)

    return through_jax.candidate(forward, naive.arrange(problem.weights), problem)


if __name__ == "__main__":
    through_jax.serve_jax(build)
