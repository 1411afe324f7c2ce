import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
os.sched_getaffinity = lambda _: {0, 1, 2, 3}
import jax
from training import cpu
cpu.use_cores(int(sys.argv[1]))
print(jax.local_device_count())
"""


@pytest.mark.parametrize(
    ("batch_size", "variables", "devices"),
    [
        (256, {}, 2),
        (7, {}, 1),
        (256, {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (256, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, 3),
    ],
)
def test_number_of_devices(batch_size, variables, devices):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | variables
    command = [sys.executable, "-c", SCRIPT, str(batch_size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == devices


MEMORY_SCRIPT = """
import resource
import numpy as np
from training import cpu
cpu.keep_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**26, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_used_again():
    command = [sys.executable, "-c", MEMORY_SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # 16384 pages of 4 KiB
