"""The devices and the memory that a run uses, and where its arrays are."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from training import devices

SCRIPT = """
import importlib, os, resource, sys, threading
os.sched_getaffinity = lambda _: {0, 1, 2, 3}
importlib.import_module(sys.argv[2])
import jax
import numpy as np
from training import devices
devices.prepare(int(sys.argv[1]))
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for thread in [threading.Thread(target=np.ones, args=(2**26, np.uint8)) for _ in range(4)]:
        thread.start()
        thread.join()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(jax.local_device_count(), faults, jax.config.jax_compilation_cache_dir)
"""
COUNT = "--xla_force_host_platform_device_count"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "program", "variables", "count"),
    [
        (256, "train", {}, 2),
        (7, "reproduce", {}, 1),
        (256, "train", {"JAX_NUM_CPU_DEVICES": "3", "JAX_COMPILATION_CACHE_DIR": "elsewhere"}, 3),
        (256, "train", {"XLA_FLAGS": f"{COUNT}=3", "HOME": "/dev/null"}, 3),
    ],
)
def test_a_cpus_cores_and_memory_are_used_and_compiled_programs_kept(
    batch_size, program, variables, count, tmp_path
):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HOME": str(tmp_path)} | variables
    command = [sys.executable, "-c", SCRIPT, str(batch_size), program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found, faults, cache = done.stdout.split()
    assert int(found) == count
    if platform.libc_ver()[0] == "glibc":  # other C libraries are left alone
        assert int(faults) < 100  # of 65536 pages of 4 KiB: freed memory is used again
    if "HOME" in variables:  # which cannot be written
        assert cache == "None"
    elif "JAX_COMPILATION_CACHE_DIR" in variables:
        assert cache == "elsewhere"
    else:
        assert Path(cache).is_relative_to(tmp_path)
        assert Path(cache).stat().st_mode & 0o777 == 0o700


def test_large_arrays_are_split_along_their_longest_axis_that_the_devices_divide():
    mesh = devices.make_mesh()
    state = [jnp.zeros(s) for s in ((3, 64, 128), (2048, 8), (1024,), (1023,), (4, 4), (33, 35))]
    split = devices.state_shardings(state, mesh, fsdp=True)
    expected = [P(None, None, "data"), P("data"), P("data"), P(), P(), P()]
    assert [each.spec for each in split] == expected
    whole = devices.state_shardings(state, mesh, fsdp=False)
    assert {each.spec for each in whole} == {P()}
    array = np.arange(16).reshape(8, 2)
    placed = devices.put(array, devices.by_batch(mesh))
    np.testing.assert_array_equal(placed, array)
    assert placed.addressable_shards[3].data.shape == (1, 2)


def test_all_processes_fail_together(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(devices, "exit_at_once", ended.append)
    assert devices.on_first_process(lambda: 3) == 3
    with pytest.raises(KeyError), devices.ending_together():
        devices.on_first_process(lambda: {}["alone"])
    assert ended == []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with devices.ending_together():
        raise KeyError("of two\nlines")
    assert ended == [1]
    assert capsys.readouterr().err == "train.py, process 0 of 2: 'of two\\nlines'\n"
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(devices.multihost_utils, "broadcast_one_to_all", lambda failed: True)
    with pytest.raises(OSError, match="process 0 could not start the run"):
        devices.on_first_process(lambda: 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("JAX_PLATFORMS", "cuda", "JAX_PLATFORMS=cuda. Unset that"),
        ("JAX_PLATFORMS", "gqu", "JAX_PLATFORMS=gqu. Unset that"),
        ("JAX_NUM_CPU_DEVICES", "0", "JAX_NUM_CPU_DEVICES=0. Unset that"),
        ("JAX_ENABLE_X64", "1", "unset it"),
    ],
)
def test_what_jax_cannot_use_is_one_line_with_the_remedy(variable, value, remedy, tmp_path):
    command = [sys.executable, "train.py", "--out", str(tmp_path / "run")]
    environment = os.environ | {variable: value}
    root = Path(devices.__file__).parents[1]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: ")
    assert done.stderr.count("\n") == 1
    assert remedy in done.stderr
    assert not (tmp_path / "run").exists()
