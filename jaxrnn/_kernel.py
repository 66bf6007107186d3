"""What fits into a kernel: a recurrence written so that a GPU can hold all of it, or why not.

A kernel runs all steps of a recurrence by itself, for a few samples, with the weights on the chip.
Its compiler knows products of two matrices, work on each element, sums and maxima over features,
and sizes that are powers of two; it cannot cut an array in pieces. So a product that is split into
gates becomes a product per gate, with a part of the weights each, and what is split after
elementwise work is split before it. What does not depend on time is made outside.
"""

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrnn import _device
from jaxrnn._equations import calls, column_ranges
from jaxrnn._jaxpr import (
    Atom,
    Equation,
    Literal,
    Program,
    Var,
    dependents,
    dtype,
    inline,
    shape,
    size,
    size_in_bytes,
    trace,
    variables,
    without_rule,
)
from jaxrnn._primitives import (
    IN_KERNELS,
    broadcast_in_dim_p,
    dot_general_p,
    reduce_max_p,
    reduce_sum_p,
    reshape_p,
    select_n_p,
    squeeze_p,
)
from jaxrnn._split_gates import KernelMisfitError, in_columns

Array = jax.Array

# Samples per kernel: the least number of rows that the matrix units multiply.
SAMPLES = 16

# The least height and width of a matrix that they multiply with.
_SMALLEST = 16

# Of what a multiprocessor holds, 227 KiB on an H100, some is for what is in flight.
_HOLDS, _IN_FLIGHT = 227 << 10, 35 << 10

# Wider was not measured.
_MAX_WIDTH = 256

_KNOWN = IN_KERNELS | {
    broadcast_in_dim_p,
    dot_general_p,
    reduce_max_p,
    reduce_sum_p,
    reshape_p,
    squeeze_p,
}
_CHOICE_OF_TWO = 3  # operands
_DTYPES = ("float32", "bfloat16", "float16", "int32", "bool")


class Kernel:
    """A recurrence that fits.

    Attributes:
        program: one step, `(consts, carry, x) -> (carry, y)`.
        consts: number of its consts.
        carry: number of its carries.
        batch: number of samples.
        batched: the variables whose first axis is that of the samples.
    """

    def __init__(self, program: Program, consts: int, carry: int):
        self.program, self.consts, self.carry = program, consts, carry
        self.batch, self.batched = _samples(program, consts, carry)
        _check_sizes(program, program.invars[:consts], self.batched)
        self._transposed: dict[frozenset[int], KernelPlan] = {}

    def transposed(self, linear: frozenset[int]) -> "KernelPlan":
        """The same recurrence backwards, for a program that is linear in its carry and some xs.

        Args:
            linear: which of the xs.

        Returns:
            `(consts; cotangents of the new carry; the other xs, cotangents of ys) ->
            (cotangents of the old carry; cotangents of the linear xs)`.

        Raises:
            KernelMisfitError: if that does not fit.
        """
        if linear not in self._transposed:
            self._transposed[linear] = self._transpose(linear)
        return self._transposed[linear]

    def _transpose(self, linear: frozenset[int]) -> "KernelPlan":
        program, n = self.program, self.consts
        inputs = [v.aval for v in program.invars]
        old, rows = inputs[n : n + self.carry], inputs[n + self.carry :]
        moved = [i for i in range(len(rows)) if i in linear]
        known = [i for i in range(len(rows)) if i not in linear]

        def backwards(*args: Array) -> list[Array]:
            consts, values = args[:n], args[n + self.carry :][: len(known)]
            cotangents = [*args[n : n + self.carry], *args[n + self.carry + len(known) :]]

            def step(carry: list[Array], xs: list[Array]) -> list[Array]:
                given = dict(zip([*known, *moved], [*values, *xs], strict=True))
                return program.run(*consts, *carry, *(given[i] for i in range(len(rows))))

            transpose = jax.linear_transpose(step, _structs(old), _structs(rows[i] for i in moved))
            return jax.tree.leaves(transpose(cotangents))

        outs = [v.aval for v in program.outvars]
        example = [
            *inputs[:n],
            *outs[: self.carry],
            *(rows[i] for i in known),
            *outs[self.carry :],
        ]
        traced = trace(backwards, *example)
        if traced.consts:
            raise KernelMisfitError("its transpose closes over an array")
        return plan_kernel(traced.program, n, self.carry)


class KernelPlan(NamedTuple):
    """How to call a kernel in place of a recurrence.

    Attributes:
        kernel: what to call.
        invariant: makes the kernel's consts of the recurrence's.
        columns: for each of the kernel's xs which of the recurrence's it is, and which columns.
    """

    kernel: Kernel
    invariant: Program
    columns: tuple[tuple[int, tuple[int, int] | None], ...]

    def columns_of(self, chosen: Container[int]) -> frozenset[int]:
        """Which of the kernel's xs are taken of the `chosen` ones among the recurrence's."""
        return frozenset(i for i, (x, _) in enumerate(self.columns) if x in chosen)

    def rows(self, xs: Sequence[Array]) -> list[Array]:
        """The kernel's xs."""
        return [
            xs[i] if cut is None else lax.slice_in_dim(xs[i], *cut, axis=-1)
            for i, cut in self.columns
        ]


def plan_kernel(program: Program, consts: int, carry: int) -> KernelPlan:
    """How to run a recurrence as a kernel.

    Args:
        program: one step, `(consts, carry, x) -> (carry, y)`.
        consts: number of consts.
        carry: number of carries.

    Raises:
        KernelMisfitError: if it can't be.
    """
    spelled_out = without_calls(program)
    if spelled_out is None:
        raise KernelMisfitError("a function that it calls closes over an array")
    program = spelled_out
    traced = trace(functools.partial(in_columns, program), *(v.aval for v in program.invars))
    program = traced.program
    if traced.consts:
        raise KernelMisfitError("it closes over an array")
    return _without_fixed(program, consts, carry)


def without_calls(program: Program) -> Program | None:
    """`program` with the functions that it calls in place of the calls, without their rules.

    None if one of them closes over an array.
    """
    while any(map(calls, program.equations)):
        traced = trace(
            functools.partial(inline, program, apply=without_rule),
            *(v.aval for v in program.invars),
        )
        if traced.consts:
            return None
        program = traced.program
    return program


def _without_fixed(program: Program, consts: int, carry: int) -> KernelPlan:
    """Moves out of a step what it makes of consts alone, and the columns taken of its xs."""
    old, xs = program.invars[consts : consts + carry], program.invars[consts + carry :]
    in_time = dependents(program, [*old, *xs])
    if any(isinstance(v, Literal) or v not in in_time for v in program.outvars):
        raise KernelMisfitError("a result of a step depends on neither its state nor its inputs")
    taken: dict[Var, tuple[int, tuple[int, int] | None]] = {v: (i, None) for i, v in enumerate(xs)}
    wanted, inner, fixed = set(variables(program.outvars)), [], []
    for equation in reversed(program.equations):
        operands = variables(equation.invars)
        if not wanted.intersection(equation.outvars):
            continue
        if equation.outvars[0] not in in_time:
            fixed.append(equation)
        elif operands[0] in xs and (cuts := column_ranges(equation)):
            row = xs.index(operands[0])
            taken |= {v: (row, cut) for v, cut in zip(equation.outvars, cuts, strict=True)}
            continue
        else:
            inner.append(equation)
        wanted.update(operands)
    rows = [v for v in taken if v in wanted]
    made = [*program.invars[:consts], *(v for e in reversed(fixed) for v in e.outvars)]
    read_inside = set(variables(a for e in inner for a in e.invars))
    given = [v for v in made if v in read_inside]
    step = program.cut([*given, *old, *rows], program.outvars, reversed(inner))
    return KernelPlan(
        Kernel(step, len(given), carry),
        program.cut(program.invars[:consts], given, reversed(fixed)),
        tuple(taken[v] for v in rows),
    )


def _samples(program: Program, consts: int, carry: int) -> tuple[int, frozenset[Var]]:
    """The number of samples, and the variables whose first axis is theirs."""
    carries = program.invars[consts : consts + carry]
    if not carries or any(not shape(v) for v in carries):
        raise KernelMisfitError("a state has no axis of samples")
    for equation in program.equations:
        _check_known(equation)
    batch = shape(carries[0])[0]
    if not isinstance(batch, int):
        raise KernelMisfitError("the number of its samples is symbolic")
    batched: dict[Var, bool] = {}

    def settle(v: Atom, yes: bool) -> None:
        if isinstance(v, Literal):
            return
        if batched.setdefault(v, yes) != yes or (yes and shape(v)[:1] != (batch,)):
            raise KernelMisfitError(f"an array {list(shape(v))} mixes samples or is shared by them")

    for v in (*carries, *program.outvars):
        settle(v, True)
    count = -1
    while count != len(batched):
        count = len(batched)
        for equation in (*program.equations, *reversed(program.equations)):
            _spread(equation, batched, batch, settle)
    return batch, frozenset(v for v, yes in batched.items() if yes)


def _check_known(equation: Equation) -> None:
    """Raises the error that an operation deserves which the compiler of kernels does not know."""
    if equation.primitive not in _KNOWN:
        raise KernelMisfitError(f"kernels do not support '{equation.primitive}'")
    if equation.primitive is select_n_p and len(equation.invars) > _CHOICE_OF_TWO:
        raise KernelMisfitError("kernels do not support a choice among more than two")
    if len(equation.params.get("axes", ())) > 1:
        raise KernelMisfitError(f"kernels do not support '{equation.primitive}' over several axes")


def _spread(
    equation: Equation, batched: dict[Var, bool], batch: int, settle: Callable[[Atom, bool], None]
) -> None:
    """Says of the variables of an equation what follows from the others of it."""
    [out], operands = equation.outvars, equation.invars
    if not any(_same_rows(equation, atom) for atom in operands):
        fills = equation.primitive is broadcast_in_dim_p and shape(out)[:1] == (batch,)
        settle(out, fills)
    alike: list[Atom] = [out]
    for atom in operands:
        if _same_rows(equation, atom):
            alike.append(atom)
        else:
            settle(atom, False)
    said = [batched[v] for v in variables(alike) if v in batched]
    for v in alike if said else ():
        settle(v, said[0])


def _same_rows(equation: Equation, operand: Atom) -> bool:
    """Whether each row of the result comes from the same row of `operand`."""
    [out], params = equation.outvars, equation.params
    if equation.primitive is dot_general_p:
        return operand is equation.invars[0]
    if equation.primitive in (reduce_sum_p, reduce_max_p):
        return 0 not in params["axes"]
    if equation.primitive is broadcast_in_dim_p and params["broadcast_dimensions"][:1] != (0,):
        return False
    return shape(operand)[:1] == shape(out)[:1] != ()


def _check_sizes(program: Program, consts: Sequence[Var], batched: frozenset[Var]) -> None:
    weights: dict[Var, int] = {}
    for v in (*program.invars, *(v for e in program.equations for v in e.outvars)):
        features = shape(v)[1:] if v in batched else shape(v)
        if size(v) == 0:
            raise KernelMisfitError(f"an array {list(shape(v))} is empty")
        if str(dtype(v)) not in _DTYPES:
            raise KernelMisfitError(f"an array {list(shape(v))} has dtype {dtype(v)}")
        if len(features) > 2 or any(n & (n - 1) or n == 0 for n in features):
            raise KernelMisfitError(f"the sizes of an array {list(shape(v))} are not powers of two")
    for equation in program.equations:
        if equation.primitive is dot_general_p:
            matrix = _matrix(equation, consts)
            weights[matrix] = size_in_bytes(matrix)
        elif max(shape(equation.outvars[0])[1:], default=0) > _MAX_WIDTH:
            raise KernelMisfitError(
                f"an array {list(shape(equation.outvars[0]))} has more than {_MAX_WIDTH} features"
            )
    taken, most = sum(weights.values()), _max_weights()
    if taken > most:
        raise KernelMisfitError(f"the weights take {taken >> 10} KiB; {most >> 10} at most")


def _max_weights() -> int:
    """How many bytes of weights a multiprocessor has room for; an H100's where there is no GPU."""
    return getattr(_device.gpu(), "shared_memory_per_block_optin", _HOLDS) - _IN_FLIGHT


def _matrix(equation: Equation, consts: Sequence[Var]) -> Var:
    """The weights of a product that a kernel can make."""
    rows, matrix = equation.invars
    if dtype(rows) != dtype(matrix) or not jnp.issubdtype(dtype(rows), jnp.floating):
        raise KernelMisfitError(f"a product of {dtype(rows)} with {dtype(matrix)}")
    precision = equation.params["precision"]
    if not (precision is None or isinstance(precision, tuple)):
        raise KernelMisfitError(f"a product by the algorithm {precision}")
    if not isinstance(matrix, Var) or matrix not in consts or min(shape(matrix)) < _SMALLEST:
        raise KernelMisfitError(
            f"a product with a matrix {list(shape(matrix))}, which must be the same at all steps, "
            f"and at least {_SMALLEST} wide and high"
        )
    return matrix


def _structs(avals: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
