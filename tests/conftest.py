"""Set-up for all tests: simulated devices and reproducible random programs."""

import hypothesis
import jax

# Has no effect on tests that use one device. Must come before the first JAX operation.
jax.config.update("jax_num_cpu_devices", 8)

# The same examples in every run: a failure is the code's doing and not the dice's.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("reproducible")
