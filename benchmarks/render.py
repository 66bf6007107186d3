"""Renders the result files: the README's section on speed, all tables in full, and the plots.

    python -m benchmarks.render [--check]

With `--check` nothing is written; it fails if the README or the tables differ from the results.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import gpu_tables, results, tables

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
TABLES = "tables.md"
PICTURES = "benchmarks/results"


def main() -> None:
    """Renders, or checks what is there."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.render", description="Render the results into the README."
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail if stale")
    if parser.parse_args().check:
        stale = [path for path, text in documents().items() if path.read_text() != text]
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"not what the results say: {names}; run python -m benchmarks.render")
        return
    for path, text in documents().items():
        path.write_text(text)
        print(f"written: {path}")
    _plot()


def documents(root: Path = ROOT) -> dict[Path, str]:
    """Every document made from results, with the text that it should hold.

    The README shows the first setting with a kind of device in full, and of each a row.

    Args:
        root: the folder of README.md and of benchmarks/results.

    Raises:
        ValueError: if the README lacks the markers between which the section stands.
    """
    directory = root / "benchmarks" / "results"
    settings = _settings(directory)
    if not settings:
        return {}
    firsts = {peers["machine"]["device"]: (peers, steps) for peers, steps in reversed(settings)}
    sections = [_section(*pair) for pair in reversed(firsts.values())]
    sections.append(f"### Each machine and version of JAX\n\n{_overview(settings)}")
    full = [tables.in_full(*pair) for pair in settings]
    for gpu in results.load("gpu", directory):
        sections.append(_gpu_section(gpu))
        full.append(gpu_tables.in_full(gpu))
    heading = "# All figures\n\nMade by `python -m benchmarks.render` from the files beside it."
    readme = root / "README.md"
    return {
        readme: _between_markers(readme.read_text(), "\n\n".join(sections)),
        directory / TABLES: "\n\n".join([heading, *full]) + "\n",
    }


def _settings(directory: Path) -> list[tuple[tables.Result, tables.Result | None]]:
    """The results of each setting: against the peers, and of `never_slower` if there."""
    never_slower = {results.setting(r): r for r in results.load("never_slower", directory)}
    return [(r, never_slower.get(results.setting(r))) for r in results.load("peers", directory)]


def _section(peers: tables.Result, never_slower: tables.Result | None) -> str:
    picture = f"{PICTURES}/speed-{results.setting(peers)}.png"
    return (
        f"{tables.section(peers, never_slower)}\n\n![Speed of all libraries on the grid]({picture})"
    )


def _overview(settings: list[tuple[tables.Result, tables.Result | None]]) -> str:
    return "\n\n".join(
        [
            "How many times as fast, forward+backward over all sizes: `jaxrnn.cells` against the "
            "fastest JAX peer and against PyTorch, naive steps against `lax.scan`; how many times "
            "as long these compile; and how many times as fast some forty other steps run. "
            "Geometric mean (worst):",
            tables.overview(settings, PICTURES),
            f"[All figures]({PICTURES}/{TABLES}).",
        ]
    )


def _gpu_section(gpu: tables.Result) -> str:
    picture = f"{PICTURES}/gpu-{results.setting(gpu)}.png"
    return "\n\n".join(
        [
            gpu_tables.section(gpu),
            f"![Microseconds per step]({picture})",
            f"[All figures]({PICTURES}/{TABLES}).",
        ]
    )


def _between_markers(text: str, section: str) -> str:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md needs the lines {BEGIN} and {END} around the speed section")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def _plot() -> None:
    # Matplotlib is wanted for writing alone: the check runs without it.
    from benchmarks import plots  # noqa: PLC0415

    for peers, never_slower in _settings(results.DIRECTORY):
        setting = results.setting(peers)
        plots.speed(peers, results.DIRECTORY / f"speed-{setting}.png")
        if never_slower is not None:
            plots.never_slower(never_slower, results.DIRECTORY / f"never_slower-{setting}.png")
    for result in results.load("gpu"):
        plots.gpu(result, results.DIRECTORY / f"gpu-{results.setting(result)}.png")


if __name__ == "__main__":
    main()
