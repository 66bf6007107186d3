"""Gradients through 524 288 steps: what they cost in memory and time, with and without `remat`.

The gradient of an LSTM's last output, with respect to its parameters and to the states it started
from. For that to mean something the network has to remember that long: its forget gates start at
about 1 - 1 / T, so that a good part of the first state is still there at the end. What the backward
pass needs of every step is kept in memory; with `remat=True` only the states at about sqrt(T)
places are kept, and the rest is computed again.

A program that would take more than the budget is compiled, and not run.
"""

import argparse
import math
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxrnn import cells, rnn

HERE = Path(__file__).parent
MIB = 2**20
VISIBLE = 4  # MiB
FEATURES, UNITS = 1, 64
CELL = cells.lstm(UNITS)
KINDS = {
    "lax.scan": {"method": "lax"},
    "jaxrnn": {},
    "jaxrnn, remat": {"remat": True},
}
COLORS = dict(zip(KINDS, ("#7f8c9b", "#2f6f9f", "#c8502d"), strict=True))
TOLERANCE = 1e-3  # of gradients, relative to the largest entry: rounding over tens of thousands


def main(arguments=None):
    """Measures, draws and reports; returns 0 if `remat` keeps its word."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=256, help="MiB for temporary arrays")
    parser.add_argument("--short", action="store_true", help="to 16 384 steps, 32 MiB")
    parser.add_argument("--output", type=Path, default=HERE / "output" / "long_sequence.png")
    options = parser.parse_args(arguments)
    lengths = [2**13, 2**15, 2**17, 2**19]
    if options.short:
        lengths, options.budget = [2**10, 2**14], 32

    table = {}
    cases = [(kind, steps) for steps in lengths for kind in KINDS]
    for kind, steps in (progress := tqdm(cases, unit="gradient")):
        progress.set_postfix_str(f"{kind}, {steps:,} steps")
        table[kind, steps] = measure(kind, steps, options.budget)

    print_table(table)
    draw(table, lengths, options.budget, options.output)
    print(f"memory and time against the number of steps: {options.output}")
    return report(table, lengths, options.budget)


class Measurement(NamedTuple):
    """What one gradient took; all but `reserved` are None where it was not run."""

    reserved: float  # MiB of temporary arrays in the compiled program
    grown: float | None = None  # MiB by which the process grew, NaN where nobody can tell
    seconds: float | None = None
    gradient: Any = None


def measure(kind, steps, budget):
    """Compiles a gradient and, where the budget allows it, runs it twice; the faster run counts."""
    operands = problem(steps)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)
    compiled = gradient.lower(*operands, kind).compile()
    reserved = compiled.memory_analysis().temp_size_in_bytes / MIB
    if reserved > budget:
        return Measurement(reserved)
    runs = [watched(compiled, operands) for _ in range(2)]
    (result, grown, first), (_, _, second) = runs
    return Measurement(reserved, grown, min(first, second), jax.tree.map(np.asarray, result))


def loss(params, states, inputs, kind):
    """The sum of the last output; no other output is asked for, so none is stored."""
    flags = KINDS[kind]
    last_output, _, _ = rnn(CELL.step(params), inputs, states, return_all_outputs=False, **flags)
    return last_output.sum()


def problem(steps):
    """Parameters, states and inputs; the gates are set to remember over that many steps."""
    params_key, inputs_key = jax.random.split(jax.random.key(0))
    params = CELL.init(params_key, FEATURES)
    slow = math.log(steps - 1)  # sigmoid(slow) is 1 - 1 / steps
    input_gate, forget_gate = slice(0, UNITS), slice(UNITS, 2 * UNITS)
    params["bias"] = params["bias"].at[input_gate].set(-slow).at[forget_gate].set(slow)
    return params, CELL.initial_states(1), jax.random.normal(inputs_key, (1, steps, FEATURES))


def watched(function, operands):
    """The result of a call, by how many MiB the process grew in it at most, and its seconds.

    What is small need not show: it finds room in what the process holds already.
    """
    watch = Path("/proc/self/clear_refs")
    if watch.exists():
        watch.write_text("5")  # the peak so far is forgotten
        before = process_memory("VmRSS")
    start = time.perf_counter()
    result = jax.block_until_ready(function(*operands))
    seconds = time.perf_counter() - start
    grown = process_memory("VmHWM") - before if watch.exists() else math.nan
    return result, grown, seconds


def process_memory(name):
    """An entry of Linux's account of this process, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status).group(1)) / 1024


def print_table(table):
    """One line for each measurement."""
    print(f"{'steps':>9}  {'':14}{'reserved MiB':>13}{'grown MiB':>11}{'seconds':>9}{'us/step':>9}")
    for (kind, steps), it in table.items():
        line = f"{steps:9,}  {kind:14}{it.reserved:13.1f}"
        if it.seconds is None:
            print(line, "  over the budget, not run")
        else:
            print(f"{line}{it.grown:11.1f}{it.seconds:9.2f}{1e6 * it.seconds / steps:9.1f}")


def report(table, lengths, budget):
    """Prints what was claimed and what came of it; returns 0 if it holds."""
    shortest, longest = lengths[0], lengths[-1]
    common = max(n for n in lengths if all(table[kind, n].gradient for kind in KINDS))
    reference = table["lax.scan", common].gradient
    apart = max(furthest(table[kind, common].gradient, reference) for kind in KINDS)
    remat, plain = table["jaxrnn, remat", longest], table["lax.scan", longest]
    growth = remat.reserved / table["jaxrnn, remat", shortest].reserved
    print(f"gradients of {common:,} steps agree to {apart:.0e} of their largest entry")
    if remat.gradient is not None:
        _, (_, cell_state) = remat.gradient
        print(f"d(output) / d(first cell state) over {longest:,} steps: {cell_state.mean():.3f}")

    failures = []
    if remat.gradient is None:
        failures.append("remat left the budget")
    elif not np.all(cell_state):
        failures.append("the gradient vanished on its way")
    if plain.reserved <= budget:
        failures.append("lax.scan stayed in the budget")
    if growth > longest / shortest / 4:
        failures.append("memory with remat grew with the number of steps")
    if apart > TOLERANCE:
        failures.append("gradients differ")
    print(
        f"{'FAIL' if failures else 'PASS'}  gradient of {longest:,} steps in "
        f"{remat.reserved:.1f} MiB with remat, {plain.reserved:.0f} in lax.scan "
        f"(budget {budget:.0f}); "
        + "; ".join(failures or [f"{longest // shortest}x the steps, {growth:.1f}x the memory"])
    )
    return 1 if failures else 0


def furthest(gradient, reference):
    """The largest difference between two gradients, relative to the largest entry of its array."""
    distances = jax.tree.map(
        lambda a, b: np.abs(a - b).max() / np.abs(b).max(), gradient, reference
    )
    return max(jax.tree.leaves(distances))


def draw(table, lengths, budget, path):
    """Writes memory (left) and time (right) against the number of steps as one PNG."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for kind, color in COLORS.items():
        rows = [table[kind, steps] for steps in lengths]
        ran = [(steps, row) for steps, row in zip(lengths, rows, strict=True) if row.gradient]
        steps_run = [steps for steps, _ in ran]
        memory.plot(lengths, [row.reserved for row in rows], color=color, label=kind)
        memory.plot(steps_run, [row.reserved for _, row in ran], "o", color=color)
        grown = [(steps, row.grown) for steps, row in ran if row.grown > VISIBLE]
        memory.plot([x for x, _ in grown], [y for _, y in grown], "kx", markersize=8)
        seconds.plot(steps_run, [row.seconds for _, row in ran], "o-", color=color, label=kind)
    memory.axhline(budget, color="black", linewidth=0.8, linestyle=":")
    memory.annotate(f"budget: {budget:.0f} MiB", (lengths[0], budget), va="bottom")
    memory.plot([], [], "o", color="black", label="reserved by the program, run")
    memory.plot([], [], "kx", markersize=8, label=f"growth of the process, if over {VISIBLE} MiB")
    memory.set_ylim(bottom=min(row.reserved for row in table.values()) / 30)
    memory.set(ylabel="memory for one gradient [MiB]")
    seconds.set(ylabel="time for one gradient [s]")
    for panel in (memory, seconds):
        panel.set(xscale="log", yscale="log", xlabel="steps")
        panel.set_xticks(lengths, [f"{steps:,}" for steps in lengths])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
    memory.legend(frameon=False)
    title = f"Backpropagation through an LSTM of {UNITS} units, one sequence"
    figure.suptitle(title, weight="bold")

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
