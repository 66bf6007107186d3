"""Measures jaxrnn against plain lax.scan and the other libraries, and writes the results.

    python -m benchmarks.peers [--quick] [--size B,T,D,H ...] [--libraries NAME ...]

Each library runs in its own process, and the candidates for a case take turns: every round measures
each of them once, in alternating direction, and all ratios are taken within rounds.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

from tqdm import tqdm

from benchmarks import cases, clock, machine, problem, results
from benchmarks.pool import Worker, WorkerError, workers

FULL = {"budget_s": 2.5, "visit_s": 0.04, "max_rounds": 20}
QUICK = {"budget_s": 0.5, "visit_s": 0.02, "max_rounds": 10}

# Largest absolute difference to the reference in outputs between -1 and 1. GPUs multiply float32
# with ten bits of mantissa unless told otherwise.
TOLERANCE = {"cpu": 1e-4, "gpu": 2e-2}


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    arguments = _arguments()
    todo = cases.cases(arguments.quick, arguments.size, arguments.libraries)
    effort = QUICK if arguments.quick else FULL
    with workers(arguments.libraries) as pool:
        told = {library: worker.ask("describe") for library, worker in pool.items()}
        versions = {k: v for reply in told.values() for k, v in sorted(reply["versions"].items())}
        facts = machine.describe(told["lax.scan"]["device"])
        tolerance = TOLERANCE["cpu" if facts["device"] == "cpu" else "gpu"]
        measured = []
        with tempfile.TemporaryDirectory() as folder, tqdm(todo, unit="case") as progress:
            for case in progress:
                progress.set_description(str(case))
                measured.append(_measure_case(case, pool, Path(folder), effort, tolerance))
                for worker in pool.values():
                    worker.ask("release")
    # A grid of one's own is no quick run of the committed results, and must not replace them.
    partial = arguments.quick or bool(arguments.size) or len(pool) < len(cases.LIBRARIES)
    path = results.save("peers", partial, facts, versions, {"cases": measured})
    print(f"written: {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Measure jaxrnn against other libraries."
    )
    parser.add_argument("--quick", action="store_true", help="the small sizes, few repetitions")
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="B,T,D,H",
        type=lambda text: tuple(map(int, text.split(","))),
        help="in place of the grid; may be given several times",
    )
    parser.add_argument(
        "--libraries", nargs="+", choices=cases.LIBRARIES, default=list(cases.LIBRARIES)
    )
    arguments = parser.parse_args()
    if any(len(size) != 4 for size in arguments.size):
        parser.error("--size takes four integers: B,T,D,H")
    if "lax.scan" not in arguments.libraries:
        parser.error("--libraries must contain lax.scan, which all others are compared with")
    return arguments


def _measure_case(
    case: cases.Case, pool: dict[str, Worker], folder: Path, effort: dict, tolerance: float
) -> dict:
    path = folder / f"{case.topic}-{case.cell}-{'-'.join(map(str, case.size))}.npz"
    problem.save(problem.make(case), path)
    prepared = {
        (library, variant): pool[library].ask(
            "prepare", case=case.cell, variant=variant, path=str(path)
        )
        for library, variant in case.candidates
    }
    path.unlink()
    check_results(case, prepared, tolerance)
    compile_s = _compile_in_turns(prepared, pool)
    rounds, stolen = {}, {}
    for kind in ("forward", "gradient"):
        rounds[kind], stolen[kind] = _take_turns(kind, prepared, pool, effort)
    gemm_gflops = None
    if cases.GEMM in prepared:
        gemm_s = median(rounds["forward"][cases.GEMM])
        gemm_gflops = 2 * cases.GEMM_SIZE**3 / gemm_s / 1e9
    candidates = [
        _figures(case, candidate, reply, compile_s, rounds, gemm_gflops)
        for candidate, reply in prepared.items()
        if candidate != cases.GEMM
    ]
    facts = {"gemm_gflops": _rounded(gemm_gflops), "stolen": stolen}
    return case.as_dict() | facts | {"candidates": candidates}


def check_results(case: cases.Case, prepared: dict, tolerance: float) -> None:
    """A library that computes something else is not compared."""
    norms: dict[str, float] = {}
    for (library, variant), reply in prepared.items():
        if "output_error" not in reply:
            continue
        who = f"{library} ({variant}) on {case}"
        if not reply["output_error"] < tolerance:
            raise WorkerError(
                f"{who}: outputs are off by {reply['output_error']:.2g} from the reference"
            )
        norm = reply["input_gradient_norm"]
        expected = norms.setdefault(reply["math"], norm)
        if not abs(norm - expected) < 10 * tolerance * expected:
            raise WorkerError(
                f"{who}: the gradient by the inputs has norm {norm:.6g}, others {expected:.6g}"
            )


def _compile_in_turns(prepared: dict, pool: dict[str, Worker]) -> dict[tuple, float]:
    """Median seconds to compile what can be compiled, for each candidate and kind of call."""
    which = [
        (candidate, kind)
        for candidate, reply in prepared.items()
        for kind, cost in reply["calls"].items()
        if cost["compile_s"] is not None
    ]

    def visit(one: tuple[tuple[str, str], str]) -> float:
        candidate, kind = one
        number = prepared[candidate]["candidate"]
        return pool[candidate[0]].ask("compile", candidate=number, kind=kind)["seconds"]

    rounds = clock.measure(which, clock.COMPILATIONS - 1, visit)
    return {
        (candidate, kind): median([prepared[candidate]["calls"][kind]["compile_s"], *seconds])
        for (candidate, kind), seconds in zip(which, rounds.seconds, strict=True)
    }


def _take_turns(
    kind: str, prepared: dict, pool: dict[str, Worker], effort: dict
) -> tuple[dict[tuple[str, str], list[float]], float]:
    """Seconds of each candidate in every round, and the share of the time that others took."""
    running = {k: reply for k, reply in prepared.items() if kind in reply["calls"]}
    estimates = [reply["calls"][kind]["estimate_s"] for reply in running.values()]
    count, repeats = clock.plan(estimates, **effort)
    requests = [
        (
            library,
            {
                "candidate": reply["candidate"],
                "kind": kind,
                "repeats": times,
                "warm_up": estimate < clock.WARM_UP_BELOW_S,
            },
        )
        for ((library, _), reply), times, estimate in zip(
            running.items(), repeats, estimates, strict=True
        )
    ]

    def visit(request: tuple[str, dict]) -> float:
        library, arguments = request
        return pool[library].ask("measure", **arguments)["seconds"]

    rounds = clock.measure(requests, count, visit)
    return dict(zip(running, rounds.seconds, strict=True)), rounds.stolen


def _figures(
    case: cases.Case,
    candidate: tuple[str, str],
    reply: dict,
    compile_s: dict[tuple, float],
    rounds: dict[str, dict],
    gemm_gflops: float | None,
) -> dict:
    library, variant = candidate
    figures = {"library": library, "variant": variant, "output_error": reply["output_error"]}
    for kind, cost in reply["calls"].items():
        seconds = rounds[kind][candidate]
        gflops = case.operations(kind) / median(seconds) / 1e9
        figures[kind] = {
            "median_ms": _rounded(1e3 * median(seconds)),
            "us_per_step": _rounded(1e6 * median(seconds) / case.T),
            "gflops": _rounded(gflops),
            "gemm_share": _rounded(gflops / gemm_gflops) if gemm_gflops else None,
            "compile_s": _rounded(compile_s.get((candidate, kind))),
            "temp_bytes": cost["temp_bytes"],
            "rounds_ms": [_rounded(1e3 * s) for s in seconds],
        }
    return figures


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


if __name__ == "__main__":
    main()
