"""How a step is run, and whether apart at all, and what was measured to decide it so."""

import importlib.util
from typing import Any

import jax

from jaxrnn import _device
from jaxrnn._block_length import (
    are_memories,
    blocks_of_threads,
    bytes_of,
    bytes_of_states,
    largest,
    recomputed_block,
)
from jaxrnn._checkpoints import not_to_be_kept
from jaxrnn._equations import (
    can_run_batched,
    hidden_multiply_adds,
    is_free,
    is_heavy,
    multiply_adds,
)
from jaxrnn._fission import Plan, Purpose
from jaxrnn._gains import has_one_row
from jaxrnn._jaxpr import (
    Equation,
    Program,
    Var,
    differentiable,
    is_inexact,
    shape,
    size,
    size_in_bytes,
    variables,
)
from jaxrnn._kernel import plan_kernel
from jaxrnn._primitives import (
    EXTREMES,
    FACTORISATIONS,
    INDEXED,
    READS,
    WRITES,
    dot_general_p,
    lu_p,
    sort_p,
)
from jaxrnn._schedule import earns_a_pass
from jaxrnn._split_gates import KernelMisfitError


def why_not_worthwhile(plan: Plan, time: int, chunk: int | str | None) -> str | None:
    """Why what can be moved does not pay for the passes over blocks; None if it does.

    Measured on a CPU: a GRU of 4 units lost, one of 16 did not. The derivative of an
    eigendecomposition or the like decomposes once more, from whatever is kept: with more than 8
    rows gradients took 1.1 to 2 times as long. That of a sort sorts once more: with 400 to 2500
    multiply-adds for each number gradients were 0.5 to 1.2 times as fast, with 8700 1.4 to 1.7.
    That of a maximum compares once more: with 1 to 4 multiply-adds for each term (Viterbi's
    algorithm) gradients were 0.78 to 0.93 times as fast, with 16 as fast. A cache that each step
    writes a part of, and that is kept whole for the gradient: from 256 KiB on, with less than a
    multiply-add outside the loop for each byte, that was all (0.94 to 1.03 times as fast, in JAX
    0.12 0.77 to 0.99). Gradients of one step of random networks were 0.66 to 1.09 times as fast;
    with one sample and little work in 3 to 7 steps 0.56 to 1.12 times, in 12 steps 0.93 to 1.28.
    Where products stay, each of a matrix for each sample or of two states, gradients were 0.8 to
    1.2 times as fast. With most products in loops of the step's own (substeps of a solver) they
    were 0.83 to 1.0 times. On a GPU unrolling gains by itself.
    """
    if time == 1:
        return "one step has nothing to share with others"
    if _device.gpu() is not None:
        return None
    equations = plan.body.equations
    leaves, work = (sum(map(multiply_adds, part)) for part in (plan.in_passes, equations))
    written = {v for e in equations if e.primitive in WRITES for v in variables(e.invars[:1])}
    kept = sum(_bytes_kept(plan.body, cache) for cache in plan.carries if cache in written)
    is_large = kept >= 1 << 18 and leaves < kept
    hidden = sum(map(hidden_multiply_adds, plan.in_loops))
    factorised = [e.invars[0] for e in equations if e.primitive in FACTORISATIONS - {lu_p}]
    ordered = [e.invars[0] for e in equations if e.primitive is sort_p]
    numbers = sum(size(v) for v in ordered if is_inexact(v))
    compared = sum(size(e.invars[0]) for e in _maxima(plan.body))
    heavy = [e for e in equations if is_heavy(e) and can_run_batched(e)]
    products = list(filter(multiply_adds, heavy))
    are_small = len(products) == len(heavy) and sum(map(multiply_adds, products)) < 2048
    reasons = {
        "there is too little work, of one sample and few steps": time < 8
        and time * leaves < 1 << 20
        and has_one_row(plan),
        "a large cache that is written at each step would be kept whole": is_large
        and not recomputed_block(plan, time, chunk, remat=False),
        "too little leaves the loop beside what loops in it hold": 4 * leaves < hidden,
        "the gradient would decompose matrices once more": any(
            shape(v)[-2] > 8 for v in factorised
        ),
        "the gradient would sort once more": work < numbers << 12,
        "the gradient would compare once more": work < compared << 4,
        "no matmul can leave the loop, nor the gradient of a matrix": _keeps_products_in(plan),
        "the products that can leave the loop are too small": are_small,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _keeps_products_in(plan: Plan) -> bool:
    """Whether all that is heavy are products in loops, by no matrix that samples share."""
    heavy = [e for e in plan.body.equations if is_heavy(e)]
    return all(e.primitive is dot_general_p for e in heavy) and not any(
        earns_a_pass(e, {v for v in variables(e.invars) if plan.times[v] == -1}) for e in heavy
    )


def _bytes_kept(body: Program, cache: Var) -> int:
    """How much of a cache its step's gradient needs: what is read of it, or all of it."""
    held, read = {cache}, set[Var]()
    for equation in body.equations:
        if held.isdisjoint(variables(equation.invars)):
            continue
        if equation.primitive in READS:
            read |= set(equation.outvars)
        elif is_free(equation) or equation.primitive in INDEXED:
            held |= set(equation.outvars)
        else:
            return size_in_bytes(cache)
    return min(bytes_of(read), size_in_bytes(cache))


def _maxima(body: Program) -> list[Equation]:
    """The maxima and minima in a body that have a derivative."""
    found = differentiable(body)
    return [e for e in body.equations if e.primitive in EXTREMES and e.outvars[0] in found]


def is_soon_made_again(plan: Plan, time: int, chunk: int | str | None) -> bool:
    """Whether passes soon make what is under a checkpoint, for all steps of a block at once.

    Measured on a CPU, where `lax.scan` runs that again step by step: gradients of 38 kinds of steps
    were 1.0 to 5 times as fast (1.4 in the mean), of random networks 0.9 to 2.8 times. Not so if it
    makes much more than the states, in a cache that a pass does not fit into (a hidden Markov
    model, 0.85 to 0.97), or reads large memories (test-time training, 0.7 to 1.1).
    """
    marked, states = not_to_be_kept(plan.body), bytes_of_states(plan)
    if not marked:
        return True
    made = (v for e in plan.body.equations if not is_free(e) for v in e.outvars)
    if largest(v for v in made if v in marked and plan.times[v] != -1) >= 32 * states:
        return False
    large = time * states >= 32 << 20 and are_memories(plan)
    return not large or recomputed_block(plan, time, chunk, remat=False) > 0


def kernels_pay(method: str) -> bool:
    """Whether kernels are to be used wherever they fit: asked for, or measured to be faster.

    That was on an H100. Over several devices the compiler splits loops, but not kernels.
    """
    if method == "fused":
        return True
    device = _device.gpu() if method == "auto" and jax.device_count() == 1 else None
    if device is None or device.compute_capability != "9.0":
        return False
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def fits_kernel(plan: Plan, method: str) -> bool:
    """Whether recurrences are to be run as one kernel each.

    Raises:
        ValueError: if this is asked for and one does not fit.
    """
    if not kernels_pay(method):
        return False
    if method != "fused" and blocks_of_threads(plan) > _device.gpu().core_count:
        return False  # they would not run all at once
    try:
        for loop in plan.loops:
            plan_kernel(loop.program, len(loop.consts), len(loop.carry))
    except KernelMisfitError as error:
        if method != "fused":
            return False
        raise ValueError(
            f"method='fused': the recurrence cannot run as one kernel: {error}. "
            "Use method='auto' or 'sequential'."
        ) from None
    return bool(plan.loops)


def samples_last_pay(
    samples: Any,
    weights: int,
    has_gates: bool,
    purpose: Purpose,
    is_even: bool,
    has_pass: bool,
) -> bool:
    """Whether a loop gains by holding its states with the samples on the last axis.

    Measured on a CPU: small matrices stay in the cache and are brought into order soon, and with
    many samples that is little beside the product. Then only gates gain, which need not be written
    by a pass and read again. In short transposes, of fewer than 32 samples, XLA is slow at what is
    elementwise; and results of LSTM and GRU of 256 units, 1.26 to 1.47 times as fast as with
    `lax.scan` on two machines, were 0.68 to 1.08 times on a third, but 0.94 to 1.17 times by rows.
    With wide vectors nothing gains: of 384 and 512 units gradients took 1.0 to 1.3 times as long.
    A tangent's rows have to be transposed for it, and that pays later still. So does a loop that
    takes a pass in, if that had work for all cores: LSTM and GRU of 128 units and features were
    1.04 to 1.11 times as fast with it, the LSTM of 256 units 0.71 to 0.89 times. For results
    alone, which have long blocks, passes are as fast from 512 KiB of weights on.

    Args:
        samples: their number, or what stands for it.
        weights: the bytes of the matrices in the loop.
        has_gates: whether products of states make half as many numbers again as they take, and
            more. Layers of a network do not, with which results were 0.87 to 1.01 times as fast.
        purpose: what the loop is for.
        is_even: whether arrays are held as rows and not as transposes, see `Form`.
        has_pass: whether the loop had otherwise passes beside it, with work for all cores.
    """
    if not _device.is_lone_cpu() or _device.has_wide_vectors():
        return False
    least = 8 if is_even and purpose != "results" else 32
    if not isinstance(samples, int) or samples % 8 or not least <= samples <= 64:
        return False
    if purpose == "tangent":
        return is_even and weights >= 2 << 20
    if not has_gates:
        return weights >= 2 << 20
    is_soon = is_even and samples > 8 and not has_pass
    if is_soon and (purpose == "residuals" or weights < 1 << 19):
        return weights >= 1 << 18
    return weights >= 7 << 17
