"""Every test sees eight CPU devices, strict dtype promotion is opted into where it is tested."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
