"""What is computed on, as far as one can tell while tracing."""

import functools
import pathlib
from typing import Any

import jax


def gpu() -> Any:
    """The NVIDIA GPU that is computed on, or None."""
    device = _device()
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
    return device if is_cuda else None


def is_lone_cpu() -> bool:
    """Whether a CPU is computed on, and nothing beside it."""
    return jax.device_count() == 1 and is_cpu()


@functools.cache
def has_wide_vectors() -> bool:
    """Whether the host multiplies sixteen floats at once (AVX-512), as far as Linux tells."""
    try:
        return "avx512f" in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def is_cpu() -> bool:
    """Whether a CPU is computed on."""
    return bool(_device().platform == "cpu")


def _device() -> Any:
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]
