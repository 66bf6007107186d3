"""Whether the results of a step gain by its passes, and what was measured to say so.

A gradient gains by one contraction for each weight. Results alone may come from plain `lax.scan`
just as soon, compiled in half the time.
"""

import math
from collections.abc import Iterable
from typing import Any

from jaxrnn import _device
from jaxrnn._equations import cut_axis, is_free, is_heavy, multiply_adds, rows_of_each_matrix
from jaxrnn._fission import Plan
from jaxrnn._jaxpr import LOOPS_ARE_KERNELS, Atom, Equation, Var, shape, size, variables
from jaxrnn._primitives import (
    FACTORISATIONS,
    RANDOM,
    conv_general_dilated_p,
    dot_general_p,
    gather_p,
)

# Terms of a sum that takes a CPU longer than to write and read its result.
_LONG_SUM = 64
# Terms of the numbers that a product makes from which on several cores gain more than the cache.
_MANY_TERMS = 128
# Rows of each of several matrices up to which to bring those of all steps together gains.
_FEW_ROWS = 2
# Numbers of a matrix; a CPU's product with a larger one XLA shares out among cores, in a loop, too.
_ON_ONE_CORE = 1 << 16


def only_for_gradients(plan: Plan, time: int, chunk: Any, remat: bool, method: str) -> bool:
    """Whether plain `lax.scan` has the results just as soon, and only a gradient gains."""
    if remat or chunk != "auto" or method != "auto" or _device.gpu() is not None:
        return False
    if any(map(is_heavy, plan.invariant.equations)):
        return False
    if _is_soon_done(plan, time):
        return True
    gaining = [e for e in plan.in_passes if is_heavy(e) and _gains(e, plan, time)]
    # What gains and is no product does so whatever stays in the loop.
    return all(map(multiply_adds, gaining)) and (not gaining or _is_little(plan))


def _is_soon_done(plan: Plan, time: int) -> bool:
    """Whether what leaves the loop takes no longer than to wake another core.

    XLA shares out what can run side by side, such as the products of a pass, among threads; a loop
    stays on one. Measured on a CPU, on random networks: with one sample and fewer than 2**20
    multiply-adds that leave the loop in all, results were 0.74 times as fast by passes (0.41 to
    1.14), on a single core just as fast; and 0.87 times in 7 steps. In 20 steps of several samples
    it was 1.15 times: each of their products in a loop is a kernel to start. Loops that are left
    without a product gained, too.
    """
    heavy = [e for e in plan.in_passes if is_heavy(e)]
    if not all(multiply_adds(e) or e.primitive is gather_p for e in heavy):
        return False
    if not any(map(multiply_adds, plan.in_loops)):
        return False
    work = time * sum(map(multiply_adds, heavy))
    return work < 1 << 24 if time < 16 else work < 1 << 20 and has_one_row(plan)


def has_one_row(plan: Plan) -> bool:
    """Whether the products that leave the loop have one row each to multiply, as of one sample."""
    products = filter(multiply_adds, plan.in_passes)
    rows = [multiply_adds(e) // weights for e in products if (weights := _weights(e, plan))]
    return max(rows, default=0) == 1


def _gains(equation: Equation, plan: Plan, time: int) -> bool:
    """Whether something that leaves the loop runs faster outside.

    Measured on a CPU: a factorisation gains if there are several at each step. A gather is one
    instead of one per step, but not worth it for a product that would rather stay: with an
    embedding before their gates, results of 32 samples were 0.86 to 1.02 times as fast by passes.
    Random bits gain twice as much where each operation of a loop is called; where the loop is one
    kernel, fewer than 2**12 numbers in all were 0.6 to 1.3 times as fast.
    """
    made = equation.outvars[0]
    if equation.primitive in RANDOM:
        return not LOOPS_ARE_KERNELS or time * size(made) >= 1 << 12
    if equation.primitive in FACTORISATIONS:
        return any(n != 1 for n in shape(equation.invars[0])[:-2])
    if equation.primitive is gather_p:
        readers = [e for e in plan.in_passes if made in variables(e.invars)]
        return not readers or any(not multiply_adds(e) or _product_gains(e, plan) for e in readers)
    return _product_gains(equation, plan)


def _product_gains(equation: Equation, plan: Plan) -> bool:
    """Whether a product, or a convolution, runs faster outside.

    Measured on a CPU: a product of 128 rows with a small matrix is as fast in a loop, and one of 32
    rows beside the loop's own, up to larger matrices if both cores do not gain; so is a convolution
    of up to 2**18 multiplications. Matrices of more than 2**16 numbers XLA shares out among cores
    in a loop, too: without gates, which take longer in the loop than their product's rows to be
    written and read, steps of 32 rows and more were 0.74 to 1.09 times as fast by passes. Sums of 2
    to 48 terms take less time than their results to be written and read again; of one term and with
    several rows XLA is slow at them. If products stand in several loops, as in layers written as
    one step, it takes two rows and the matrix may be large: a second loop costs what the moved
    products save. What is taken out of a product of a concatenation leaves one behind that takes
    almost as long (0.66 to 1.07 times as fast), unless it is most of it; or one row and at most
    1 MiB of weights. With a matrix for each sample or head, 1 or 2 rows of each made 1.0 to 1.6
    times as fast, 4 and more 0.3 to 0.9 times.
    """
    work = multiply_adds(equation)
    if (rows_of_each_matrix(equation, lambda v: plan.times[v] == -1) or 0) > _FEW_ROWS:
        return False
    if equation.primitive is conv_general_dilated_p:
        return work > 1 << 18
    weights, count = _weights(equation, plan), terms(equation)
    if others := _terms_beside(equation, plan):
        whole = weights + weights * others // max(count, 1)
        return count >= 2 * others or (work == weights and whole <= 1 << 18)
    if 1 < count < _LONG_SUM or (count == 1 and work == weights):
        return False
    held = sum(any(map(multiply_adds, loop.program.equations)) for loop in plan.loops)
    beside = 1 << 13 if count >= _MANY_TERMS or work > 1 << 21 else 1 << 15
    rows, small = {0: (128, 1 << 13), 1: (32, beside)}.get(held, (2, math.inf))
    large = math.inf if held != 1 or _makes_gates(plan) else _ON_ONE_CORE
    return not work or work < rows * weights or small < weights <= large


def _makes_gates(plan: Plan) -> bool:
    """Whether a product in a loop makes more numbers for each row than it is the sum of."""
    products = filter(multiply_adds, plan.in_loops)
    return any(_weights(e, plan) > terms(e) ** 2 for e in products)


def wants_the_cache(plan: Plan) -> bool:
    """Whether results are to be in blocks for the cache, and not in long ones that wake no core.

    No core is idle where a product that stays in a loop is shared out among them; one of a row is
    not. Measured: LSTM and GRU of 256 units were 1.0 to 1.15 times as fast so with wide vectors,
    and 0.8 to 1.0 times without.
    """
    if not _device.has_wide_vectors():
        return False
    products = filter(multiply_adds, plan.in_loops)
    return any(_ON_ONE_CORE < _weights(e, plan) < multiply_adds(e) for e in products)


def _weights(equation: Equation, plan: Plan) -> int:
    """The numbers of the operand that is the same at every step; 0 if there is none."""
    return next((size(v) for v in variables(equation.invars) if plan.times[v] == -1), 0)


def _terms_beside(product: Equation, plan: Plan) -> int:
    """How many terms a loop adds to those of a product, if the step had one product for both."""
    if product.primitive is not dot_general_p:
        return 0
    (_, axes), _ = product.params["dimension_numbers"]
    equations = [*plan.invariant.equations, *plan.in_passes, *plan.in_loops]
    parts = {v: e.invars[0] for e in equations if cut_axis(e) is not None for v in e.outvars}

    def whole(atom: Atom) -> Atom:
        while isinstance(atom, Var) and atom in parts:
            atom = parts[atom]
        return atom

    matrix = product.invars[1]
    in_loops = [e.invars[1] for e in plan.in_loops if e.primitive is dot_general_p]
    if len(axes) != 1 or not any(whole(other) is whole(matrix) for other in in_loops):
        return 0
    lengths = [shape(atom)[axes[0]] for atom in (whole(matrix), matrix)]
    return lengths[0] - lengths[1] if all(isinstance(n, int) for n in lengths) else 0


def _is_little(plan: Plan) -> bool:
    """Whether what leaves the loop is little beside what stays.

    A tenth of the work is what can be won then, at most. Or it makes few rows for states that are
    much larger, such as matrices: measured on a CPU, XLA then does worse at the updates of these
    (test-time training took 2.8 times as long). So it does where the loop spreads a row over a
    matrix for each sample, of 128 KiB in all and more (a matrix LSTM took 1.4 times as long).
    """
    passes = plan.in_passes
    if any(terms(e) == 1 for e in passes):
        return False
    leaves = sum(map(multiply_adds, passes))
    stays = sum(multiply_adds(e) or size(e.outvars[0]) for e in plan.in_loops if not is_free(e))
    if 10 * leaves < stays or leaves < 25 * _spread(plan):
        return True
    rows = sum(size(v) for loop in plan.loops for v in loop.xs)
    before_loops = not any(multiply_adds(e) for s in plan.stages[1:] for e in s.program.equations)
    return before_loops and sum(map(size, plan.carries)) >= 16 * rows


def _spread(plan: Plan) -> int:
    """The numbers, if many, of what loops make by repeating rows that they are given."""
    spread: dict[Var, int] = {}
    rows = {
        v for loop in plan.loops for v in loop.program.invars[len(loop.consts) + len(loop.carry) :]
    }
    for equation in plan.in_loops:
        made = size(equation.outvars[0])
        for v in rows.intersection(variables(equation.invars)):
            if made >= max(16 * size(v), 1 << 15):
                spread[v] = max(made, spread.get(v, 0))
    return sum(spread.values())


def terms(product: Equation) -> int:
    """How many terms each number that a product makes is the sum of."""
    return multiply_adds(product) // max(size(product.outvars[0]), 1)


def take_all_cores(passes: Iterable[Equation]) -> bool:
    """Whether there is a product among those in passes that all cores of a CPU have work with."""
    return max(map(terms, filter(multiply_adds, passes)), default=0) >= _MANY_TERMS
