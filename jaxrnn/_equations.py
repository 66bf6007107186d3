"""What is known of an equation: what it computes, what it costs, what it hides."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn._jaxpr import (
    SPELLED_OUT,
    Equation,
    Var,
    dtype,
    inner_equations,
    is_inexact,
    length,
    shape,
    size,
)
from jaxrnn._primitives import (
    ARITHMETIC,
    FREE,
    HEAVY,
    INLINED,
    LINEAR,
    LISTED,
    OWN_RULES,
    PINNED,
    PRODUCTS,
    SLOPE_BY_OUTPUT,
    SLOW,
    TRANSCENDENTAL,
    conv_general_dilated_p,
    dot_general_p,
    key_conversions,
    scan_p,
    slice_p,
    split_p,
)
from jaxrnn._sharding import is_split


def with_inner(equations: Iterable[Equation]) -> Iterator[Equation]:
    """All equations, each followed by those of the functions that it calls."""
    for equation in equations:
        yield equation
        yield from with_inner(inner_equations(equation))


def is_heavy(equation: Equation) -> bool:
    """Whether `equation` earns a pass of its own over a block of time: it holds a product.

    So do convolutions, factorisations, Fourier transforms, inner loops and random bits; a gather,
    because its transpose is a scatter into the whole table.
    """
    return any(e.primitive in HEAVY for e in with_inner([equation]))


def multiply_adds(equation: Equation) -> int:
    """The multiplications of a matrix product or convolution; 0 for anything else."""
    if equation.primitive not in PRODUCTS:
        return 0
    lhs, rhs = equation.invars[:2]
    if equation.primitive is dot_general_p:
        (contracted, _), _ = equation.params["dimension_numbers"]
        per_output = math.prod(length(shape(lhs)[axis]) for axis in contracted)
    else:
        outputs = equation.params["dimension_numbers"].rhs_spec[0]
        per_output = size(rhs) // max(shape(rhs)[outputs], 1)
    return per_output * size(equation.outvars[0])


def rows_of_each_matrix(product: Equation, is_fixed: Callable[[Var], bool]) -> int | None:
    """How many rows meet each matrix where a fixed operand has several, one for each sample, say.

    0 if it has one; None if no operand is fixed.
    """
    sides = [i for i, v in enumerate(product.invars) if isinstance(v, Var) and is_fixed(v)]
    if not sides or product.primitive is not dot_general_p:
        return 0 if sides else None
    contracted, batch = product.params["dimension_numbers"]
    if not batch[0]:
        return 0

    def rows(side: int) -> int:
        taken = {*contracted[side], *batch[side]}
        lengths = enumerate(shape(product.invars[side]))
        return math.prod(length(n) for axis, n in lengths if axis not in taken)

    return min(rows(1 - side) for side in sides)


def product_options(equation: Equation, *, swapped: bool) -> dict[str, Any]:
    """The parameters of a matrix product but for its axes; with its operands `swapped`."""
    options = {name: x for name, x in equation.params.items() if name != "dimension_numbers"}
    precision = options["precision"]
    if swapped and isinstance(precision, tuple):  # of both operands, or a `DotAlgorithm`
        order = (1, 0, 2, 4, 3, 5, 6)[: len(precision)]
        options["precision"] = getattr(precision, "_make", tuple)(precision[i] for i in order)
    return options


def can_run_batched(equation: Equation) -> bool:
    """Whether many steps of `equation` may be run at once, by `vmap`.

    Under `vmap` a branch becomes a selection and a `while` runs until the last one is done: both
    may cost more than they save, and differentiate differently. Random bits of generators other
    than threefry depend on the batching. The tangent of a `custom_vjp` function knows no `vmap`. Of
    primitives that JAX does not list nothing is known. Under `vmap` a convolution merges axes, and
    those that are split over an explicit mesh forbid it.
    """
    if equation.primitive in PINNED or any(
        "rbg" in str(getattr(atom.aval, "dtype", "")) for atom in equation.invars
    ):
        return False
    if equation.primitive is conv_general_dilated_p and is_split(equation):
        return False
    known = equation.primitive in LISTED | SPELLED_OUT.keys() | key_conversions() | {split_p}
    return known and all(map(can_run_batched, inner_equations(equation)))


def is_free(equation: Equation) -> bool:
    """Whether `equation` only arranges data: cheaper to repeat than to carry what it makes."""
    return equation.primitive in FREE | key_conversions()


def is_arithmetic(equation: Equation) -> bool:
    """Whether `equation` is what gates are made of: arithmetic, or an activation function."""
    return equation.primitive in ARITHMETIC


def is_transcendental(equation: Equation) -> bool:
    """Whether `equation` is an exponential, a root or the like, worth many sums or products."""
    return equation.primitive in TRANSCENDENTAL


def is_slow(equation: Equation) -> bool:
    """Whether `equation` is a special function or the like, not to be computed twice."""
    return equation.primitive in SLOW and is_inexact(equation.outvars[0])


def is_linear(equation: Equation) -> bool:
    """Whether the derivative of `equation` needs none of its operands.

    For a selection this leaves the predicate out: it has no derivative.
    """
    return equation.primitive in LINEAR


def slope_by_output(equation: Equation) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """`(y, dx) -> dy` for a function whose derivative can be told from its result y alone."""
    return SLOPE_BY_OUTPUT.get(equation.primitive)


def is_of_another_width(equation: Equation) -> bool:
    """Whether numbers are wider than is allowed outside a context that the body has entered."""
    allowed = jnp.result_type(float).itemsize
    inside = inner_equations(equation)
    return any(map(is_of_another_width, inside)) or any(
        not jnp.issubdtype(dtype(a), jax.dtypes.extended)
        and dtype(a).itemsize > allowed * (1 + jnp.issubdtype(dtype(a), jnp.complexfloating))
        for a in (*equation.invars, *equation.outvars)
    )


def column_ranges(equation: Equation) -> list[tuple[int, int]] | None:
    """The ranges of the last axis that a slice or split takes, if it cuts no other axis."""
    axis, params = cut_axis(equation), equation.params
    if axis is None or axis != len(shape(equation.invars[0])) - 1:
        return None
    if equation.primitive is slice_p:
        return [(params["start_indices"][axis], params["limit_indices"][axis])]
    stops = list(itertools.accumulate(params["sizes"]))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def cut_axis(equation: Equation) -> int | None:
    """The axis of which a slice or split takes ranges, if it cuts no other axis.

    The last one, if a slice takes everything.
    """
    params = equation.params
    if equation.primitive is split_p:
        return int(params["axis"])
    if equation.primitive is not slice_p or not set(params["strides"] or ()) <= {1}:
        return None
    whole = shape(equation.invars[0])
    ends = zip(params["start_indices"], params["limit_indices"], strict=True)
    cut = [axis for axis, end in enumerate(ends) if end != (0, whole[axis])]
    if not whole or len(cut) > 1:
        return None
    return cut[0] if cut else len(whole) - 1


def take_ranges(array: jax.Array, cuts: Sequence[tuple[int, int]], axis: int) -> list[jax.Array]:
    """Ranges of an axis; by one split if possible, whose transpose is one concatenation."""
    stops = [stop for _, stop in cuts]
    if [0, *stops[:-1]] == [start for start, _ in cuts] and stops[-1] == array.shape[axis]:
        return list(lax.split(array, [stop - start for start, stop in cuts], axis))
    return [lax.slice_in_dim(array, start, stop, axis=axis) for start, stop in cuts]


def calls(equation: Equation) -> bool:
    """Whether `equation` is a call, which `inline` by `without_rule` replaces by the function."""
    return equation.primitive in INLINED.keys() | OWN_RULES


def has_own_rule(equation: Equation) -> bool:
    """Whether `equation` calls a `custom_jvp` or `custom_vjp` function."""
    return any(e.primitive in OWN_RULES for e in with_inner([equation]))


def hidden_multiply_adds(equation: Equation) -> int:
    """The multiply-adds of all rounds of a loop; 0 of anything else."""
    if equation.primitive is not scan_p:
        return 0
    inner = with_inner(inner_equations(equation))
    return equation.params["length"] * sum(map(multiply_adds, inner))


def hides_product(equation: Equation) -> bool:
    """Whether `equation` is a call or a loop with a product inside."""
    return any(map(multiply_adds, with_inner(inner_equations(equation))))
