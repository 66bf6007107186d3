"""Measures many different steps under jaxrnn and under plain lax.scan, and writes the results.

    python -m benchmarks.never_slower [--quick] [--only WORD] [--networks FIRST COUNT]

Both run in one process and take turns. Its ratio is the median over rounds of the time under
lax.scan by the time under jaxrnn: above 1, jaxrnn is faster. How memory lies in a process, and who
else uses the caches of its machine, can be worth a fifth of a short program's time in every round.
So each step is measured in several processes of its own, minutes apart, and the median of their
ratios counts; more processes where a virtual machine lost time to others, one where the first has
jaxrnn further ahead than all this is worth. Where jaxrnn stands aside, both run the same program
and the ratio shows the noise.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import geometric_mean, median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from tqdm import tqdm

import jaxrnn
from benchmarks import clock, machine, results
from benchmarks.compiled import Compiled, compile_call
from benchmarks.steps import STEPS, Draw, Size, Step, gradient_of, random_step

KINDS = ("forward", "gradient")

# Of one process.
FULL = {"budget_s": 0.6, "visit_s": 0.02, "max_rounds": 11}
QUICK = {"budget_s": 0.3, "visit_s": 0.005, "max_rounds": 11}

PROCESSES = 3
# Ahead by this much a step needs no second process to be not slower; or down by no more than this
# where both run the same program.
CLEARLY_FASTER = 1.25
NOISE = 0.97


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.never_slower",
        description="Measure many different steps under jaxrnn and under plain lax.scan.",
    )
    parser.add_argument("--quick", action="store_true", help="one size of each, few repetitions")
    parser.add_argument("--only", default="", metavar="WORD", help="steps with WORD in their name")
    parser.add_argument(
        "--networks",
        type=int,
        nargs=2,
        metavar=("FIRST", "COUNT"),
        help="in place of the steps with a name, COUNT of those put together at random",
    )
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    steps = STEPS
    if arguments.networks:
        first, count = arguments.networks
        steps = [random_step(number) for number in range(first, first + count)]
    todo = [
        (step, size)
        for step in steps
        if arguments.only.lower() in step.name.lower()
        for size in (step.sizes[:1] if arguments.quick else step.sizes)
    ]
    count = 1 if arguments.quick else PROCESSES
    measured: list[list[dict[str, dict]]] = [[] for _ in todo]
    with tqdm(total=count * len(todo), unit="process") as progress:
        for turn in range(2 * count):
            for (step, size), processes in zip(todo, measured, strict=True):
                progress.update(turn < count)
                if _counted(processes, count):
                    continue
                progress.set_description(f"{step.name} {size}")
                figures = _in_a_process(step, size, effort, turn % 2 == 1)
                processes.append(figures)
                ratios = " ".join(f"{kind} {figures[kind]['speedup']:.2f}" for kind in KINDS)
                progress.write(f"{step.name:28}{size!s:>16}  {ratios}")
    rows = [
        {"name": step.name, "size": str(size)}
        | _together(_counted(processes, count) or sorted(processes, key=_stolen)[:count])
        for (step, size), processes in zip(todo, measured, strict=True)
    ]
    facts = machine.describe(jax.devices()[0].device_kind)
    versions = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "jaxrnn": jaxrnn.__version__,
    }
    partial = arguments.quick or bool(arguments.only) or bool(arguments.networks)
    path = results.save("never_slower", partial, facts, versions, {"steps": rows})
    for kind in KINDS:
        slowest = min(rows, key=lambda row: row[kind]["speedup"])
        mean = geometric_mean(row[kind]["speedup"] for row in rows)
        least = f"least {slowest[kind]['speedup']:.2f} ({slowest['name']} {slowest['size']})"
        print(f"{kind}: mean {mean:.2f}, {least}")
    print(f"written: {path}")


def _in_a_process(*arguments: Any) -> dict[str, dict]:
    """`_measure(*arguments)` in a process that did nothing else before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_measure, *arguments).result()


def _measure(step: Step, size: Size, effort: dict, ours_first: bool) -> dict[str, dict]:
    """The figures of each kind of call; who compiles first lies first in memory, too."""
    # The first compilation of a process pays for the start of LLVM.
    compile_call(jnp.matmul, jnp.ones((2, 2)), jnp.ones((2, 2)))
    loop = step.make(Draw(), size)
    runs = {"plain": loop.plain, "ours": loop.ours}
    compiled = {}
    for name in sorted(runs, reverse=not ours_first):
        function, arguments = gradient_of(runs[name], loop.arguments)
        compiled[name] = {
            "forward": compile_call(runs[name], *loop.arguments),
            "gradient": compile_call(function, *arguments),
        }
    return {
        kind: _compare(compiled["plain"][kind], compiled["ours"][kind], effort) for kind in KINDS
    }


def _compare(plain: Compiled, ours: Compiled, effort: dict) -> dict:
    estimates = []
    for side in (plain, ours):
        side.call()
        start = perf_counter()
        side.call()
        estimates.append(perf_counter() - start)
    count, repeats = clock.plan(estimates, **effort)

    def visit(turn: tuple[Compiled, int, float]) -> float:
        side, times, estimate = turn
        return clock.time_calls(side.call, times, estimate < clock.WARM_UP_BELOW_S)

    rounds = clock.measure(list(zip((plain, ours), repeats, estimates, strict=True)), count, visit)
    plain_ms, ours_ms = ([1e3 * s for s in seconds] for seconds in rounds.seconds)
    return {
        "speedup": results.speedup(plain_ms, ours_ms),
        "plain_ms": median(plain_ms),
        "ours_ms": median(ours_ms),
        "rounds": count,
        "stolen": rounds.stolen,
        "same_program": plain.program == ours.program,
        "plain_compile_s": plain.compile_s,
        "ours_compile_s": ours.compile_s,
        "plain_temp_bytes": plain.temp_bytes,
        "ours_temp_bytes": ours.temp_bytes,
    }


def _counted(processes: list[dict[str, dict]], count: int) -> list[dict[str, dict]]:
    """Those processes that are enough for a step; none if there are not enough yet."""
    calm = [figures for figures in processes if _stolen(figures) <= clock.STOLEN]
    if calm and all(map(_is_clear, calm[0].values())):
        return calm[:1]
    return calm if len(calm) == count else []


def _is_clear(figures: dict) -> bool:
    return figures["speedup"] >= (NOISE if figures["same_program"] else CLEARLY_FASTER)


def _stolen(figures: dict[str, dict]) -> float:
    """The share of a process's time that its machine lost to others."""
    return max(figures[kind]["stolen"] for kind in KINDS)


def _together(processes: list[dict[str, dict]]) -> dict[str, dict]:
    """The medians over processes, for each kind of call, and the ratio of each process."""
    return {kind: _medians([figures[kind] for figures in processes]) for kind in KINDS}


def _medians(processes: list[dict]) -> dict:
    times = ("speedup", "plain_ms", "ours_ms", "plain_compile_s", "ours_compile_s", "stolen")
    middle = {time: _rounded(median(figures[time] for figures in processes)) for time in times}
    ratios = [_rounded(figures["speedup"]) for figures in processes]
    return processes[0] | middle | {"speedups": ratios}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
