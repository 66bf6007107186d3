"""Which operations treat each sample, a row of the first axis, by itself."""

from jaxrnn._equations import calls
from jaxrnn._jaxpr import Equation, inner_equations, shape
from jaxrnn._primitives import (
    ELEMENTWISE,
    REDUCTIONS,
    broadcast_in_dim_p,
    concatenate_p,
    dot_general_p,
    gather_p,
    reshape_p,
    slice_p,
    split_p,
    squeeze_p,
    transpose_p,
)


def keeps_first_axis(equation: Equation) -> bool:
    """Whether `equation` only arranges what stands in a row."""
    primitive, params = equation.primitive, equation.params
    if primitive is squeeze_p:
        return 0 not in params["dimensions"]
    if primitive is transpose_p:
        return params["permutation"][0] == 0
    if primitive is concatenate_p:
        return params["dimension"] > 0
    if primitive is split_p:
        return params["axis"] > 0
    if primitive in (reshape_p, slice_p):
        return shape(equation.outvars[0])[:1] == shape(equation.invars[0])[:1]
    return False


def is_by_sample(equation: Equation, operand: int) -> bool:
    """Whether a row of an operand is read for the same row of the results alone."""
    primitive, params = equation.primitive, equation.params
    rows = shape(equation.invars[operand])[:1]
    if not rows or any(shape(v)[:1] != rows for v in equation.outvars):
        return False
    if primitive is dot_general_p:
        contracted, batch = params["dimension_numbers"]
        keeps = batch[operand][0] == 0 if batch[0] else operand == 0 and 0 not in contracted[0]
    elif primitive is gather_p:
        numbers = params["dimension_numbers"]
        batch = numbers.operand_batching_dims, numbers.start_indices_batching_dims
        keeps = all(axes[:1] == (0,) for axes in batch) and 0 not in numbers.offset_dims
    elif primitive is broadcast_in_dim_p:
        keeps = params["broadcast_dimensions"][0] == 0
    elif primitive in REDUCTIONS:
        keeps = 0 not in params["axes"]
    elif calls(equation):
        inner = inner_equations(equation)
        keeps = all(is_by_sample(e, i) for e in inner for i, a in enumerate(e.invars) if shape(a))
    else:
        keeps = primitive in ELEMENTWISE or keeps_first_axis(equation)
    return keeps
