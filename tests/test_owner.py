"""Two processes on one run: no work is duplicated, and none is lost."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training.lock import lock

import train
from training.record import read_records

pytestmark = pytest.mark.slow
ROOT = Path(train.__file__).parent
HOST = socket.gethostname()
TINY = """
from functools import partial
import models
tiny = partial(models.resnet8, widths=(4, 8))
models.MODELS["resnet20"] = models.MODELS["resnet20"]._replace(make=tiny)
"""
TRAIN = f"{TINY}import train\ntrain.main()"
# Waits where a run takes its folder, until the file GO is there.
TRAIN_AT_ONCE = f"""{TINY}
import os, sys, train
def wait(self, enter=train.RunFolder.__enter__):
    open(f"{{os.environ['GO']}}-{{os.getpid()}}", "w").close()
    while not os.path.exists(os.environ["GO"]):
        pass
    return enter(self)
train.RunFolder.__enter__ = wait
train.main()
"""
ARGS = ["--train-size", "96", "--batch-size", "16"]
CACHE = tempfile.TemporaryDirectory()
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


def start(code: str, *args: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen[str]:
    env = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    } | env
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def start_run(out: Path, *args: str, epochs: int = 200, **env: str) -> subprocess.Popen[str]:
    return start(TRAIN, *ARGS, "--epochs", str(epochs), "--out", str(out), *args, **env)


def finish(process: subprocess.Popen[str], returncode: int = 0) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == returncode, (stdout, stderr)
    return stdout, stderr


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def in_use(out: Path, process: subprocess.Popen[str]) -> str:
    return f"{out} is in use by process {process.pid} on {HOST}\n"


def test_a_second_process_does_not_resume_what_the_first_one_trains(tmp_path):
    out = tmp_path / "run"
    first = start_run(out)
    wait_for(lambda: lines(out / "metrics.jsonl") > 0, first)
    second, fresh = start_run(out, "--resume"), start_run(out)
    for process in (second, fresh):
        assert finish(process, 1)[1] == f"train.py: {in_use(out, first)}"
    assert first.poll() is None
    first.kill()
    first.communicate()
    done = lines(out / "metrics.jsonl")
    assert finish(start_run(out, "--resume", epochs=done + 2))[1] == ""
    assert len(read_records(out)) == done + 2  # epochs 1, 2, ... once each


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "empty folder"])
def test_of_two_fresh_runs_at_the_same_instant_one_wins(there, tmp_path):
    out, go = tmp_path / "a" / "run", tmp_path / "go"
    if there:
        out.mkdir(parents=True)
    args = [*ARGS, "--epochs", "3", "--out", str(out)]
    both = [start(TRAIN_AT_ONCE, *args, GO=str(go)) for _ in range(2)]
    for process in both:
        wait_for(Path(f"{go}-{process.pid}").exists, process)
    go.touch()
    said = [process.communicate(timeout=600) for process in both]
    (winner,) = (process for process in both if process.returncode == 0)
    (loser,) = (process for process in both if process.returncode == 1)
    assert said[both.index(loser)][1] == f"train.py: {in_use(out, winner)}"
    assert len(read_records(out)) == 3


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_of_several_processes_of_one_run_the_first_holds_it(tmp_path):
    out = tmp_path / "run"
    pair = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    first, _ = (start_run(out, *pair, "--process-id", str(id)) for id in range(2))
    wait_for(lambda: lines(out / "metrics.jsonl") > 0, first)
    # Another pair ends, with one line each.
    pair[1] = f"127.0.0.1:{free_port()}"
    others = [start_run(out, *pair, "--process-id", str(id), "--resume") for id in range(2)]
    said = [process.communicate(timeout=600)[1] for process in others]
    assert [process.returncode for process in others] == [1, 1]
    assert in_use(out, first) in said[0]
    assert "process 0 could not start the run" in said[1]

    first.kill()  # while the small process that watches over it lives on
    first.wait()
    with lock(out):
        pass
