"""A run that is interrupted in any way and resumed ends like an uninterrupted one."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import train
from models import MODELS, resnet8
from training import devices
from training.display import Display
from training.record import read_records

pytestmark = pytest.mark.slow
ROOT = Path(train.__file__).parent
TINY = partial(resnet8, widths=(4, 8))
# train.py as it is, with a network that compiles in no time.
CHILD = """
from functools import partial
import models
tiny = partial(models.resnet8, widths=(4, 8))
models.MODELS["resnet20"] = models.MODELS["resnet20"]._replace(make=tiny)
import train
train.main()
"""
ARGS = ["--train-size", "96", "--batch-size", "16", "--epochs", "3", "--effect"]
STEPS = 6
CACHE = tempfile.TemporaryDirectory()  # most runs here compile the same programs


def start(out: Path, *args: str, cpu_devices: int = 1) -> subprocess.Popen[str]:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(cpu_devices),
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *ARGS, "--out", str(out), *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], returncode: int = 0) -> str:
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == returncode, stderr
    return stderr


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def parameters(out: Path) -> list[np.ndarray]:
    from orbax.checkpoint import v1 as ocp

    model = TINY(num_classes=10, channels=1, rngs=nnx.Rngs(0))
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return [np.asarray(x) for x in jax.tree.leaves(ocp.load(str(out / "parameters"), state))]


def assert_same_run(out: Path, reference: Path) -> None:
    def timeless(folder: Path) -> list[dict]:
        timing = ("seconds", "images_per_second")
        return [
            {name: value for name, value in record.items() if name not in timing}
            for record in read_records(folder)
        ]

    assert timeless(out) == timeless(reference)
    for a, b in zip(parameters(out), parameters(reference), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert finish(start(out)) == ""
    return out


@pytest.fixture(scope="module")
def tiny():
    """Runs `train.main` in this process, on one of its devices."""
    one_device = jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )

    def main(out: Path, *args: str) -> None:
        patch.setattr(sys, "argv", ["train.py", *ARGS, "--out", str(out), *args])
        train.main()

    options = {
        "jax_compilation_cache_dir": CACHE.name,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet20", MODELS["resnet20"]._replace(make=TINY))
        patch.setattr(devices, "make_mesh", lambda: one_device)
        for name, value in options.items():
            jax.config.update(name, value)
        yield main
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def reference_here(tiny, tmp_path_factory) -> Path:
    """The same in this process, whose threads, and so rounding, differ."""
    out = tmp_path_factory.mktemp("reference") / "run"
    tiny(out)
    return out


def checkpoints(out: Path) -> list[str]:
    folder = out / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def latest(out: Path) -> int:
    """The step of the latest checkpoint."""
    return max((int(name) for name in checkpoints(out) if name.isdigit()), default=0)


def test_sigkill_at_any_moment(reference, tmp_path):
    """Inside a checkpoint's write, right after an epoch's record, and inside an epoch."""
    out, often = tmp_path / "run", ("--checkpoint-minutes", "0.0005")

    def records() -> int:
        path = out / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    moments = [
        lambda: any("tmp" in name and name[0] != "0" for name in checkpoints(out)),
        lambda: records() > 0,
        lambda: any(name.isdigit() and int(name) > STEPS for name in checkpoints(out)),
    ]
    for attempt, moment in enumerate(moments):
        process = start(out, *often, *(["--resume"] if attempt else []))
        wait_for(moment, process)
        process.kill()
        process.communicate()
    finish(start(out, *often, "--resume"))
    assert_same_run(out, reference)


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGTERM, 1), (signal.SIGINT, STEPS - 1), (signal.SIGTERM, STEPS + 2)],
    ids=["first step", "end of an epoch", "inside an epoch"],
)
def test_signals_save_and_exit_with_their_code(
    number, step, reference_here, tmp_path, tiny, monkeypatch, capsys
):
    show = Display.step

    def show_and_signal(self, at: int, *measured: float | None) -> None:
        show(self, at, *measured)
        if at == step:
            signal.raise_signal(number)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", show_and_signal)
        with pytest.raises(SystemExit) as stopped:
            tiny(out)
    assert stopped.value.code == 128 + number
    said = capsys.readouterr().err
    assert said.startswith(f"train.py: {number.name}: stopped after step ")
    assert f"python train.py --resume --out {out}" in said
    tiny(out, "--resume")
    assert_same_run(out, reference_here)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [(Display, "evaluating", 3), (train, "save_model", 1)],
    ids=["last evaluation", "saving the model"],
)
def test_a_signal_after_the_last_step_is_not_forgotten(
    owner, name, calls, reference_here, tmp_path, tiny, monkeypatch, capsys
):
    """A study whose last epoch it reaches must not go on with the next run."""
    function, out, called = getattr(owner, name), tmp_path / "run", itertools.count(1)

    def call_and_signal(*args) -> None:
        function(*args)
        if next(called) == calls:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call_and_signal)
        with pytest.raises(SystemExit) as stopped:
            tiny(out)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"stopped after step {3 * STEPS}, " in capsys.readouterr().err
    tiny(out, "--resume")
    assert_same_run(out, reference_here)


def test_a_second_interrupt_ends_at_once(tmp_path):
    process = start(tmp_path / "run", "--epochs", "10000")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGSTOP)  # so that both arrive before it acts on either
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_damaged_checkpoint_is_passed_over(reference_here, tmp_path, tiny, capsys):
    out = tmp_path / "run"
    tiny(out, "--epochs", "2")
    latest = out / "checkpoints" / str(2 * STEPS)
    largest = max((p for p in latest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    tiny(out, "--resume", "--epochs", "3")
    assert f"the checkpoint after step {2 * STEPS} is damaged" in capsys.readouterr().out
    assert_same_run(out, reference_here)


def test_only_damaged_checkpoints(tmp_path, tiny):
    out = tmp_path / "run"
    tiny(out, "--epochs", "1")
    for path in (out / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"none of the checkpoints in .* can be read"):
        tiny(out, "--resume")


def test_more_epochs_may_be_asked_for_and_other_options_may_not(reference_here, tmp_path, tiny):
    out = tmp_path / "run"
    tiny(out, "--epochs", "2")
    before = (out / "metrics.jsonl").read_bytes()
    for change, message in [
        (["--seed", "1"], "--seed is 1, and the run in .* was started with 0"),
        (["--method", "none"], "--method is none, and the run in .* was started with autoscale"),
        (["--epochs", "1"], "--epochs is 1, and the run in .* has already completed 2"),
    ]:
        with pytest.raises(SystemExit, match=message):
            tiny(out, "--resume", *change)
    assert (out / "metrics.jsonl").read_bytes() == before
    tiny(out, "--resume", "--epochs", "3")
    assert_same_run(out, reference_here)
    assert json.loads((out / "config.json").read_text())["config"]["epochs"] == 3


def test_options_need_not_be_repeated(reference_here, tmp_path, tiny, monkeypatch):
    out = tmp_path / "run"
    tiny(out, "--epochs", "2")
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(out), "--epochs", "3"])
    train.main()
    assert_same_run(out, reference_here)


def test_nothing_to_continue(tmp_path, tiny):
    with pytest.raises(SystemExit, match=r"there is no run in .* to resume"):
        tiny(tmp_path / "none", "--resume")


def test_a_full_disk_ends_the_run_and_loses_nothing(reference, tmp_path):
    """A real file system of 256 KiB, where it may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed")
    try:
        said = finish(start(disk / "run"), returncode=1)
        assert said.startswith("train.py: ")
        assert said.count("\n") == 1
        assert "resume with --resume" in said
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        finish(start(disk / "run", "--resume"))
        assert_same_run(disk / "run", reference)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_pair(out: Path, *args: str) -> list[subprocess.Popen[str]]:
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    return [start(out, *together, "--process-id", str(i), *args) for i in range(2)]


def test_two_processes_equal_one_with_two_devices(tmp_path):
    """Also when the first is killed, both continue, the second is killed, and one continues."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    epochs = ("--epochs", "6")
    finish(start(alone, *epochs, cpu_devices=2))

    often = ("--checkpoint-minutes", "0.0005")
    for victim, resume in enumerate([(), ("--resume",)]):
        pair = start_pair(together, *epochs, *often, *resume)
        wait_for(lambda: latest(together) >= (victim + 1) * STEPS, pair[0])  # noqa: B023
        pair[victim].kill()
        killed = time.monotonic()
        said = pair[1 - victim].communicate(timeout=60)[1]
        assert pair[1 - victim].returncode not in (0, None)
        assert time.monotonic() - killed < 60
        last = said.splitlines()[-1]
        assert last.startswith(f"train.py, process {1 - victim} of 2: terminated early")
        assert last.endswith("start all of them again with --resume")
        pair[victim].communicate()

    finish(start(together, "--resume", *epochs, cpu_devices=2))
    assert_same_run(together, alone)


def test_processes_that_end_by_themselves_say_nothing_of_it(tmp_path):
    first, second = start_pair(tmp_path / "run", "--epochs", "1")
    assert finish(first) == ""
    assert finish(second) == "train.py, process 1 of 2: process 0 shows the progress\n"
