"""The table of cases: every kind of step function that the library has to serve.

Each step is written once, as ``make_step(xp, params) -> step_function``, and runs under NumPy
(``xp=numpy``, for the plain-Python reference) as well as under JAX (``xp=jax.numpy``). Arguments
are drawn as NumPy arrays, batch-major. All axes have different lengths, so that no two of them can
be taken for each other unnoticed.

A new case joins every test that goes over ``CASES``:

    @case(params=lambda d: {"w": d.normal(FEATURES, UNITS)}, states=lambda d: [...])
    def my_step(xp, p):
        def step(x, states): ...
        return step
"""

# Each module enters its cases when it is imported.
from cases import layers, states
from cases.table import BATCH, CASES, TIME, Arguments, Case, Draw

__all__ = ["BATCH", "CASES", "TIME", "Arguments", "Case", "Draw", "layers", "states"]
