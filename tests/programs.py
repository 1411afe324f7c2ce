"""`train.py` and `reproduce.py` with a network that compiles in no time, here and elsewhere."""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

import train
from models import MODELS, resnet8
from training import devices, plots
from training.checkpoints import load_model
from training.record import read_records
from training.run_folder import LOCK

ROOT = Path(train.__file__).parent
TINY = MODELS["resnet20"]._replace(make=partial(resnet8, widths=(4,)))
ARGS = ("--train-size=96", "--validation-size=20", "--batch-size=16", "--epochs=3", "--effect")
STEPS = 6  # in an epoch of a run with these options
STARTED: list[subprocess.Popen[str]] = []


@contextlib.contextmanager
def shrunk(number: int = 1) -> Iterator[None]:
    """Makes ResNet-20 tiny, and uses a number of devices and draws no pictures; 0: as usual."""

    def mesh() -> Mesh:
        first = jax.devices()[:number]
        return jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=first)

    # However small a program is: most runs here compile the same ones.
    kept = {
        "persistent_cache_min_compile_time_secs": 0,
        "persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, f"jax_{name}") for name in kept}
    kept["disable_most_optimizations"] = number > 0  # they take longer
    before["disable_most_optimizations"] = jax.config.read("jax_disable_most_optimizations")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(MODELS, resnet20=TINY))
        if number:
            stack.enter_context(mock.patch.object(devices, "make_mesh", mesh))
            for name in ("plot_curves", "plot_gradients", "plot_layer_map"):
                touch = mock.patch.object(plots, name, lambda *args: args[-1].touch())
                stack.enter_context(touch)
        for name, value in kept.items():
            jax.config.update(f"jax_{name}", value)
            stack.callback(jax.config.update, f"jax_{name}", before[name])
        yield


def main(*args: str | Path, number: int = 1) -> None:
    """Calls `train.main` in this process."""
    hook = mock.patch.object(sys, "unraisablehook", sys.unraisablehook)  # it sets another
    with shrunk(number), hook, mock.patch.object(sys, "argv", ["train.py", *map(str, args)]):
        train.main()


def refused(*args: str | Path) -> str:
    """The line with which `main` ends."""
    try:
        main(*args)
    except SystemExit as stopped:
        (line,) = str(stopped.code).splitlines()
        return line.removeprefix("train.py: ")
    raise AssertionError(f"it was not refused: {args}")


@contextlib.contextmanager
def after(owner: Any, name: str, call: int, action: Callable[[], object]) -> Iterator[None]:
    """Acts after a call of a function; calls are counted from 1."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call_and_act(*args: Any) -> Any:
        result = function(*args)
        if next(calls) == call:
            action()
        return result

    with mock.patch.object(owner, name, call_and_act):
        yield


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    """For modules that import it."""
    yield
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


def start(
    *args: str | Path, program: str = "train", number: int = 1, before: str = "", **options: Any
) -> Any:
    """The `Popen` of a program, `shrunk`; it runs the code `before` at first."""
    code = f"import {program}\nfrom tests.programs import shrunk\n{before}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if number:  # what is computed depends on their number: with one, as conftest.py sets it
        each = 8 if number == 1 else 1 if "--coordinator" in args else number
        env["JAX_NUM_CPU_DEVICES"] = str(each)
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nwith shrunk({number}): {program}.main()", *map(str, args)],
        env=env,
        text=True,
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen[str], returncode: int = 0) -> tuple[str, str]:
    """Waits for a process; returns what it wrote to its standard output and error."""
    said = process.communicate(timeout=600)
    assert process.returncode == returncode, said
    return said


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits, while a process runs, for something that it does."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def epochs(out: Path) -> int:
    """The number of records so far."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of a run but its lock, which every process that asks has held."""
    paths = folder.rglob("*")
    return {path: path.read_bytes() for path in paths if path.is_file() and path.name != LOCK}


def assert_same_run(out: Path, reference: Path) -> None:
    """Asserts that two runs have the same records, but for times, and parameters."""
    times = {"seconds": 0, "images_per_second": 0}
    first, second = ([record | times for record in read_records(x)] for x in (out, reference))
    assert first == second
    with shrunk():
        ours, theirs = (jax.tree.leaves(nnx.state(load_model(x))) for x in (out, reference))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
