"""Accidents of whole programs: each ends with a one-line message, or continues; nothing is lost."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import train
from training.record import read_records

pytestmark = pytest.mark.slow
ROOT = Path(train.__file__).parent
# train.py as it is, with a network that compiles in no time.
CHILD = """
from functools import partial
import models
models.MODELS["resnet20"] = models.MODELS["resnet20"]._replace(
    make=partial(models.resnet8, widths=(4, 8))
)
import train
train.main()
"""
ARGS = ["--train-size", "96", "--batch-size", "16"]
CACHE = tempfile.TemporaryDirectory()  # most runs here compile the same programs
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_COMPILATION_CACHE_DIR": CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONPATH": str(ROOT),
}


def start(*args: str, folder: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *ARGS, *args],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], returncode: int = 0) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == returncode, stderr
    assert stderr.count("\n") == (returncode != 0), stderr
    return stdout, stderr


def epochs(out: Path) -> list[int]:
    return [record["epoch"] for record in read_records(out)]


def wait_for_epochs(out: Path, number: int, process: subprocess.Popen[str]) -> None:
    path, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_closes_the_pipe(stream, tmp_path):
    with start("--epochs", "2", "--out", str(tmp_path / "run")) as process:
        reader = getattr(process, stream)
        if stream == "stdout":
            assert reader.readline().endswith("compiling ...\n")
        reader.close()
    assert process.returncode == 0
    assert epochs(tmp_path / "run") == [1, 2]
    assert (tmp_path / "run" / "parameters").exists()
    assert (tmp_path / "run" / "gradients.png").exists()


def test_a_study_whose_list_is_not_read_to_its_end():
    with subprocess.Popen(
        [sys.executable, ROOT / "reproduce.py", "--dry-run"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("often", [(), ("--checkpoint-minutes", "0.0002")], ids=["", "in epochs"])
def test_a_folder_that_is_renamed(often, tmp_path):
    out, now = tmp_path / "run", tmp_path / "another name"
    process = start("--epochs", "1000", "--out", str(out), *often)
    wait_for_epochs(out, 2, process)
    out.rename(now)
    _, stderr = finish(process, returncode=1)
    assert stderr == (
        f"train.py: {out} was moved to {now} while the run was in progress; the finished part is "
        f"there: resume with: python train.py --resume --out '{now}'\n"
    )
    assert not (out / "metrics.jsonl").exists()
    done = len(epochs(now))
    finish(start("--resume", "--out", str(now), "--epochs", str(done + 1)))
    assert epochs(now) == [*range(1, done + 2)]
    assert not (out / "metrics.jsonl").exists()


def test_checkpoints_that_are_removed(tmp_path):
    out = tmp_path / "run"
    process = start("--epochs", "12", "--out", str(out))
    wait_for_epochs(out, 2, process)
    with contextlib.suppress(FileNotFoundError):
        (out / "checkpoints").rename(tmp_path / "removed")
    stdout, _ = finish(process)
    assert f"the checkpoints in {out / 'checkpoints'} are gone; new ones start at step" in stdout
    assert epochs(out) == [*range(1, 13)]
    finish(start("--epochs", "13", "--out", str(out), "--resume"))
    assert epochs(out) == [*range(1, 14)]


def test_auto_resume_starts_continues_and_leaves_a_finished_run(tmp_path):
    """What `make train` does."""
    command = ["--epochs", "3", "--auto-resume"]
    process = start(*command, folder=tmp_path)
    out = tmp_path / "runs" / "digits-resnet20-autoscale-adamw-seed0"
    wait_for_epochs(out, 1, process)
    process.kill()
    process.communicate()
    stdout, _ = finish(start(*command, folder=tmp_path))
    assert epochs(out) == [1, 2, 3]
    *_, result, pictures = stdout.splitlines()
    assert re.fullmatch(r"Test accuracy \d+\.\d\d% after 3 epochs in 0:\d\d:\d\d", result)
    assert pictures.startswith(f"Pictures: {out.relative_to(tmp_path)}/")

    before = {path: path.read_bytes() for path in (out / "metrics.jsonl", out / "curves.png")}
    again, *end = finish(start(*command, folder=tmp_path))[0].splitlines()
    assert again.startswith(f"{out.relative_to(tmp_path)} has finished already; ")
    assert end == [result, pictures]
    assert {path: path.read_bytes() for path in before} == before

    _, stderr = finish(start("--epochs", "3", folder=tmp_path), returncode=1)
    assert "already exists and was not changed; resume it with --resume" in stderr


def test_make_train_resumes():
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "--no-print-directory", "--dry-run", "train", "ARGS=--seed 3"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1].endswith("python train.py --auto-resume --seed 3")


def refused(args: list[str], monkeypatch) -> str:
    """The message of a run that fails before it starts."""
    monkeypatch.setattr(sys, "argv", ["train.py", *ARGS, *args])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    message = str(stopped.value)
    assert "\n" not in message
    return message.removeprefix("train.py: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epochs", "99999999999999999999"], "--epochs is 99999999999999999999; it must be"),
        (["--epochs", "2147483647"], "--epochs is 2147483647; it must be at most 357913941"),
        (["--decay-epochs", "1e300"], "--decay-epochs is 1e+300; it must be at most 357913941"),
        (["--learning-rate", "1e300"], "--learning-rate is 1e+300; it must be"),
        (["--out", "caf\udce9"], "--out is '"),
        (["--out", "link"], "link is a link to nowhere, which does not exist; create that, "),
        (["--out", "link/run"], "link is a link to nowhere, which does not exist; create that, "),
        (["--out", "loop"], "loop is a link to loop, which does not exist; create that, "),
        (["--out", "new", "--resume"], "there is no run in new to resume"),
    ],
)
def test_nothing_is_written_by_a_run_that_cannot_be(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    before = sorted(os.listdir())
    assert refused(args, monkeypatch).startswith(message)
    assert sorted(os.listdir()) == before


def test_a_folder_with_the_rest_of_a_run_that_never_began(tmp_path, monkeypatch):
    (tmp_path / "config.part").write_text('{"config')
    out = ["--epochs", "1", "--out", str(tmp_path)]
    assert refused([*out, "--resume"], monkeypatch).endswith("leave out --resume to start it")
    finish(start(*out))
    assert epochs(tmp_path) == [1]
    assert not (tmp_path / "config.part").exists()
