"""Set-up for all tests: simulated devices and reproducible random programs."""

import os

# What is computed matters here, not how fast. Must come before JAX is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitters compile twice as fast; JAX versions without them ignore this. Nor is there
# anything to gain by compiling one program in parallel where tests are, or by making it fast.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true",
)

import hypothesis
import jax
import pytest

from jaxrnn import _device, _samples_last

# Has no effect on tests that use one device. Must come before the first JAX operation.
jax.config.update("jax_num_cpu_devices", 8)

# The same examples in every run: a failure is the code's doing and not the dice's.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _one_device(request, monkeypatch):
    """The engine decides as it does on one device, except in tests marked `several_devices`.

    And as on the same kind of CPU everywhere.
    """
    monkeypatch.setattr(_device, "has_wide_vectors", lambda: False)
    if "several_devices" not in request.keywords:
        monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture
def samples_last_everywhere(monkeypatch):
    """Loops hold their samples last wherever it fits: as rows, and results as transposes too."""

    def samples_last(samples, weights, has_gates, kind, is_even, has_pass):
        fits = isinstance(samples, int) and samples > 0
        return fits and (is_even or kind != "tangent")

    monkeypatch.setattr(_samples_last, "samples_last_pay", samples_last)
