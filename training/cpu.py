"""How a run uses the cores of a CPU."""

import os
from typing import Any, cast

import jax


def use_cores(batch_size: int) -> None:
    """Makes a CPU of several cores appear as two devices, between which a step splits its batch.

    XLA keeps one device's cores idle while it runs what it has not made parallel; more than two
    devices would each hold the data once more. Call it before JAX is first used. Nothing changes
    where the number of devices was chosen already, by `jax_num_cpu_devices` or in `XLA_FLAGS`, or
    where the computation is on another device.

    Args:
      batch_size: where it is odd, nothing changes either.
    """
    chosen = cast(Any, jax.config).jax_num_cpu_devices != -1
    if chosen or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if (cores or 1) > 1 and batch_size % 2 == 0:
        jax.config.update("jax_num_cpu_devices", 2)
