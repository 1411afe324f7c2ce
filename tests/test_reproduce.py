"""A study as a user runs it: interrupted in every way, and complete in the end."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reproduce
from reproduction.studies import STUDIES, Grid

pytestmark = pytest.mark.slow
ROOT = Path(reproduce.__file__).parent
# reproduce.py as it is, with two short runs of a network that compiles in no time.
CHILD = """
import dataclasses, sys
from functools import partial
import models
tiny = partial(models.resnet8, widths=(4, 8))
models.MODELS["resnet20"] = models.MODELS["resnet20"]._replace(make=tiny)
from reproduction.studies import STUDIES, Grid
import reproduce
study = STUDIES["vit"]
recipe = dataclasses.replace(study.grids[0].recipe, train_size=96, batch_size=16, epochs=4)
grid = Grid(recipe, ("resnet20",), ("none", "autoscale"), 1)
STUDIES["vit"] = study._replace(grids=(grid,))
reproduce.main()
"""
NAMES = ("digits-resnet20-none-adamw-seed0", "digits-resnet20-autoscale-adamw-seed0")


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, "--preset", "vit", *args],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], returncode: int = 0) -> str:
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == returncode, stderr
    return stdout + stderr


def wait_for(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def records(folder: Path, name: str) -> list[dict]:
    _, *lines = (folder / "results" / "vit" / f"{name}.jsonl").read_text().splitlines()
    untimed = [json.loads(line) for line in lines]
    return [line | {"seconds": 0, "images_per_second": 0} for line in untimed]


def call(folder: Path, monkeypatch, *args: str) -> None:
    """The same in this process, for what trains nothing."""
    study = STUDIES["vit"]
    recipe = dataclasses.replace(study.grids[0].recipe, train_size=96, batch_size=16, epochs=4)
    grid = Grid(recipe, ("resnet20",), ("none", "autoscale"), 1)
    monkeypatch.setitem(STUDIES, "vit", study._replace(grids=(grid,)))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--preset", "vit", *args])
    monkeypatch.chdir(folder)
    reproduce.main()


def test_a_study_that_is_killed_and_stopped_ends_as_one_that_never_was(
    tmp_path, monkeypatch, capsys
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    output = finish(start(whole))
    assert "run 2 of 2, about 0:00:" in output
    assert f"{Path('results', 'vit', 'REPORT.md')} holds the report of 2 runs" in output

    process = start(broken)
    wait_for(broken / "runs" / "vit" / NAMES[0] / "metrics.jsonl", 2, process)
    process.kill()
    process.communicate()
    assert not list(broken.glob("results/vit/*.jsonl"))
    call(broken, monkeypatch, "--dry-run")
    output = capsys.readouterr().out
    assert f"/4 epochs  {NAMES[0]}" in output
    assert "0 of 2 done" in output

    process = start(broken)
    wait_for(broken / "runs" / "vit" / NAMES[1] / "metrics.jsonl", 1, process)
    process.send_signal(signal.SIGTERM)
    assert "run the same command again to continue" in finish(process, 128 + signal.SIGTERM)
    finish(start(broken))
    for name in NAMES:
        assert records(broken, name) == records(whole, name)
    call(broken, monkeypatch, "--dry-run")
    assert "2 of 2 done, nothing left" in capsys.readouterr().out
    assert not (broken / "runs" / "vit" / NAMES[0] / "checkpoints").exists()

    results = broken / "results" / "vit"
    report = (results / "REPORT.md").read_bytes()
    (results / "REPORT.md").unlink()
    call(broken, monkeypatch, "--report")
    assert (results / "REPORT.md").read_bytes() == report

    record = results / f"{NAMES[0]}.jsonl"
    record.write_text(record.read_text().replace('"batch_size": 16', '"batch_size": 32'))
    with pytest.raises(SystemExit) as stopped:
        call(broken, monkeypatch)
    assert "batch_size is 32 there and 16 in the study; move it away" in str(stopped.value)


def test_hours_are_kept(tmp_path):
    begin = time.monotonic()
    output = finish(start(tmp_path, "--hours", "0.0001"), 128 + signal.SIGTERM)
    assert "run the same command again to continue" in output
    assert time.monotonic() - begin < 120
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hours", "0"], "--hours is 0.0; it must be positive"),
        (["--seeds", "-1"], "--seeds is -1; it must be positive"),
        (
            ["--results", "file"],
            "cannot be created: Not a directory; give another folder",
        ),
        (["--report"], "holds no records; make them with reproduce.py --preset digits"),
    ],
)
def test_bad_options_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        reproduce.main()
    assert message in str(stopped.value)
