"""The hardware and software that a result was measured on."""

import os
import platform
import re
import subprocess
from pathlib import Path


def describe(device: str) -> dict[str, str | int]:
    """Names the machine.

    Args:
        device: what JAX says it computes on (`device_kind`): "cpu", or the accelerator's name.
    """
    facts: dict[str, str | int] = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if device != "cpu":
        facts |= _gpu()
    return facts


def slug(machine: dict[str, str | int]) -> str:
    """The machine's name in a file name: "cpu-amd-epyc-family-25-model-17", "nvidia-h200"."""
    device = str(machine["device"])
    name = f"{device} {machine['cpu']}" if device == "cpu" else device
    name = re.sub(r"\((r|tm)\)|\bprocessor\b|@[^(]*", "", name.lower())
    return "-".join(re.findall(r"[a-z0-9]+", name))


def _cpu_model() -> str:
    """What the processor calls itself, with its numbers: a virtual one may hide which it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = (line.partition(":") for line in reversed(lines))
    first = {key.strip(): value.strip() for key, _, value in pairs}
    if not first.keys() >= {"model name", "cpu family", "model"}:
        return first.get("model name", platform.processor())
    return "{model name} (family {cpu family}, model {model})".format_map(first)


def _gpu() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    name, driver = answer.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver}
