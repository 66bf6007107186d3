"""Measures many different steps under jaxrnn and under plain lax.scan, and writes the results.

    python -m benchmarks.never_slower [--quick] [--only WORD] [--networks FIRST COUNT]

Both run in this process and take turns. The ratio is the median over rounds of the time under
lax.scan by the time under jaxrnn: above 1, jaxrnn is faster. Where it stands aside, both run the
same program and the ratio shows the noise.
"""

import argparse
from statistics import geometric_mean, median
from time import perf_counter

import jax
import jax.numpy as jnp
import jaxlib
from tqdm import tqdm

import jaxrnn
from benchmarks import clock, machine, results
from benchmarks.compiled import Compiled, compile_call
from benchmarks.steps import STEPS, Draw, Size, Step, gradient_of, random_step

KINDS = ("forward", "gradient")

FULL = {"budget_s": 2.0, "visit_s": 0.02, "max_rounds": 31}
QUICK = {"budget_s": 0.3, "visit_s": 0.005, "max_rounds": 11}


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
    # The first compilation of a process pays for the start of LLVM.
    compile_call(jnp.matmul, jnp.ones((2, 2)), jnp.ones((2, 2)))
    rows = []
    with tqdm(todo, unit="step") as progress:
        for step, size in progress:
            progress.set_description(f"{step.name} {size}")
            row = _measure(step, size, effort)
            rows.append(row)
            ratios = " ".join(f"{kind} {row[kind]['speedup']:.2f}" for kind in KINDS)
            progress.write(f"{step.name:28}{size!s:>16}  {ratios}")
            jax.clear_caches()
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


def _measure(step: Step, size: Size, effort: dict) -> dict:
    loop = step.make(Draw(), size)
    compiled = {
        "forward": [compile_call(run, *loop.arguments) for run in (loop.plain, loop.ours)],
        "gradient": [
            compile_call(function, *arguments)
            for function, arguments in (
                gradient_of(run, loop.arguments) for run in (loop.plain, loop.ours)
            )
        ],
    }
    figures = {kind: _compare(*pair, effort) for kind, pair in compiled.items()}
    return {"name": step.name, "size": str(size)} | figures


def _compare(plain: Compiled, ours: Compiled, effort: dict) -> dict:
    estimates = []
    for side in (plain, ours):
        side.call()
        start = perf_counter()
        side.call()
        estimates.append(perf_counter() - start)
    count, repeats = clock.plan(estimates, **effort)
    turns = list(zip((plain, ours), repeats, estimates, ([], []), strict=True))
    for side, times, estimate, seconds in clock.in_turns(turns, range(count)):
        warm_up = estimate < clock.WARM_UP_BELOW_S
        seconds.append(clock.time_calls(side.call, times, warm_up))
    compile_s = [[plain.compile_s], [ours.compile_s]]
    sides = zip((plain, ours), compile_s, strict=True)
    # The first was before the calls.
    for side, taken in clock.in_turns(sides, range(1, clock.COMPILATIONS)):
        taken.append(side.compile_again())
    plain_ms, ours_ms = ([1e3 * s for s in seconds] for *_, seconds in turns)
    return {
        "speedup": round(results.speedup(plain_ms, ours_ms), 3),
        "plain_ms": float(f"{median(plain_ms):.5g}"),
        "ours_ms": float(f"{median(ours_ms):.5g}"),
        "rounds": count,
        "same_program": plain.program == ours.program,
        "plain_compile_s": round(median(compile_s[0]), 3),
        "ours_compile_s": round(median(compile_s[1]), 3),
        "plain_temp_bytes": plain.temp_bytes,
        "ours_temp_bytes": ours.temp_bytes,
    }


if __name__ == "__main__":
    main()
