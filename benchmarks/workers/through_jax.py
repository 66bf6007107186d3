"""What all JAX libraries have in common: forward and gradient of a function, compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array

from benchmarks.compiled import compile_call
from benchmarks.problem import Problem
from benchmarks.worker import Call, Candidate, Library, serve


def candidate(
    forward: Callable[[Any, Array], Array],
    params: Any,
    problem: Problem,
    math: str = "reference",
) -> Candidate:
    """Compiles `forward(params, inputs) -> outputs` and its gradient by both arguments."""
    params = jax.tree.map(jnp.asarray, params)
    inputs = jnp.asarray(problem.inputs)

    def loss(params, inputs, loss_weights):
        return jnp.mean(forward(params, inputs) * loss_weights)

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    return Candidate(
        calls={
            "forward": _call(forward, params, inputs),
            "gradient": _call(gradient, params, inputs, jnp.asarray(problem.loss_weights)),
        },
        input_gradient=lambda result: np.asarray(result[1][1]),
        math=math,
    )


def gemm(size: int) -> Candidate:
    """One matmul of [size, size] by [size, size]."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((size, size), np.float32)) for _ in range(2))
    return Candidate(calls={"forward": _call(jnp.matmul, a, b)}, math=None)


def _call(function: Callable[..., Any], *arguments: Any) -> Call:
    compiled = compile_call(function, *arguments)
    return Call(compiled.call, compiled.compile_s, compiled.compile_again, compiled.temp_bytes)


def serve_jax(build: Callable[[str, str, Problem], Candidate], **versions: str) -> None:
    """Serves a library on JAX, once the compiler itself has been loaded."""
    # The first compilation of a process pays for the start of LLVM; it is not the library's.
    compile_call(jnp.matmul, jnp.ones((2, 2)), jnp.ones((2, 2)))
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__} | versions
    serve(Library(build, versions, jax.devices()[0].device_kind))
