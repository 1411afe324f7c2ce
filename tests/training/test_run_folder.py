"""Who owns a run's folder, what is in it, and that nothing there is lost."""

import dataclasses
import errno
import fcntl
import importlib.machinery
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.training.test_record import GOOD
from training import run_folder as run_folder_module
from training.data import Dataset
from training.options import Experiment, Launch
from training.record import RecordError, parse_records, read_records
from training.run_folder import (
    LOCK,
    PICTURES,
    InUse,
    OpenFolder,
    RunFolder,
    TensorBoard,
    WeightsAndBiases,
    finished_records,
    lock,
)

ROOT = Path(__file__).parents[2]
# Holds the lock until its input ends; its own child, which inherits what it can, lives on.
OWNER = """
import subprocess, sys
from pathlib import Path
from training.run_folder import lock
with lock(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""
IMAGES, LABELS = np.zeros((1, 16, 16, 1), np.uint8), np.zeros(1, np.int32)
DATASET = Dataset(IMAGES, LABELS, IMAGES, LABELS, num_classes=10, mean=(0.25,), std=(0.5,))
LINES = [json.dumps(GOOD | {"epoch": epoch}).encode() + b"\n" for epoch in (1, 2, 3)]
RECORDS = parse_records(LINES, Path("metrics.jsonl"))


@pytest.fixture
def start_owner():
    """Starts a process that holds a folder, and gives it and its child's id."""
    started = []

    def start(folder: Path) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-c", OWNER, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        started.append((process, int(process.stdout.readline())))
        return started[-1]

    yield start
    for process, child in started:
        process.kill()
        process.communicate()
        os.kill(child, 9)


def test_another_process_is_refused_and_told_whose_the_folder_is(start_owner, tmp_path):
    folder = tmp_path / "run"
    process, _ = start_owner(folder)
    owner = f"process {process.pid} on {socket.gethostname()}"
    for _ in range(2):  # the first attempt leaves the owner's name as it is
        with pytest.raises(InUse) as refused, lock(folder):
            pass
        assert str(refused.value) == f"{folder} is in use by {owner}"
        assert refused.value.owner == owner
    process.communicate("")
    with lock(folder):
        assert f"process {os.getpid()} on" in (folder / LOCK).read_text()


def test_the_lock_falls_with_its_process_though_a_child_of_it_lives(start_owner, tmp_path):
    process, child = start_owner(tmp_path)
    process.kill()
    process.communicate()
    os.kill(child, 0)  # it is there
    with lock(tmp_path):
        pass


def is_free(folder: Path) -> bool:
    with open(folder / LOCK) as file:  # as another process would
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_process_may_enter_twice_and_leaves_with_the_outer_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with lock(tmp_path):
        with pytest.raises(KeyError), lock(tmp_path / "link" / "."):
            raise KeyError
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    with lock(tmp_path):
        assert not is_free(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_refuses_nothing(code, tmp_path, monkeypatch, capsys):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)), lock(tmp_path):
            pass
        return
    with lock(tmp_path), lock(tmp_path):
        pass
    assert f"{tmp_path} does not support locks ({os.strerror(code)})" in capsys.readouterr().err


@pytest.fixture
def opened(tmp_path):
    (tmp_path / "run").mkdir()
    folder = OpenFolder(tmp_path / "run")
    folder.check()
    yield folder
    folder.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_moved_and_comes_back(opened, replaced, tmp_path):
    path = tmp_path / "run"
    now = path.rename(tmp_path / "it's here")
    if replaced:
        path.mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        opened.check()
    assert f"{path} was moved to {now} while" in str(caught.value)
    assert str(caught.value).endswith(f"""--out '{tmp_path}/it'"'"'s here'""")  # for a shell
    if replaced:
        path.rmdir()
    now.rename(path)
    opened.check()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed(opened, replaced, tmp_path):
    (tmp_path / "run").rmdir()
    if replaced:
        (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match=r"was moved or removed while .*; resume where"):
        opened.check()


def test_a_folder_whose_parent_is_moved(tmp_path, monkeypatch):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    folder = OpenFolder(Path("run"))
    (tmp_path / "runs").rename(tmp_path / "others")
    # The relative path still leads there, but no longer the absolute one, that Orbax keeps.
    assert Path("run").exists()
    with pytest.raises(FileNotFoundError, match=f"moved to {tmp_path / 'others' / 'run'} "):
        folder.check()
    folder.close()


def run_folder(path: Path, *, resume: bool = False, data: Dataset = DATASET) -> RunFolder:
    return RunFolder(Experiment(), Launch(out=path, resume=resume), data)


@pytest.mark.parametrize("left", [(), (LOCK,), ("config.part",), (LOCK, "config.part")])
def test_a_folder_that_holds_nothing_but_a_lock_is_empty(left, tmp_path):
    for name in left:
        (tmp_path / name).touch()
    with run_folder(tmp_path):
        assert not is_free(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, "config.json"}
    assert is_free(tmp_path)


@pytest.mark.parametrize("names", [("thesis.txt",), ("metrics.jsonl", LOCK), ("config.json",)])
def test_a_folder_that_holds_something_is_left_as_it_is(names, tmp_path):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="was not changed"), run_folder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert is_free(tmp_path) if LOCK in names else True


def test_a_folder_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for out, problem in [
        ("file", "already exists"),
        ("file/run", "cannot be written: Not a directory; choose another"),
        ("link", "is a link to nowhere"),
        ("link/run", "is a link to nowhere"),
    ]:
        with pytest.raises(OSError, match=problem), run_folder(tmp_path / out):
            pass
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_folder_that_another_run_takes_at_this_moment_is_in_use(
    start_owner, tmp_path, monkeypatch
):
    def take(self) -> None:
        monkeypatch.undo()
        start_owner(tmp_path)
        (tmp_path / "config.json").touch()
        self._check_vacant()

    monkeypatch.setattr(RunFolder, "_check_vacant", take)
    with pytest.raises(InUse, match="in use by process"), run_folder(tmp_path):
        pass


def test_the_config_describes_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--tag", "it's"])
    with run_folder(tmp_path):
        saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["config"] == dataclasses.asdict(Experiment())
    assert (saved["launch"]["out"], saved["launch"]["resume"]) == (str(tmp_path), False)
    assert saved["command"] == """python train.py --tag 'it'"'"'s'"""
    assert (saved["mean"], saved["std"]) == ([0.25], [0.5])
    assert (saved["num_classes"], saved["channels"]) == (10, 1)
    assert {"jax", "flax", "optax", "optax-autoscale", "python"} <= set(saved["versions"])
    assert {"schema", "commit", "device", "device_count"} < set(saved)


@pytest.mark.parametrize("field", ["train_images", "train_labels", "test_images", "test_labels"])
def test_a_run_is_not_resumed_on_other_data_of_the_same_size(field, tmp_path):
    other = dataclasses.replace(DATASET, **{field: getattr(DATASET, field) + 1})
    with run_folder(tmp_path):
        pass
    before = (tmp_path / "config.json").read_bytes()
    with (
        pytest.raises(ValueError, match=r"--data-dir"),
        run_folder(tmp_path, resume=True, data=other),
    ):
        pass
    assert (tmp_path / "config.json").read_bytes() == before
    with run_folder(tmp_path, resume=True):
        pass


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
        (b"\xff" + LINES[0] + LINES[1], "metrics.jsonl is damaged: epoch 1: "),
    ],
)
def test_a_gap_before_the_checkpoint_is_refused(content, there, tmp_path):
    with pytest.raises(RecordError) as refused, interrupted(tmp_path, content, 20) as folder:
        folder.begin(2, pytest.fail)
    assert there in str(refused.value)
    assert "the checkpoint is after epoch 2" in str(refused.value)
    metrics = tmp_path / "metrics.jsonl"
    assert (metrics.read_bytes() if metrics.exists() else None) == content
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("rest", [b"", LINES[2], LINES[2][:-5], b"\xff\x00", b"\n"])
def test_what_comes_after_the_checkpoint_is_replaced_and_told(rest, tmp_path):
    said: list[str] = []
    content = LINES[0] + (LINES[1] + rest if rest else LINES[1][:-1])  # or a line without its end
    with interrupted(tmp_path, content, 20) as folder:
        folder.begin(2, said.append)
        assert folder.records == RECORDS[:2]
        folder.write(RECORDS[2])
        assert read_records(tmp_path) == RECORDS == folder.records
    assert len(said) == bool(rest)
    assert all("resumes with epoch 3: the records from there to epoch 3 in" in t for t in said)
    assert all((tmp_path / name).stat().st_size > 1000 for name in PICTURES)


def test_records_without_a_checkpoint_are_not_thrown_away(tmp_path):
    content = b"".join(LINES)
    with (
        pytest.raises(RecordError, match=r"holds 3 epochs, and there is no checkpoint .* copy"),
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


@pytest.mark.parametrize(
    ("accident", "message"),
    [("full", r"metrics.jsonl cannot be written: No space .*; free some"), ("moved", "moved to")],
)
def test_a_record_that_cannot_be_written(accident, message, tmp_path):
    with run_folder(tmp_path / "run") as folder:
        folder.begin(0, pytest.fail)
        if accident == "full":
            (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
        else:
            (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(OSError, match=message):
            folder.write(RECORDS[0])
    assert folder.records == []
    assert (tmp_path / "run").exists() == (accident == "full")


def test_a_run_has_finished_once_all_is_newer_than_its_records(tmp_path):
    names = ("metrics.jsonl", "parameters", *PICTURES)
    for name in names:
        (tmp_path / name).write_bytes(LINES[0] if name == names[0] else b"")
    assert finished_records(tmp_path, 1) == RECORDS[:1]
    assert finished_records(tmp_path, 2) == []
    for name in names[1:]:
        os.utime(tmp_path / name, (0, 0))
        assert finished_records(tmp_path, 1) == []
        (tmp_path / name).unlink()
        assert finished_records(tmp_path, 1) == []
        (tmp_path / name).touch()
    assert finished_records(tmp_path, 1) == RECORDS[:1]


def events(folder: Path) -> list[Event]:
    """In files of TensorBoard by name: length, its checksum, the message, its checksum."""
    found = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_tensorboard_has_the_records_and_hides_what_was_made_again(tmp_path, monkeypatch):
    for first, seconds in ((0, 2e9), (1, 1e9)):  # the clock was set back
        monkeypatch.setattr(run_folder_module.time, "time", lambda: seconds)  # noqa: B023
        board = TensorBoard(tmp_path / "tensorboard", first)
        for record in RECORDS[first:]:
            board.write(record)
        board.close(failed=False)
    shown = events(tmp_path / "tensorboard")
    restarts = [event.step for event in shown if event.session_log.status == SessionLog.START]
    assert restarts == [1, 2]
    scalars = {(v.tag, e.step): v.simple_value for e in shown for v in e.summary.value}
    for tag, value in {
        "train/loss": 2.5,
        "train/learning_rate": 1e-3,
        "train/images_per_second": 640,
        "test/loss": 2,
        "test/accuracy": 0.5,
        "autoscale/global_std": 0.01,
        "autoscale/scale_factor": 0.75,
        "autoscale/exponent": 2,
        "effect/update_norm_ratio": 0.9,
        "effect/update_cosine": 0.99,
        "layer_std/stem": 0.1,
    }.items():
        assert [scalars[tag, epoch] for epoch in (1, 2, 3)] == pytest.approx([value] * 3)


def test_weights_and_biases_has_the_records(tmp_path, monkeypatch):
    calls: list = []

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars["test/accuracy"], "autoscale/scale_factor" in scalars))

        def finish(self, exit_code):
            calls.append(exit_code)

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.Error, fake.Settings = KeyError, dict  # pyright: ignore
    fake.init = lambda **options: calls.append(options) or Run()  # pyright: ignore
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for failed in (False, True):
        tracker = WeightsAndBiases(tmp_path, Experiment())
        tracker.write(GOOD | {"scale_factor": None})
        tracker.close(failed=failed)
    first, *rest = calls[:3]
    assert (first["name"], first["dir"]) == (tmp_path.name, tmp_path)
    assert first["config"] == dataclasses.asdict(Experiment())
    assert rest == [(1, 0.5, False), 0]
    assert calls[3:] == [first, (1, 0.5, False), 1]  # the same run goes on

    def refuse(**options):
        raise KeyError("no login")

    fake.init = refuse  # pyright: ignore
    with pytest.raises(OSError, match=r"no login.*wandb login.*without --wandb"):
        WeightsAndBiases(tmp_path, Experiment())
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        RunFolder(Experiment(), Launch(out=tmp_path, wandb=True), DATASET)
