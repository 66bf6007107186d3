"""Result files as pictures."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gpu_tables import SHOWN
from benchmarks.tables import (
    CELLS,
    COLUMNS,
    Case,
    Result,
    candidate,
    speed_cases,
    speedup_of,
    title,
)

BASELINE = ("lax.scan", "naive")

# Greys for the peers on JAX, one colour for PyTorch, one hue for jaxrnn.
COLOURS = {
    "Flax nnx": "#c9ced6",
    "Haiku": "#a3abb8",
    "Keras 3": "#7b8596",
    "PyTorch": "#e07a3f",
    "jaxrnn, naive step": "#6fb3a8",
    "`jaxrnn.cells`": "#12796b",
}
GPU_LINES = {
    "lax.scan": (("lax.scan", "naive"), "#7b8596"),
    "lax.scan(unroll=8)": (("lax.scan", "unrolled"), "#c9ced6"),
    "cuDNN, by JAX": (("jax cuDNN", "layer"), "#b48ead"),
    "PyTorch": (("torch", "layer"), "#e07a3f"),
    "jaxrnn, naive step": (("jaxrnn", "naive"), "#12796b"),
}
INK = "#2b313b"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa2ae",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
    "savefig.bbox": "tight",
}


def speed(result: Result, path: Path) -> None:
    """Every library's speed on the grid, with plain `lax.scan` as one."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(12, 6.4), sharex="col", sharey="row")
        for row, (kind, words) in zip(
            axes, (("forward", "forward"), ("gradient", "forward + backward")), strict=True
        ):
            for ax, (cell, name) in zip(row, (("lstm", "LSTM"), ("gru", "GRU")), strict=True):
                _bars(ax, speed_cases(result, cell), kind)
                ax.set_title(f"{name}, {words}", loc="left", fontsize=11, fontweight="bold")
            row[0].set_ylabel("times as fast as lax.scan")
        _legend_below(figure, axes[0, 0])
        _finish(figure, result, path)


def _bars(ax: Axes, cases: list[Case], kind: str) -> None:
    width = 0.8 / len(COLOURS)
    for position, (label, colour) in enumerate(COLOURS.items()):
        heights = [speedup_of(case, kind, BASELINE, COLUMNS[label]) or 0 for case in cases]
        places = [i + (position - (len(COLOURS) - 1) / 2) * width for i in range(len(cases))]
        ax.bar(places, heights, 0.92 * width, color=colour, label=label.strip("`"))
    ax.axhline(1, color=INK, linewidth=0.9)
    ax.set_xticks(range(len(cases)), [_two_lines(case) for case in cases], fontsize=9)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y", color="#e6e8ec", linewidth=0.8)
    ax.set_axisbelow(True)


def _two_lines(case: Case) -> str:
    return "B {B}, T {T}\nD {D}, H {H}".format_map(case)


def never_slower(result: Result, path: Path) -> None:
    """One line per step and size: forward and forward+backward against plain `lax.scan`."""
    rows = sorted(result["steps"], key=lambda row: row["gradient"]["speedup"])
    places = range(len(rows))
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(9, 1.2 + 0.24 * len(rows)))
        forward = [row["forward"]["speedup"] for row in rows]
        gradient = [row["gradient"]["speedup"] for row in rows]
        ax.hlines(places, forward, gradient, color="#d5d9df", linewidth=2, zorder=1)
        ax.scatter(forward, places, s=34, color="#6fb3a8", label="forward", zorder=2)
        ax.scatter(gradient, places, s=34, color="#12796b", label="forward + backward", zorder=3)
        ax.axvline(1, color=INK, linewidth=0.9)
        ax.axvline(0.95, color="#e07a3f", linewidth=0.9, linestyle="--")
        ax.set_xscale("log", base=2)
        ticks = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16]
        low, high = min(forward + gradient), max(forward + gradient)
        shown = [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]
        ax.set_xticks(shown, [f"{tick:g}" for tick in shown])
        ax.set_xlim(min(low, 0.9) / 1.05, max(high, 1.2) * 1.08)
        ax.minorticks_off()
        ax.set_yticks(places, [f"{row['name']}  {row['size']}" for row in rows], fontsize=9)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(-0.7, len(rows) - 0.3)
        ax.grid(axis="x", color="#e6e8ec", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.set_xlabel("times as fast as lax.scan (dashed: 0.95)")
        ax.legend(loc="lower right", frameon=False)
        _finish(figure, result, path)


def gpu(result: Result, path: Path) -> None:
    """Microseconds per step over the number of units, forward and backward."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(12, 7), sharex=True, sharey=True)
        for row, cell in zip(axes, ("lstm", "gru"), strict=True):
            for ax, dtype in zip(row, ("float32", "bfloat16"), strict=True):
                _lines(ax, result, cell, dtype)
                words = f"{CELLS[cell]}, {dtype}, {SHOWN} samples, forward + backward"
                ax.set_title(words, loc="left", fontsize=11, fontweight="bold")
            row[0].set_ylabel("microseconds per step")
        for ax in axes[1]:
            ax.set_xlabel("units")
        _legend_below(figure, axes[0, 0])
        _finish(figure, result, path)


def _lines(ax: Axes, result: Result, cell: str, dtype: str) -> None:
    cases = [
        case
        for case in result["cases"]
        if (case["cell"], case["dtype"], case["B"]) == (cell, dtype, SHOWN)
    ]
    for label, (name, colour) in GPU_LINES.items():
        points = [
            (case["H"], figures["gradient"]["us_per_step"])
            for case in cases
            if (figures := candidate(case, name)) is not None
        ]
        # An empty line keeps its place in the legend.
        xs, ys = zip(*points, strict=True) if points else ((), ())
        ax.plot(xs, ys, color=colour, label=label, marker="o", markersize=4)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    widths = sorted({case["H"] for case in result["cases"]})
    ax.set_xticks(widths, [str(width) for width in widths])
    ticks = [1, 2, 4, 8, 16, 32, 64, 128]
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.grid(color="#e6e8ec", linewidth=0.8)
    ax.set_axisbelow(True)


def _legend_below(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=len(labels), frameon=False,
        bbox_to_anchor=(0.5, -0.04),
    )  # fmt: skip


def _finish(figure: Figure, result: Result, path: Path) -> None:
    figure.suptitle(title(result), fontsize=10, y=0.995)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
