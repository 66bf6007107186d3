"""Sums of products without the axes of one that a lone sample leaves.

XLA on a CPU gives a sum of 4096 numbers and more to a library, with the products that it sums up.
With JAX 0.10 it took 3 to 25 times as long if these had an axis of one: 10 ns for each. From 0.11
on it is as fast either way.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxrnn._device import is_lone_cpu
from jaxrnn._equations import is_arithmetic
from jaxrnn._jaxpr import UNITS_SLOW_DOWN_SUMS, Equation, bind, shape, size
from jaxrnn._primitives import reduce_sum_p

# Numbers of which XLA makes a sum by itself.
_FEW = 1 << 12


def bind_without_units(
    equation: Equation,
    transposed: bool,
    axes: Sequence[int | None],
    rows: int,
    operands: Sequence[Any],
) -> list[Any]:
    """Applies the primitive of `equation` to `operands`, to one row of them under `vmap`.

    Args:
        equation: what to apply.
        transposed: whether it will be, so that the cotangent of an operand that is repeated, along
            an axis of the result or for all rows, is a sum.
        axes: as for `vmap`: None for an operand that is the same for all rows.
        rows: how many there are.
        operands: of one row.

    Returns:
        The results, of the same shapes as from `bind`.
    """
    is_sum = equation.primitive is reduce_sum_p
    whole = equation.invars[0] if is_sum else equation.outvars[0]
    units = tuple(i for i, n in enumerate(shape(whole)) if n == 1)
    if not units or rows * size(whole) < _FEW or not (UNITS_SLOW_DOWN_SUMS and is_lone_cpu()):
        return bind(equation, operands)
    params = equation.params
    if is_sum:
        kept = [i for i in range(len(shape(whole))) if i not in units]
        params = params | {"axes": tuple(kept.index(i) for i in params["axes"] if i in kept)}
    elif not (transposed and _repeats(equation, axes)):
        return bind(equation, operands)
    lean = [
        jnp.squeeze(x, units) if shape(a) else x
        for a, x in zip(equation.invars, operands, strict=True)
    ]
    (result,) = bind(equation.replace(params=params), lean)
    return [result.reshape(shape(equation.outvars[0]))]


def _repeats(equation: Equation, axes: Sequence[int | None]) -> bool:
    """Whether work on each element takes an operand several times."""
    made = shape(equation.outvars[0])
    return is_arithmetic(equation) and any(
        shape(a) and (axis is None or shape(a) != made)
        for a, axis in zip(equation.invars, axes, strict=True)
    )
