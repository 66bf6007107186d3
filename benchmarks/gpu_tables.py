"""The results of `benchmarks.gpu` as Markdown."""

from collections.abc import Iterable
from statistics import geometric_mean

from benchmarks.tables import (
    ABSENT,
    CELLS,
    KINDS,
    Case,
    Name,
    Result,
    candidate,
    number,
    speedup_of,
    table,
    title,
    versions,
)

NAMES: dict[str, Name] = {
    "`lax.scan`": ("lax.scan", "naive"),
    "`lax.scan(unroll=8)`": ("lax.scan", "unrolled"),
    "cuDNN, by JAX": ("jax cuDNN", "layer"),
    "PyTorch": ("torch", "layer"),
    "jaxrnn, naive step": ("jaxrnn", "naive"),
    "`jaxrnn.cells`": ("jaxrnn", "cell"),
}
OURS = ("jaxrnn", "naive")
# The number of samples that the README shows.
SHOWN = 16

# Milliseconds for 1024 steps, forward / forward+backward, of 16 samples and 768 units in bfloat16:
# FlashRNN (arXiv:2412.07752).
PUBLISHED = {
    "cuDNN": (2.0, 5.2),
    "FlashRNN, fused": (4.9, 13.6),
    "FlashRNN, alternating": (10.8, 26.5),
}


def section(result: Result) -> str:
    """The README's section on one GPU."""
    cases = [case for case in result["cases"] if case["B"] == SHOWN]
    published = ", ".join(f"{name} {a:g} / {b:g}" for name, (a, b) in PUBLISHED.items())
    parts = [
        f"### {title(result)}",
        f"{SHOWN} samples, 1024 steps, as many features as units; microseconds per step, forward / "
        "forward+backward, the products of the inputs included. The fastest in bold.",
        *(
            _by_width(cases, cell, dtype)
            for cell in CELLS
            for dtype in _dtypes(case for case in cases if case["cell"] == cell)
        ),
        f"Published for the LSTM of 768 units in bfloat16, milliseconds for all steps: {published} "
        "(arXiv:2412.07752). On this machine cuDNN takes several times that.",
        _summary(result),
    ]
    return "\n\n".join(parts)


def in_full(result: Result) -> str:
    """Every figure of one GPU."""
    heading = ["cell, dtype, B, H", *NAMES]
    rows = (
        [
            f"{CELLS[case['cell']]}, {case['dtype']}, {case['B']}, {case['H']}",
            *(_microseconds(case, name) for name in NAMES.values()),
        ]
        for case in result["cases"]
    )
    memory = (
        [
            f"{CELLS[case['cell']]}, {case['dtype']}, {case['B']}, {case['H']}",
            *(_mebibytes(case, name) for name in NAMES.values()),
        ]
        for case in result["cases"]
        if "commit" not in case
    )
    return "\n\n".join(
        [
            f"## {title(result)}",
            versions(result) + _other_commits(result),
            "Microseconds per step, forward / forward+backward:",
            table(heading, rows),
            "MiB held beside arguments and results, where that is known:",
            table(heading, memory),
        ]
    )


def _other_commits(result: Result) -> str:
    """Which cases another run has measured."""
    others = [case for case in result["cases"] if "commit" in case]
    if not others:
        return ""
    commits = ", ".join(sorted({case["commit"] for case in others}))
    return (
        f" {len(others)} of the {len(result['cases'])} cases are from a run at {commits} that was "
        "cut off; of these only the medians are known."
    )


def _dtypes(cases: Iterable[Case]) -> list[str]:
    return sorted({case["dtype"] for case in cases}, reverse=True)


def _by_width(cases: list[Case], cell: str, dtype: str) -> str:
    shown = [case for case in cases if (case["cell"], case["dtype"]) == (cell, dtype)]
    rows = []
    for label, name in NAMES.items():
        entries = [_microseconds(case, name) for case in shown]
        if any(entry != ABSENT for entry in entries):
            rows.append([label, *entries])
    return table([f"{CELLS[cell]}, {dtype}, H", *(str(case["H"]) for case in shown)], rows)


def _microseconds(case: Case, name: Name) -> str:
    figures = candidate(case, name)
    if figures is None:
        return ABSENT

    def entry(kind: str) -> str:
        value = figures[kind]["us_per_step"]
        fastest = min(other[kind]["us_per_step"] for other in case["candidates"])
        return f"**{number(value)}**" if value == fastest else number(value)

    return " / ".join(map(entry, KINDS))


def _mebibytes(case: Case, name: Name) -> str:
    figures = candidate(case, name)
    held = [] if figures is None else [figures[kind]["temp_bytes"] for kind in KINDS]
    known = all(count is not None for count in held)
    return " / ".join(number(count / 2**20) for count in held) if held and known else ABSENT


def _summary(result: Result) -> str:
    lines = []
    for label, name in NAMES.items():
        for dtype in _dtypes(result["cases"]):
            cases = [case for case in result["cases"] if case["dtype"] == dtype]
            entries = []
            for kind in KINDS:
                ratios = [speedup_of(case, kind, name, OURS) for case in cases]
                known = [ratio for ratio in ratios if ratio is not None]
                if known and name[0] != OURS[0]:
                    entries.append(f"{geometric_mean(known):.2f} ({min(known):.2f})")
            if entries:
                lines.append(f"- against {label}, {dtype}: {' / '.join(entries)}")
    sizes = sorted({case["B"] for case in result["cases"]})
    return (
        f"A naive step under `jaxrnn.rnn`, so many times as fast, over all {len(result['cases'])} "
        f"cases with {', '.join(map(str, sizes[:-1]))} and {sizes[-1]} samples; geometric mean "
        "(least), forward / forward+backward:\n\n" + "\n".join(lines)
    )
