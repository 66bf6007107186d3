"""Measures LSTM and GRU on an NVIDIA GPU over a grid of sizes, against cuDNN among others.

    python -m benchmarks.gpu [--quick]

A program takes seconds to compile and milliseconds to run, so as many processes as there are cores
share the sizes: all compile at once, and when the last has done so they measure one after another.
The candidates for a size are in one process and take turns; ratios are taken within rounds.
"""

import argparse
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import clock, machine, problem, results
from benchmarks.cases import Case

TIME = 1024
BATCHES = (1, 16, 64, 128)
WIDTHS = (64, 128, 256, 512, 768, 1024)
DTYPES = ("float32", "bfloat16")
EFFORT = {"budget_s": 0.3, "visit_s": 0.01, "max_rounds": 7}

# Relative error of the outputs, as a norm, that a candidate may have; float32 is multiplied with
# ten bits of mantissa, bfloat16 has seven.
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}


class Task(NamedTuple):
    """One size: a cell, samples, features and units, and what it computes in."""

    cell: str
    samples: int
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.cell} {self.samples},{TIME},{self.width},{self.width} {self.dtype}"


def main() -> None:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure recurrent layers on a GPU."
    )
    parser.add_argument("--quick", action="store_true", help="a few sizes")
    quick = parser.parse_args().quick
    tasks = _tasks(quick)
    # A process that is done gives its memory back; none takes all of it at the start.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    spawn = multiprocessing.get_context("spawn")
    count = max(1, min(len(os.sched_getaffinity(0)) - 2, len(tasks)))
    compiled, turn, replies = spawn.Barrier(count), spawn.Lock(), spawn.Queue()
    processes = [
        spawn.Process(target=_work, args=(tasks[i::count], compiled, turn, replies))
        for i in range(count)
    ]
    for process in processes:
        process.start()
    rows, facts = [], {}
    progress = tqdm(range(len(tasks)), unit="size")
    for _ in progress:
        reply = replies.get()
        if "error" in reply:
            for process in processes:
                process.kill()
            raise SystemExit(reply["error"])
        facts = reply.pop("facts")
        rows.append(reply)
        progress.write(_line(reply))
    for process in processes:
        process.join()
    rows.sort(key=lambda row: (row["cell"], row["dtype"], row["H"], row["B"]))
    described = machine.describe(facts["device"])
    path = results.save("gpu", quick, described, facts["versions"], {"cases": rows})
    print(f"written: {path}")


def _tasks(quick: bool) -> list[Task]:
    return [
        Task(cell, samples, width, dtype)
        for width in (WIDTHS[:2] if quick else WIDTHS)
        for samples in (BATCHES[1:2] if quick else BATCHES)
        for cell in ("lstm", "gru")
        for dtype in DTYPES
    ]


def _line(row: dict) -> str:
    """A size's figures, in microseconds per step."""
    figures = (
        f"{of['library']} {of['variant']} {of['forward']['us_per_step']:.2f}"
        f" / {of['gradient']['us_per_step']:.2f}"
        for of in row["candidates"]
    )
    return f"{row['cell']} {row['B']},{row['H']} {row['dtype']}: {', '.join(figures)}"


def _work(tasks: list[Task], compiled: Any, turn: Any, replies: Any) -> None:
    """One process: compiles its tasks, waits for the others, measures."""
    try:
        prepared = [(task, *_prepare(task)) for task in tasks]
        compiled.wait()
        with turn:
            for task, candidates, reference in prepared:
                replies.put(_measure(task, candidates, reference))
    except BaseException:
        compiled.abort()
        replies.put({"error": traceback.format_exc()})


# What a candidate gives: for "forward" and "gradient" a call, what it holds in bytes beside
# arguments and results (None: unknown), and the outputs as an array [B, T, H].
Calls = dict[str, tuple[Callable[[], Any], int | None]]


def _prepare(task: Task) -> tuple[dict[tuple[str, str], Callable[[problem.Problem], Calls]], Any]:
    """The candidates of a task, compiled, which still want the numbers; and the reference."""
    import jax  # noqa: PLC0415  the parent process must not hold the GPU
    import jax.numpy as jnp  # noqa: PLC0415

    made = _weights(task)
    inputs = jax.ShapeDtypeStruct((task.samples, TIME, task.width), task.dtype)
    ready: dict[tuple[str, str], Callable[[problem.Problem], Calls]] = {}
    for name, forward, arrange in _on_jax(task):

        def loss(params, x, w, forward=forward):
            return jnp.mean((forward(params, x) * w).astype(jnp.float32))

        params = jax.tree.map(lambda a: jnp.asarray(a, task.dtype), arrange(made))
        run = jax.jit(forward).lower(params, inputs).compile()
        slope = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, inputs, inputs).compile()

        def with_numbers(given, params=params, run=run, slope=slope) -> Calls:
            x, w = given.inputs, given.loss_weights
            bytes_of = [f.memory_analysis().temp_size_in_bytes for f in (run, slope)]
            return {
                "forward": (lambda: jax.block_until_ready(run(params, x)), bytes_of[0]),
                "gradient": (lambda: jax.block_until_ready(slope(params, x, w)), bytes_of[1]),
            }

        ready[name] = with_numbers
    small = jnp.zeros((1, 2, task.width), task.dtype)
    weights = _weights(task)
    for call, _ in _on_torch(task, problem.Problem(weights, small, small, small, small)).values():
        call()  # the first call loads cuDNN
    ready["torch", "layer"] = lambda given: _on_torch(task, given)
    return ready, _reference(task)


def _weights(task: Task) -> problem.Weights:
    return problem.draw_weights(_case(task), np.random.default_rng(0))


def _case(task: Task) -> Case:
    return Case("gpu", task.cell, task.samples, TIME, task.width, task.width, ())


def _on_jax(task: Task) -> Iterator[tuple[tuple[str, str], Callable, Callable]]:
    """Name, `(params, inputs) -> outputs`, and how the parameters are arranged."""
    from benchmarks.workers import jaxrnn, lax_scan  # noqa: PLC0415

    size = (task.samples, task.width, task.dtype)
    yield ("lax.scan", "naive"), *lax_scan.forward_of(task.cell, "naive", *size)
    yield ("lax.scan", "unrolled"), *lax_scan.forward_of(task.cell, "naive", *size, unroll=8)
    for variant in ("naive", "cell"):
        yield ("jaxrnn", variant), *jaxrnn.forward_of(task.cell, variant, *size)
    if (task.cell, task.dtype) == ("lstm", "float32"):
        yield ("jax cuDNN", "layer"), *_cudnn(task)


def _cudnn(task: Task) -> tuple[Callable, Callable]:
    """`jax.experimental.rnn.lstm`: cuDNN's LSTM, of which JAX knows float32 alone."""
    import jax.numpy as jnp  # noqa: PLC0415
    from jax.experimental import rnn  # noqa: PLC0415

    width = task.width
    zeros = jnp.zeros((1, task.samples, width))
    lengths = jnp.full((task.samples,), TIME, jnp.int32)

    def forward(params, x):
        return rnn.lstm(x, zeros, zeros, params, lengths, width, width, 1, 0.0, False)[0]

    def arrange(weights: problem.Weights) -> np.ndarray:
        matrices = [weights[name].T.ravel() for name in ("kernel", "recurrent_kernel")]
        return np.concatenate([*matrices, weights["bias"], np.zeros_like(weights["bias"])])

    return forward, arrange


def _on_torch(task: Task, given: problem.Problem) -> Calls:
    import torch  # noqa: PLC0415

    from benchmarks.workers import torch as worker  # noqa: PLC0415

    inputs, loss_weights = map(torch.from_dlpack, (given.inputs, given.loss_weights))
    given = given._replace(inputs=inputs, loss_weights=loss_weights)
    candidate = worker.build(task.cell, "layer", given, task.dtype)
    return {kind: (call.run, None) for kind, call in candidate.calls.items()}


def _measure(task: Task, ready: dict[tuple[str, str], Callable], reference: Any) -> dict:
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    import torch  # noqa: PLC0415

    shape = (task.samples, TIME, task.width)
    x, w = (jax.random.normal(jax.random.key(i), shape).astype(task.dtype) for i in range(2))
    weights = _weights(task)
    expected = reference(weights, x)
    given = problem.Problem(weights, x, w, expected, expected)
    calls = {name: with_numbers(given) for name, with_numbers in ready.items()}
    figures: dict[tuple[str, str], dict] = {
        name: {"library": name[0], "variant": name[1]} for name in calls
    }
    for name, of in calls.items():
        outputs = of["forward"][0]()
        off = jnp.from_dlpack(outputs.contiguous()) if name[0] == "torch" else outputs
        off = off.astype(jnp.float32) - expected
        error = float(jnp.linalg.norm(off) / jnp.linalg.norm(expected))
        if not error < TOLERANCE[task.dtype]:
            raise ValueError(f"{name} on {task}: outputs are off by {error:.2g}")
        figures[name]["output_error"] = float(f"{error:.2g}")
    for kind in ("forward", "gradient"):
        estimates = []
        for of in calls.values():
            of[kind][0]()
            estimates.append(clock.time_calls(of[kind][0], 1, warm_up=False))
        count, repeats = clock.plan(estimates, **EFFORT)
        turns = [(of[kind][0], times) for of, times in zip(calls.values(), repeats, strict=True)]
        rounds = clock.measure(turns, count, lambda turn: clock.time_calls(*turn, warm_up=False))
        for name, taken in zip(calls, rounds.seconds, strict=True):
            figures[name][kind] = {
                "median_ms": float(f"{1e3 * median(taken):.4g}"),
                "us_per_step": float(f"{1e6 * median(taken) / TIME:.4g}"),
                "temp_bytes": calls[name][kind][1],
                "rounds_ms": [float(f"{1e3 * s:.4g}") for s in taken],
            }
    device = jax.devices()[0].device_kind
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    versions["cuDNN of torch"] = str(torch.backends.cudnn.version())
    return _case(task).as_dict() | {
        "dtype": task.dtype,
        "candidates": list(figures.values()),
        "facts": {"device": device, "versions": versions},
    }


def _reference(task: Task) -> Callable[[problem.Weights, Any], Any]:
    """`(weights, inputs) -> outputs` of the naive step in float32 with all its bits, compiled.

    Not NumPy, for which the large sizes would take minutes.
    """
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    from benchmarks.workers import lax_scan  # noqa: PLC0415

    forward, arrange = lax_scan.forward_of(task.cell, "naive", task.samples, task.width, "float32")

    def run(weights, x):
        params = jax.tree.map(lambda a: a.astype(task.dtype).astype(jnp.float32), weights)
        return forward(params, x.astype(jnp.float32))

    inputs = jax.ShapeDtypeStruct((task.samples, TIME, task.width), task.dtype)
    weights = arrange(_weights(task))
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(run).lower(weights, inputs).compile()
    return lambda weights, x: compiled(arrange(weights), x)


if __name__ == "__main__":
    main()
