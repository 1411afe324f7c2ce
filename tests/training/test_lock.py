"""One process at a time uses the folder of a run, and a run resumes only from matching records."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from training.config import Experiment, Launch
from training.lock import LOCK, InUse, lock

from training import lock as lock_module
from training.checkpoints import CheckpointError
from training.record import RecordError, parse_records, read_records
from training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
# Holds the lock until its input ends; its own child, which inherits what it can, lives on.
OWNER = """
import subprocess, sys
from pathlib import Path
from training.lock import lock
with lock(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""
DATASET = SimpleNamespace(num_classes=10, train_images=np.zeros((1, 16, 16, 1)))


def start_owner(folder: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    return process, int(process.stdout.readline())


def test_another_process_is_refused_and_told_whose_the_folder_is(tmp_path):
    folder = tmp_path / "run"
    process, child = start_owner(folder)
    owner = f"process {process.pid} on {socket.gethostname()}"
    for _ in range(2):  # the first attempt leaves the owner's name as it is
        with pytest.raises(InUse) as refused, lock(folder):
            pass
        assert str(refused.value) == f"{folder} is in use by {owner}"
        assert refused.value.owner == owner
    process.communicate("")
    with lock(folder):
        pass
    os.kill(child, 9)


def test_the_lock_falls_with_its_process_though_a_child_of_it_lives(tmp_path):
    process, child = start_owner(tmp_path)
    process.kill()
    process.communicate()
    os.kill(child, 0)  # it is there
    with lock(tmp_path):
        pass
    os.kill(child, 9)


def is_free(folder: Path) -> bool:
    with open(folder / LOCK) as file:  # as another process would
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_process_may_enter_twice_and_leaves_with_the_outer_one(tmp_path):
    with lock(tmp_path):
        with pytest.raises(KeyError), lock(tmp_path / "." / ""):
            raise KeyError
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    with lock(tmp_path):
        assert not is_free(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_refuses_nothing_and_is_told_once(
    code, tmp_path, monkeypatch, capsys
):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock_module.fcntl, "flock", flock)
    lock_module._say_unlocked.cache_clear()
    for name in ("one", "two"):
        with lock(tmp_path / name):
            pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"does not support locks ({os.strerror(code)})" in said


def run_folder(path: Path, *, resume: bool = False) -> RunFolder:
    return RunFolder(Experiment(), Launch(out=path, resume=resume), DATASET)


@pytest.mark.parametrize("left", [(), (LOCK,), ("config.part",), (LOCK, "config.part")])
def test_a_folder_that_holds_nothing_but_a_lock_is_empty(left, tmp_path):
    for name in left:
        (tmp_path / name).touch()
    with run_folder(tmp_path):
        assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("names", [("thesis.txt",), ("metrics.jsonl", LOCK), ("config.json",)])
def test_a_folder_that_holds_something_is_left_as_it_is(names, tmp_path):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="was not changed"), run_folder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert is_free(tmp_path) if LOCK in names else True


LINES = [
    json.dumps(
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_loss": 2.5,
            "test_loss": 2.0,
            "test_accuracy": 0.5,
            "learning_rate": 1e-3,
            "global_std": 0.01,
            "scale_factor": 0.75,
            "exponent": 2,
            "layer_std": {"stem": 0.1},
            "images_per_second": 640.0,
            "seconds": 1.0,
        }
    ).encode()
    + b"\n"
    for epoch in (1, 2, 3)
]
RECORDS = parse_records(LINES, Path("metrics.jsonl"))


def interrupted(folder: Path, content: bytes | None, *checkpoints: int) -> RunFolder:
    """A run that was stopped, with such records and with checkpoints after these steps."""
    with run_folder(folder):
        if content is not None:
            (folder / "metrics.jsonl").write_bytes(content)
        for step in checkpoints:
            (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return run_folder(folder, resume=True)


@pytest.mark.parametrize(
    ("content", "there"),
    [
        (None, "metrics.jsonl holds 0 epochs;"),
        (b"", "metrics.jsonl holds 0 epochs;"),
        (LINES[0], "metrics.jsonl holds 1 epochs;"),
        (LINES[0] + LINES[1][:40], "metrics.jsonl is damaged: epoch 2: "),
        (LINES[1] + LINES[2], "is damaged: epoch 1: the record of epoch 2 stands in its place;"),
        (LINES[0] * 2 + LINES[1], "damaged: epoch 2: the record of epoch 1 stands in its place;"),
        (b"\xff" + LINES[0] + LINES[1], "metrics.jsonl is damaged: epoch 1: "),
    ],
)
def test_a_gap_before_the_checkpoint_is_refused(content, there, tmp_path):
    said: list[str] = []
    with pytest.raises(RecordError) as refused, interrupted(tmp_path, content, 20) as folder:
        folder.begin(2, said.append)
    assert there in str(refused.value)
    assert "the checkpoint is after epoch 2, and needs the records of all epochs" in str(
        refused.value
    )
    metrics = tmp_path / "metrics.jsonl"
    assert (metrics.read_bytes() if metrics.exists() else None) == content
    assert not (tmp_path / "curves.png").exists()
    assert not said


@pytest.mark.parametrize("rest", [b"", LINES[2], LINES[2][:-5], b"\xff\x00", b"\n"])
def test_what_comes_after_the_checkpoint_is_replaced_and_told(rest, tmp_path):
    said: list[str] = []
    with interrupted(tmp_path, LINES[0] + LINES[1] + rest, 20) as folder:
        folder.begin(2, said.append)
        assert [each["epoch"] for each in folder.records] == [1, 2]
        folder.write(RECORDS[2], {})
    assert read_records(tmp_path) == RECORDS
    assert len(said) == bool(rest)
    assert all("resumes with epoch 3: the records from there to epoch 3 in" in t for t in said)


def test_a_last_line_without_its_end_is_given_one(tmp_path):
    with interrupted(tmp_path, LINES[0] + LINES[1][:-1], 20) as folder:
        folder.begin(2, pytest.fail)
        folder.write(RECORDS[2], {})
    assert read_records(tmp_path) == RECORDS


def test_records_without_a_checkpoint_are_not_thrown_away(tmp_path):
    content = b"".join(LINES)
    with (
        pytest.raises(CheckpointError, match=r"holds 3 epochs, and there is no checkpoint"),
        interrupted(tmp_path, content) as folder,
    ):
        folder.begin(0, pytest.fail)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content
    with run_folder(tmp_path, resume=True) as folder:
        (tmp_path / "checkpoints" / "0").mkdir(parents=True)  # the later ones were damaged
        folder.begin(0, lambda text: None)
    assert read_records(tmp_path) == []


def test_the_first_epochs_record_may_be_ahead_of_the_first_checkpoint(tmp_path):
    with interrupted(tmp_path, LINES[0]) as folder:
        folder.begin(0, lambda text: None)
    assert read_records(tmp_path) == []
