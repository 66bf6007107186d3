"""What the engine decides by itself, and what was measured to decide it so."""

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import jax

from jaxrnn import _placement as placement
from jaxrnn._block import Steps
from jaxrnn._checkpoints import not_to_be_kept
from jaxrnn._columns import MisfitError
from jaxrnn._fission import How, Kind, Plan, shrinks
from jaxrnn._gains import has_one_row, wants_the_cache
from jaxrnn._jaxpr import (
    Atom,
    Var,
    hides_product,
    is_free,
    is_heavy,
    is_movable,
    is_transcendental,
    multiply_adds,
    shape,
    size,
    size_in_bytes,
    variables,
)
from jaxrnn._kernel import SAMPLES, recipe
from jaxrnn._primitives import FACTORISATIONS, WRITES, conv_general_dilated_p, lu_p, transpose_p


def is_worthwhile(plan: Plan, time: int, chunk: int | str | None) -> bool:
    """Whether what can be moved is enough to pay for the passes over blocks.

    Measured on a CPU: a GRU of 4 units lost, one of 16 did not. The derivative of an
    eigendecomposition or the like decomposes once more, from whatever is kept: with more than 8
    rows gradients took 1.1 to 2 times as long. A cache that each step writes a part of, and that is
    kept whole for the gradient: from 256 KiB on, with less than a multiply-add outside the loop for
    each byte, that was all (0.94 to 1.03 times as fast, in JAX 0.12 0.77 to 0.99). One step has
    nothing to share: gradients of random networks were 0.66 to 1.09 times as fast; with one sample
    and little work in 3 to 7 steps 0.56 to 1.12 times (the mean is 0.83), in 12 steps 0.93 to 1.28.
    On a GPU unrolling gains by itself.
    """
    if time == 1:
        return False
    if placement.gpu() is not None:
        return True
    leaves = sum(map(multiply_adds, plan.in_passes))
    if time < 8 and time * leaves < 1 << 20 and has_one_row(plan):
        return False
    written = [e for e in plan.body.equations if e.primitive in WRITES]
    caches = _bytes(e.outvars[0] for e in written if e.invars[0] in plan.carries)
    is_small = caches < 1 << 18 or leaves >= caches
    if not is_small and not recomputed_block(plan, time, chunk, remat=False):
        return False
    factorised = [e for e in plan.body.equations if e.primitive in FACTORISATIONS - {lu_p}]
    if any(shape(e.invars[0])[-2] > 8 for e in factorised):
        return False
    heavy = [e for e in plan.body.equations if is_heavy(e) and is_movable(e)]
    products = list(filter(multiply_adds, heavy))
    return len(products) < len(heavy) or sum(map(multiply_adds, products)) >= 2048


def kernels_pay(method: str) -> bool:
    """Whether kernels are to be used wherever they fit: asked for, or measured to be faster.

    That was on an H100. Over several devices the compiler splits loops, but not kernels.
    """
    if method == "fused":
        return True
    device = placement.gpu() if method == "auto" and jax.device_count() == 1 else None
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
    if method != "fused" and _blocks_of_threads(plan) > placement.gpu().core_count:
        return False  # they would not run all at once
    try:
        for loop in plan.loops:
            recipe(loop.program, len(loop.consts), len(loop.carry))
    except MisfitError as error:
        if method != "fused":
            return False
        raise ValueError(f"method='fused': the recurrence fits no kernel: {error}.") from None
    return bool(plan.loops)


def _blocks_of_threads(plan: Plan) -> int:
    """How many of a GPU's multiprocessors a kernel takes."""
    return -(-_samples(plan) // SAMPLES)


def _samples(plan: Plan) -> int:
    first = (shape(v)[0] for v in plan.carries if shape(v))
    return max((n if isinstance(n, int) else 1 << 30 for n in first), default=1)  # symbolic: many


def steps_of(
    time: int,
    reverse: bool,
    unroll: int | bool,
    chunk: int | str | None,
    plan: Plan,
    how: How,
) -> Steps:
    """How the steps are run through.

    A step of a loop takes a GPU less time than to start its kernels, and those of several steps are
    started at once (measured on an H100: 2 to 2.4 times as fast for 8). Its gradient keeps more
    than a block makes, so that blocks save it no memory worth the time; unless a kernel would have
    to fill up much that is kept, to the number of samples that it works on.
    """
    on_gpu = placement.gpu() is not None
    is_filled_up = how == "fused" and time * _filled_up(plan) > 1 << 30
    whole = on_gpu and chunk == "auto" and not is_filled_up
    if on_gpu and unroll is not True and unroll <= 1:
        unroll = max(1, min(8, 512 // max(len(plan.body.equations), 1)))
    over_states = block_length(chunk, False, time, plan, how, over_states=True)
    adapts = chunk == "auto" and not on_gpu and how != "parallel"
    return Steps(time, reverse, unroll, how, whole, adapts, over_states)


def _filled_up(plan: Plan) -> int:
    """The bytes that a kernel reads per step, which works on `SAMPLES` samples and no fewer."""
    return _bytes_of_passes(plan) * _blocks_of_threads(plan) * SAMPLES // max(_samples(plan), 1)


def block_length(
    chunk: int | str | None,
    remat: bool,
    time: int,
    plan: Plan | None,
    how: How = "sequential",
    over_states: bool = False,
) -> int:
    """Timesteps per block, of results and gradients unless these have reasons of their own.

    `over_states` says that the gradient's passes go over rows like the states: kept, their
    tangents, and factors of both.
    """
    if isinstance(chunk, int):
        return min(chunk, time)
    if chunk is None:
        return time
    if remat:
        return math.isqrt(time - 1) + 1 if time > 1 else 1
    assert plan is not None
    # Of what a pass makes on its way a part counts, or scratch memory would grow with the sequence.
    per_step = max(_bytes_of_passes(plan), _bytes_made(plan) // 4)
    if over_states or how == "parallel" or placement.gpu() is not None:
        # That counts where these are more than the passes make, as with a matrix for a state.
        per_step += 2 * max(_bytes_of_states(plan) - per_step, 0)
    devices = jax.device_count()
    per_step //= devices  # as if split over all
    if placement.gpu() is not None:
        # Each block costs launches, and nothing is gained by staying in the cache.
        per_step = max(per_step, _filled_up(plan) if how == "fused" else 0)
        return _near_divisor(time, max(64, (256 << 20) // max(per_step, 1)))
    # Over several devices each block costs a reduction, too.
    least, whole = (4, 0) if devices == 1 else (8, 6 << 20)
    if time * per_step <= whole:
        return time
    target = _bytes_of_block(plan.body.invars[: plan.consts])
    return _near_divisor(time, max(least, target // max(per_step, 1)))


def _bytes_of_block(parameters: Iterable[Var]) -> int:
    """What a block is to make, about, if it then adds to the gradients of `parameters`.

    Measured on a CPU: a block should stay in the cache, however short the sequence. In one block
    of 3 to 6 MiB the gradients of LSTM and GRU took 1.1 times as long and 1.5 times the memory. But
    every block reads and writes the gradients of all parameters: where these are large, of 512
    units and more, blocks of half their size were 1.00 to 1.11 times as fast.
    """
    return min(max(2 << 20, _bytes(parameters) // 2), 8 << 20)


def recomputed_block(
    plan: Plan, time: int, chunk: int | str | None, remat: bool, how: How = "sequential"
) -> int:
    """Timesteps per block of a gradient that runs the steps of each block again unasked, or 0.

    Then the states between blocks are kept, as with `remat`. That is for memories that products
    read: a matrix for each sample, or a cache. To run a step again takes little for each number of
    these, but to keep 32 MiB and more of them takes new pages, which a C library hands back to the
    system each time. Measured on a CPU, gradients of memories of 32 KiB to 1 MiB over 128 to 4096
    steps were 0.95 to 1.5 times as fast in blocks of 8 MiB, in a tenth to a third of the memory;
    with 16 MiB in all 0.75 to 0.9 times, with 2 MiB at each step 0.75 to 0.97 times. Nor did it pay
    where a step takes an exponential of each number of its state, or transposes them.
    """
    if remat or how != "sequential" or chunk != "auto" or not placement.is_lone_cpu():
        return 0
    if any(map(hides_product, plan.in_loops)):
        return 0
    equations, kept = plan.body.equations, _bytes_of_states(plan)
    if time * kept < 32 << 20 or kept >= 2 << 20 or sum(map(multiply_adds, equations)) > 8 * kept:
        return 0
    slow = [e for e in equations if is_transcendental(e) or e.primitive is transpose_p]
    if not _are_memories(plan) or 4 * _largest(v for e in slow for v in e.outvars) >= kept:
        return 0
    return _near_divisor(time, (8 << 20) // kept)


def _are_memories(plan: Plan) -> bool:
    """Whether products read a quarter of the states and more, as those of a query and a memory."""
    read = {v for e in plan.body.equations for v in variables(e.invars) if shrinks(e, v)}
    return 4 * _largest(v for v in read if plan.times[v] != -1) >= _bytes_of_states(plan)


def is_soon_made_again(plan: Plan, time: int, chunk: int | str | None) -> bool:
    """Whether passes soon make what is under a checkpoint, for all steps of a block at once.

    Measured on a CPU, where `lax.scan` runs that again step by step: gradients of 38 kinds of steps
    were 1.0 to 5 times as fast (1.4 in the mean), of random networks 0.9 to 2.8 times. Not so if it
    makes much more than the states, in a cache that a pass does not fit into (a hidden Markov
    model, 0.85 to 0.97), or reads large memories (test-time training, 0.7 to 1.1).
    """
    marked, states = not_to_be_kept(plan.body), _bytes_of_states(plan)
    if not marked:
        return True
    made = (v for e in plan.body.equations if not is_free(e) for v in e.outvars)
    if _largest(v for v in made if v in marked and plan.times[v] != -1) >= 32 * states:
        return False
    large = time * states >= 32 << 20 and _are_memories(plan)
    return not large or recomputed_block(plan, time, chunk, remat=False) > 0


def reads_in_place(steps: Steps) -> bool:
    """Whether a tangent's loops read what is kept where it lies, and not block by block.

    On a GPU a tangent is one block as a rule, and every product in a loop a kernel to start.
    """
    return placement.gpu() is None and steps.how == "sequential"


def results_block(plan: Plan, steps: Steps, block: int) -> int:
    """Timesteps per block of results alone, whose gradients are in blocks of `block`.

    A large pass takes all cores of a CPU, a loop of small products one. But a core that was idle
    works at half its speed for about a millisecond, and the loop goes on upon the core that
    finished the pass last. So blocks are to be few: in blocks of 4 MiB instead of 2 MiB, or of 256
    KiB where sums are short, results of 4 to 64 samples were 1.0 to 1.2 times as fast, in blocks of
    16 to 64 MiB 0.8 to 1.0 times. Or, where there is little to do, small enough for one core.
    """
    if not steps.adapts or jax.device_count() > 1 or wants_the_cache(plan):
        return block
    between = max(_bytes_between(plan), _bytes_made(plan) // 4)
    target = (4 << 20) // max(between, 1)
    products = list(filter(multiply_adds, plan.in_passes))
    if 0 < steps.length * sum(map(multiply_adds, products)) <= 1 << 24:
        target = min(target, (1 << 16) // max(size(e.outvars[0]) for e in products))
    elif steps.length * between <= 8 << 20:
        target = steps.length
    return _near_divisor(steps.length, max(4, target))


def tangent_block(plan: Plan, steps: Steps, block: int) -> int:
    """Timesteps per block of a tangent whose results are in blocks of `block`.

    Its passes may make far more on their way than they hand on, such as the terms of a sum over all
    pairs of states: measured on a CPU, gradients of hidden Markov models took 1.9 and 4.3 times as
    long in one block of 128 steps as in blocks of 4. Step by step is best for the tangents of
    weights that each sample looks up for itself: a mixture of experts, 1 to 16 samples, was 1.3 to
    2.7 times as fast as in one block.
    """
    # Blocks are a loop, in which XLA's gradient of a kernel is 5 to 14 times as slow on a CPU.
    convolves = any(e.primitive is conv_general_dilated_p for e in plan.body.equations)
    if convolves or steps.whole_tangent:
        return steps.length
    if not steps.adapts:
        return block
    passes = [e for e in plan.in_passes if not is_free(e)]
    operands = [variables(e.invars) for e in passes if multiply_adds(e)]
    varying = [v for vs in operands if all(plan.times[v] != -1 for v in vs) for v in vs]
    if _largest(varying) > 4 * _bytes(plan.body.invars[plan.consts :]):
        return 1
    # What loops read in place needs no short blocks: retention was 0.97 of `lax.scan` in short ones
    # and 1.14 in long ones, a key-value cache 0.90 and 0.98. What a pass reads or makes does.
    handed = [v for s in plan.stages for v in variables([*s.program.invars, *s.program.outvars])]
    if _largest(v for v in handed if plan.times[v] != -1) >= _bytes(plan.carries):
        block = min(block, steps.over_states)
    made = _bytes_made(plan)
    target = _bytes_of_block(v for v in plan.body.invars if v in plan.accumulated)
    return _near_divisor(block, max(1, target * jax.device_count() // max(made, 1)))


def tangent_unroll(plan: Plan, steps: Steps) -> int | bool:
    """Steps per iteration of a tangent's loops.

    A gradient scales a memory at the end of a step and adds to it at the start of the next one: XLA
    makes one pass over it of both if they are in one iteration. Measured on a CPU, with memories of
    256 KiB and more in all: retention, matrix LSTM, delta rule and fast weights were 1.0 to 1.25
    times as fast in two steps per iteration. With one sample or 64 KiB it was 0.6 to 1.2 times, and
    without products 0.8 to 1.0 times.
    """
    if not steps.adapts or steps.unroll is True or steps.unroll > 1 or _samples(plan) == 1:
        return steps.unroll
    memories = (
        v
        for loop in plan.loops
        for e in loop.program.equations
        for v in variables(e.invars)
        if shrinks(e, v) and v not in loop.consts and v not in loop.xs
    )
    return 2 if _largest(memories) >= 1 << 18 else 1


def samples_last(
    samples: Any,
    weights: int,
    has_gates: bool,
    kind: Kind,
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
        has_gates: whether a product makes more than a state has units.
        kind: whose loop it is.
        is_even: whether arrays are held as rows and not as transposes, see `Form`.
        has_pass: whether the loop had otherwise passes beside it, with work for all cores.
    """
    if not placement.is_lone_cpu() or placement.has_wide_vectors():
        return False
    least = 8 if is_even and kind != "results" else 32
    if not isinstance(samples, int) or samples % 8 or not least <= samples <= 64:
        return False
    if kind == "tangent":
        return is_even and weights >= 2 << 20
    if not has_gates:
        return weights >= 2 << 20
    is_soon = is_even and samples > 8 and not has_pass
    if is_soon and (kind == "keeps" or weights < 1 << 19):
        return weights >= 1 << 18
    return weights >= 7 << 17


def _largest(values: Iterable[Var]) -> int:
    return max(map(size_in_bytes, values), default=0)


def _bytes_of_states(plan: Plan) -> int:
    """The bytes of the carries that a step changes."""
    pairs = zip(plan.carries, plan.body.outvars, strict=False)
    return _bytes(old for old, new in pairs if new is not old)


def _bytes_of_passes(plan: Plan) -> int:
    """What passes hand on per step."""
    return _bytes(v for stage in plan.stages for v in stage.program.outvars)


def _bytes_made(plan: Plan) -> int:
    """The most that a pass makes on its way per step, as the logits of a loss."""
    return _largest(v for e in plan.in_passes if not is_free(e) for v in e.outvars)


def _bytes_between(plan: Plan) -> int:
    """What passes and loops hand on to each other per step."""
    read = {v for stage in plan.stages[1:] for v in stage.program.invars}
    read |= {v for loop in plan.loops for v in loop.xs}
    made = {v for stage in plan.stages for v in stage.program.outvars}
    return _bytes(read & made.union(*(loop.ys for loop in plan.loops)))


def _bytes(atoms: Iterable[Atom]) -> int:
    return sum(map(size_in_bytes, variables(atoms)))


def _near_divisor(time: int, target: int) -> int:
    """A number of about `target` that divides `time`, else `target` or less."""
    if time <= target:
        return time
    divisors = [n for n in range(max(target // 2, 1), 2 * target + 1) if time % n == 0]
    return min(divisors, key=lambda n: abs(math.log(n / target)), default=target)
