"""Result files as Markdown: the README's short section, and all figures in full."""

from collections.abc import Callable, Iterable
from statistics import geometric_mean
from typing import Any

from benchmarks.results import setting, speedup

Result = dict[str, Any]
Case = dict[str, Any]
Name = tuple[str, str]

# Columns of the README's tables: who computes the cell.
COLUMNS: dict[str, Name] = {
    "`lax.scan`": ("lax.scan", "naive"),
    "Flax nnx": ("flax", "layer"),
    "Haiku": ("haiku", "layer"),
    "Keras 3": ("keras", "layer"),
    "PyTorch": ("torch", "layer"),
    "jaxrnn, naive step": ("jaxrnn", "naive"),
    "`jaxrnn.cells`": ("jaxrnn", "cell"),
}
JAX_PEERS = (("lax.scan", "naive"), ("flax", "layer"), ("haiku", "layer"), ("keras", "layer"))
CELLS = {"lstm": "LSTM", "gru": "GRU", "elman": "Elman"}
NAIVE = {
    "naive": "naive",
    "four_matmuls": "four matmuls",
    "concatenating": "concatenating",
}
KINDS = ("forward", "gradient")
ABSENT = "-"


def section(peers: Result, never_slower: Result | None) -> str:
    """The README's section on one machine with one version of JAX."""
    parts = [
        f"### {title(peers)}",
        "Milliseconds, forward / forward+backward; the gradient goes to parameters and inputs. "
        "The fastest in bold.",
        *(_speed_table(peers, cell) for cell in ("lstm", "gru")),
        "The speedup of a naive step by `jaxrnn.rnn` over the same step under `lax.scan` (1 is "
        "equally fast), forward / forward+backward:",
        _naive_table(peers),
        _summary(peers),
        _remat_table(peers),
    ]
    if never_slower is not None:
        parts.append(_never_slower_summary(never_slower))
    return "\n\n".join(part for part in parts if part)


def overview(settings: Iterable[tuple[Result, Result | None]], pictures: str) -> str:
    """A row for each setting, linked to its pictures in a folder."""
    columns = [*(name for name, _, _ in _MEANS), "many steps, forward", "forward+backward"]

    def row(peers: Result, never_slower: Result | None) -> list[str]:
        means = [
            f"{geometric_mean(known):.2f} ({worst(known):.2f})" if known else ABSENT
            for known, (_, _, worst) in zip(_ratios(peers), _MEANS, strict=True)
        ]
        for kind in KINDS:
            ratios = [step[kind]["speedup"] for step in (never_slower or {"steps": []})["steps"]]
            mean = f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else ABSENT
            means.append(linked(mean, "never_slower", peers) if ratios else ABSENT)
        return [linked(title(peers), "speed", peers), *means]

    def linked(words: str, picture: str, result: Result) -> str:
        return f"[{words}]({pictures}/{picture}-{setting(result)}.png)"

    return table(["geometric mean (worst)", *columns], (row(*pair) for pair in settings))


def in_full(peers: Result, never_slower: Result | None) -> str:
    """Every figure of one setting."""
    parts = [f"## {title(peers)}", versions(peers)]
    for case in peers["cases"]:
        parts += [_case_heading(case), _case_table(case)]
    if never_slower is not None:
        parts += [
            "### Many steps against `lax.scan`",
            _never_slower_summary(never_slower),
            _never_slower_table(never_slower),
        ]
    return "\n\n".join(parts)


def title(result: Result) -> str:
    """The machine and its JAX, as a heading names them."""
    machine, jax = result["machine"], f"JAX {result['versions']['jax']}"
    if machine["device"] == "cpu":
        return f"CPU: {machine['cpu']}, {machine['cores']} cores, {jax}"
    driver = f", driver {machine['driver']}" if "driver" in machine else ""
    return f"GPU: {machine.get('gpu', machine['device'])}{driver}, {jax}"


def candidate(case: Case, name: Name) -> dict[str, Any] | None:
    """A candidate's figures in a case, if it took part."""
    for figures in case["candidates"]:
        if (figures["library"], figures["variant"]) == name:
            return figures
    return None


def speedup_of(case: Case, kind: str, slow: Name, fast: Name) -> float | None:
    """The speedup of the second candidate over the first, if both took part."""
    a, b = candidate(case, slow), candidate(case, fast)
    if a is None or b is None:
        return None
    return speedup(a[kind]["rounds_ms"], b[kind]["rounds_ms"])


def speed_cases(result: Result, *cells: str) -> list[Case]:
    """The cases on the grid, of some cells."""
    return [c for c in result["cases"] if c["topic"] == "speed" and c["cell"] in cells]


def size(case: Case) -> str:
    """B,T,D,H."""
    return ",".join(str(case[letter]) for letter in "BTDH")


def table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    heading = list(heading)
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float) -> str:
    """Three digits, or all of a number from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _pair(render: Callable[[str], str | None]) -> str:
    cells = [render(kind) for kind in KINDS]
    return ABSENT if None in cells else " / ".join(map(str, cells))


def _speed_table(result: Result, cell: str) -> str:
    def row(case: Case) -> list[str]:
        def milliseconds(kind: str, name: Name) -> float | None:
            figures = candidate(case, name)
            return None if figures is None else figures[kind]["median_ms"]

        def shown(kind: str, name: Name) -> str | None:
            value = milliseconds(kind, name)
            if value is None:
                return None
            others = (milliseconds(kind, other) for other in COLUMNS.values())
            fastest = min(other for other in others if other is not None)
            return f"**{number(value)}**" if value == fastest else number(value)

        entries = [_pair(lambda kind, name=name: shown(kind, name)) for name in COLUMNS.values()]
        return [size(case), *entries]

    return table([f"{CELLS[cell]} B,T,D,H", *COLUMNS], map(row, speed_cases(result, cell)))


def _naive_table(result: Result) -> str:
    rows: dict[str, list[str]] = {}
    sizes: dict[str, None] = {}
    for case in speed_cases(result, *CELLS):
        sizes[size(case)] = None
        for variant, words in NAIVE.items():

            def ratio(kind: str, case=case, variant=variant) -> str | None:
                value = speedup_of(case, kind, ("lax.scan", variant), ("jaxrnn", variant))
                return None if value is None else f"{value:.2f}"

            if candidate(case, ("jaxrnn", variant)) is not None:
                label = f"{CELLS[case['cell']]}, {words}"
                rows.setdefault(label, []).append(_pair(ratio))
    return table(["B,T,D,H", *sizes], ([label, *cells] for label, cells in rows.items()))


# What is averaged over the grid: its name in the overview, in a sentence, and which is the worst.
_MEANS: tuple[tuple[str, str, Callable[[Iterable[float]], float]], ...] = (
    ("cells / best JAX peer", "`jaxrnn.cells` against the fastest JAX peer: {} as fast ({})", min),
    ("cells / PyTorch", "`jaxrnn.cells` against PyTorch: {} as fast ({})", min),
    ("naive / `lax.scan`", "naive steps against plain `lax.scan`: {} as fast ({})", min),
    (
        "compile time",
        "compile time of a naive step, against plain `lax.scan`: {} as long ({} at most)",
        max,
    ),
)


def _summary(result: Result) -> str:
    """Geometric means over the grid, for what has all its candidates."""
    lines = [
        f"- {words.format(f'{geometric_mean(known):.2f} times', f'{worst(known):.2f}')}"
        for known, (_, words, worst) in zip(_ratios(result), _MEANS, strict=True)
        if known
    ]
    return "Forward+backward over all sizes, geometric mean (least):\n\n" + "\n".join(lines)


def _ratios(result: Result) -> list[list[float]]:
    """The ratios behind each of `_MEANS`, as far as known."""
    own_cases, own = speed_cases(result, "lstm", "gru"), ("jaxrnn", "cell")
    naive_cases = [
        (case, variant)
        for case in speed_cases(result, *CELLS)
        for variant in NAIVE
        if candidate(case, ("jaxrnn", variant)) is not None
    ]
    best_jax = [_best_ratio(case, JAX_PEERS, own) for case in own_cases]
    torch = [_best_ratio(case, (("torch", "layer"),), own) for case in own_cases]
    naive = [
        speedup_of(case, "gradient", ("lax.scan", variant), ("jaxrnn", variant))
        for case, variant in naive_cases
    ]
    compilation = [
        candidate(case, ("jaxrnn", variant))[kind]["compile_s"]
        / candidate(case, ("lax.scan", variant))[kind]["compile_s"]
        for case, variant in naive_cases
        for kind in KINDS
    ]
    every = best_jax, torch, naive, compilation
    return [[ratio for ratio in ratios if ratio is not None] for ratios in every]


def _best_ratio(case: Case, peers: Iterable[Name], own: Name) -> float | None:
    ratios = [speedup_of(case, "gradient", peer, own) for peer in peers]
    known = [ratio for ratio in ratios if ratio is not None]
    return min(known) if known else None


def _remat_table(result: Result) -> str:
    cases = [case for case in result["cases"] if case["topic"] == "remat"]
    if not cases:
        return ""
    names = {
        "`lax.scan`": ("lax.scan", "naive"),
        "jaxrnn": ("jaxrnn", "naive"),
        "jaxrnn, `remat=True`": ("jaxrnn", "naive_remat"),
    }

    def entry(case: Case, name: Name) -> str:
        figures = candidate(case, name)
        if figures is None:
            return ABSENT
        gradient = figures["gradient"]
        return f"{_mebibytes(gradient['temp_bytes'])} / {number(gradient['median_ms'])}"

    def against_plain(case: Case) -> list[str]:
        plain, remat = names["`lax.scan`"], names["jaxrnn, `remat=True`"]
        ratio = speedup_of(case, "gradient", plain, remat)
        if ratio is None:
            return [ABSENT, ABSENT]
        held = [candidate(case, name)["gradient"]["temp_bytes"] for name in (plain, remat)]
        return [f"1/{held[0] / held[1]:.1f}", f"{ratio:.2f}"]

    heading = ["B,T,D,H", *names, "its memory, of `lax.scan`'s", "times as fast"]
    rows = (
        [size(case), *(entry(case, name) for name in names.values()), *against_plain(case)]
        for case in cases
    )
    words = "Memory and time of a naive LSTM's gradient, MiB / milliseconds:"
    return f"{words}\n\n{table(heading, rows)}"


def _mebibytes(count: int | None) -> str:
    return ABSENT if count is None else number(count / 2**20)


def _never_slower_summary(result: Result) -> str:
    rows = result["steps"]
    names = {row["name"] for row in rows}
    lines = [f"{len(names)} different steps, {len(rows)} with their sizes, against `lax.scan`:\n"]
    for kind, words in zip(KINDS, ("forward", "forward+backward"), strict=True):
        ratios = [row[kind]["speedup"] for row in rows]
        slowest = min(rows, key=lambda row: row[kind]["speedup"])
        lines.append(
            f"- {words}: {geometric_mean(ratios):.2f} times as fast in the geometric mean, "
            f"{min(ratios):.2f} at least ({slowest['name']}, {slowest['size']}), "
            f"{max(ratios):.2f} at most"
        )
    return "\n".join(lines)


def versions(result: Result) -> str:
    """What a result was measured with, and when."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"{machine['system']}, Python {machine['python']}, {versions}; measured on "
        f"{result['date']} at commit {result['commit']}."
    )


def _case_heading(case: Case) -> str:
    words = " (rematerialisation)" if case["topic"] == "remat" else ""
    limit = case["gemm_gflops"]
    gemm = f"; one large matmul: {number(limit)} GFLOP/s" if limit else ""
    return f"### {CELLS[case['cell']]} {size(case)}{words}{gemm}"


def _case_table(case: Case) -> str:
    columns = ("ms", "us/step", "GFLOP/s", "of matmul", "compile s", "MiB")

    def entries(figures: dict[str, Any]) -> list[str]:
        share, compile_s = figures["gemm_share"], figures["compile_s"]
        return [
            number(figures["median_ms"]),
            number(figures["us_per_step"]),
            number(figures["gflops"]),
            ABSENT if share is None else f"{share:.0%}",
            ABSENT if compile_s is None else f"{compile_s:.2f}",
            _mebibytes(figures["temp_bytes"]),
        ]

    heading = ["candidate", *columns, *(f"bwd {column}" for column in columns)]
    rows = (
        [
            f"{figures['library']}, {figures['variant'].replace('_', ' ')}",
            *entries(figures["forward"]),
            *entries(figures["gradient"]),
        ]
        for figures in case["candidates"]
    )
    return table(heading, rows)


def _never_slower_table(result: Result) -> str:
    def entries(figures: dict[str, Any]) -> list[str]:
        least, most = min(figures["speedups"]), max(figures["speedups"])
        spread = f" ({least:.2f} to {most:.2f})" * (most > least)
        return [
            f"{figures['speedup']:.2f}{spread}" + ", same program" * figures["same_program"],
            f"{number(figures['plain_ms'])} / {number(figures['ours_ms'])}",
            f"{figures['plain_compile_s']:.2f} / {figures['ours_compile_s']:.2f}",
            f"{_mebibytes(figures['plain_temp_bytes'])} / {_mebibytes(figures['ours_temp_bytes'])}",
        ]

    columns = ("times as fast", "ms", "compile s", "MiB")
    heading = ["step", "B,T,D,H", *columns, *(f"bwd {column}" for column in columns)]
    rows = (
        [row["name"], row["size"], *entries(row["forward"]), *entries(row["gradient"])]
        for row in result["steps"]
    )
    return table(heading, rows)
