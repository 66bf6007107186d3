"""Result files: where they lie, what they have in common, how figures in them are compared."""

import json
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine

DIRECTORY = Path(__file__).parent / "results"


def save(benchmark: str, partial: bool, facts: dict, versions: dict, body: dict) -> Path:
    """Writes `results/<benchmark>-<setting>.json`; a `partial` run's name starts with "quick-"."""
    heading = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "quick": partial,
        "machine": facts,
        "versions": versions,
    }
    path = DIRECTORY / f"{'quick-' * partial}{benchmark}-{setting(heading)}.json"
    DIRECTORY.mkdir(exist_ok=True)
    text = json.dumps(heading | body, indent=1)
    # A list of numbers on one line: readable, and one line to differ.
    text = re.sub(r"\[[\d\s,.e+-]+\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n")
    return path


def setting(result: dict[str, Any]) -> str:
    """Where a result was measured, in a file name: "cpu-amd-epyc-jax-0.10"."""
    release = ".".join(result["versions"]["jax"].split(".")[:2])
    return f"{machine.slug(result['machine'])}-jax-{release}"


def _commit() -> str:
    """The commit that was measured, with "-dirty" behind it if more than results differed."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=DIRECTORY.parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ":/", f":(exclude){DIRECTORY.name}")
        return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load(benchmark: str, directory: Path = DIRECTORY) -> list[dict[str, Any]]:
    """The committed results of a benchmark, those of CPUs first."""
    paths = sorted(directory.glob(f"{benchmark}-*.json"))
    loaded = [json.loads(path.read_text()) for path in paths]
    return sorted(loaded, key=lambda result: result["machine"]["device"] != "cpu")


def speedup(slow_ms: list[float], fast_ms: list[float]) -> float:
    """The ratio of times, above 1 where the second is faster: the median over rounds.

    Both lists hold one time per round of one run, so that what disturbs the machine for a while
    disturbs both sides of a ratio.
    """
    return median(s / f for s, f in zip(slow_ms, fast_ms, strict=True))
