"""How a run uses the cores and the memory of a CPU."""

import ctypes
import os
import platform
from typing import Any, cast

import jax


def use_cores(batch_size: int) -> None:
    """Makes a CPU of several cores appear as two devices, between which a step splits its batch.

    With a single device, XLA leaves all cores but one idle during operations that it does not
    parallelize; more than two devices would hold as many copies of the data. Call it before JAX is
    first used. It changes nothing if the number of devices is set already, by `jax_num_cpu_devices`
    or in `XLA_FLAGS`, or if the computation is on another device.

    Args:
      batch_size: if it is odd, nothing is changed either.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    chosen = cast(Any, jax.config).jax_num_cpu_devices != -1
    if chosen or "xla_force_host_platform_device_count" in flags:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if (cores or 1) > 1 and batch_size % 2 == 0:
        jax.config.update("jax_num_cpu_devices", 2)
        # XLA aborts once one device has waited 40 s for the other, as after the process has slept.
        timeout = "--xla_cpu_collective_call_terminate_timeout_seconds"
        if timeout not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {timeout}={24 * 3600}"


def keep_memory() -> None:
    """Keeps freed memory for the next step, if the C library is glibc.

    XLA allocates the temporary arrays of a step at its start and frees them at its end. glibc would
    return blocks of that size to the system, which then fills every page with zeros again. Call it
    before JAX is first used.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # The options' numbers are those of malloc.h. Other arenas would map their large blocks anyway.
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    libc.mallopt(m_arena_max, 1)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)
