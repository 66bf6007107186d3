"""How long blocks are and how loops are unrolled, and what was measured to say so."""

import math
from collections.abc import Iterable

import jax

from jaxrnn import _device
from jaxrnn._block import Steps
from jaxrnn._equations import hides_product, is_free, is_transcendental, multiply_adds
from jaxrnn._fission import LoopMethod, Plan, shrinks
from jaxrnn._gains import wants_the_cache
from jaxrnn._jaxpr import Atom, Var, shape, size, size_in_bytes, variables
from jaxrnn._kernel import SAMPLES
from jaxrnn._primitives import conv_general_dilated_p, transpose_p


def steps_of(
    time: int,
    reverse: bool,
    unroll: int | bool,
    chunk: int | str | None,
    plan: Plan,
    loop_method: LoopMethod,
) -> Steps:
    """How the steps are run through.

    A step of a loop takes a GPU less time than to start its kernels, and those of several steps are
    started at once (measured on an H100: 2 to 2.4 times as fast for 8). Its gradient keeps more
    than a block makes, so that blocks save it no memory worth the time; unless a kernel would have
    to fill up much that is kept, to the number of samples that it works on.
    """
    on_gpu = _device.gpu() is not None
    is_filled_up = loop_method == "fused" and time * _filled_up(plan) > 1 << 30
    whole = on_gpu and chunk == "auto" and not is_filled_up
    if on_gpu and unroll is not True and unroll <= 1:
        unroll = max(1, min(8, 512 // max(len(plan.body.equations), 1)))
    over_states = block_length(chunk, False, time, plan, loop_method, over_states=True)
    adapts = chunk == "auto" and not on_gpu and loop_method != "parallel"
    return Steps(time, reverse, unroll, loop_method, whole, adapts, over_states)


def block_length(
    chunk: int | str | None,
    remat: bool,
    time: int,
    plan: Plan | None,
    loop_method: LoopMethod = "sequential",
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
    if over_states or loop_method == "parallel" or _device.gpu() is not None:
        # That counts where these are more than the passes make, as with a matrix for a state.
        per_step += 2 * max(bytes_of_states(plan) - per_step, 0)
    devices = jax.device_count()
    per_step //= devices  # as if split over all
    if _device.gpu() is not None:
        # Each block costs launches, and nothing is gained by staying in the cache.
        per_step = max(per_step, _filled_up(plan) if loop_method == "fused" else 0)
        return _near_divisor(time, max(64, (256 << 20) // max(per_step, 1)))
    # Over several devices each block costs a reduction, too.
    least, whole = (4, 0) if devices == 1 else (8, 6 << 20)
    if time * per_step <= whole:
        return time
    target = _bytes_of_block(plan.body.invars[: plan.consts])
    return _near_divisor(time, max(least, target // max(per_step, 1)))


def recomputed_block(
    plan: Plan,
    time: int,
    chunk: int | str | None,
    remat: bool,
    loop_method: LoopMethod = "sequential",
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
    if remat or loop_method != "sequential" or chunk != "auto" or not _device.is_lone_cpu():
        return 0
    if any(map(hides_product, plan.in_loops)):
        return 0
    equations, kept = plan.body.equations, bytes_of_states(plan)
    if time * kept < 32 << 20 or kept >= 2 << 20 or sum(map(multiply_adds, equations)) > 8 * kept:
        return 0
    slow = [e for e in equations if is_transcendental(e) or e.primitive is transpose_p]
    if not are_memories(plan) or 4 * largest(v for e in slow for v in e.outvars) >= kept:
        return 0
    return _near_divisor(time, (8 << 20) // kept)


def are_memories(plan: Plan) -> bool:
    """Whether products read a quarter of the states and more, as those of a query and a memory."""
    read = {v for e in plan.body.equations for v in variables(e.invars) if shrinks(e, v)}
    return 4 * largest(v for v in read if plan.times[v] != -1) >= bytes_of_states(plan)


def reads_in_place(steps: Steps) -> bool:
    """Whether a tangent's loops read what is kept where it lies, and not block by block.

    On a GPU a tangent is one block as a rule, and every product in a loop a kernel to start.
    """
    return _device.gpu() is None and steps.loop_method == "sequential"


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
    if largest(varying) > 4 * bytes_of(plan.body.invars[plan.consts :]):
        return 1
    # What loops read in place needs no short blocks: retention was 0.97 of `lax.scan` in short ones
    # and 1.14 in long ones, a key-value cache 0.90 and 0.98. What a pass reads or makes does.
    handed = [v for s in plan.stages for v in variables([*s.program.invars, *s.program.outvars])]
    if largest(v for v in handed if plan.times[v] != -1) >= bytes_of(plan.carries):
        block = min(block, steps.over_states)
    # Nor should the cotangents of several rounds, of which the results have one row to read.
    made = max(_bytes_made(plan), _bytes_between(plan) // 4)
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
    if not steps.adapts or steps.unroll is True or steps.unroll > 1 or samples_of(plan) == 1:
        return steps.unroll
    memories = (
        v
        for loop in plan.loops
        for e in loop.program.equations
        for v in variables(e.invars)
        if shrinks(e, v) and v not in loop.consts and v not in loop.xs
    )
    return 2 if largest(memories) >= 1 << 18 else 1


def samples_of(plan: Plan) -> int:
    first = (shape(v)[0] for v in plan.carries if shape(v))
    return max((n if isinstance(n, int) else 1 << 30 for n in first), default=1)  # symbolic: many


def blocks_of_threads(plan: Plan) -> int:
    """How many of a GPU's multiprocessors a kernel takes."""
    return -(-samples_of(plan) // SAMPLES)


def _filled_up(plan: Plan) -> int:
    """The bytes that a kernel reads per step, which works on `SAMPLES` samples and no fewer."""
    return _bytes_of_passes(plan) * blocks_of_threads(plan) * SAMPLES // max(samples_of(plan), 1)


def _bytes_of_block(parameters: Iterable[Var]) -> int:
    """What a block is to make, about, if it then adds to the gradients of `parameters`.

    Measured on a CPU: a block should stay in the cache, however short the sequence. In one block
    of 3 to 6 MiB the gradients of LSTM and GRU took 1.1 times as long and 1.5 times the memory. But
    every block reads and writes the gradients of all parameters: where these are large, of 512
    units and more, blocks of half their size were 1.00 to 1.11 times as fast.
    """
    return min(max(2 << 20, bytes_of(parameters) // 2), 8 << 20)


def largest(values: Iterable[Var]) -> int:
    return max(map(size_in_bytes, values), default=0)


def bytes_of(atoms: Iterable[Atom]) -> int:
    return sum(map(size_in_bytes, variables(atoms)))


def bytes_of_states(plan: Plan) -> int:
    """The bytes of the carries that a step changes."""
    pairs = zip(plan.carries, plan.body.outvars, strict=False)
    return bytes_of(old for old, new in pairs if new is not old)


def _bytes_of_passes(plan: Plan) -> int:
    """What passes hand on per step."""
    return bytes_of(v for stage in plan.stages for v in stage.program.outvars)


def _bytes_made(plan: Plan) -> int:
    """The most that a pass makes on its way per step, as the logits of a loss."""
    return largest(v for e in plan.in_passes if not is_free(e) for v in e.outvars)


def _bytes_between(plan: Plan) -> int:
    """What passes and loops hand on to each other per step."""
    read = {v for stage in plan.stages[1:] for v in stage.program.invars}
    read |= {v for loop in plan.loops for v in loop.xs}
    made = {v for stage in plan.stages for v in stage.program.outvars}
    return bytes_of(read & made.union(*(loop.ys for loop in plan.loops)))


def _near_divisor(time: int, target: int) -> int:
    """A number of about `target` that divides `time`, else `target` or less."""
    if time <= target:
        return time
    divisors = [n for n in range(max(target // 2, 1), 2 * target + 1) if time % n == 0]
    return min(divisors, key=lambda n: abs(math.log(n / target)), default=target)
