"""The naive steps on plain `jax.lax.scan`, which every JAX library has inside."""

from collections.abc import Callable

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
    batch, _, units = problem.reference.shape
    forward, arrange = forward_of(cell, variant, batch, units)
    return through_jax.candidate(forward, arrange(problem.weights), problem)


def forward_of(
    cell: str, variant: str, batch: int, units: int, dtype: str = "float32", unroll: int = 1
) -> tuple[Callable, Callable]:
    """`(params, inputs) -> outputs` of a naive step, and how weights are arranged for it."""
    naive = NAIVE[cell, variant]

    def forward(params, inputs):
        step = naive.step(params)

        def body(states, x):
            output, states = step(x, states)
            return states, output

        states = [jnp.zeros((batch, units), dtype)] * STATES[cell]
        _, outputs = lax.scan(body, states, jnp.swapaxes(inputs, 0, 1), unroll=unroll)
        return jnp.swapaxes(outputs, 0, 1)

    return forward, naive.arrange


if __name__ == "__main__":
    through_jax.serve_jax(build)
