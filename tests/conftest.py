"""Every test sees eight CPU devices; tests of strict dtype promotion opt into it."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
