"""Who owns a run's folder, what is in it, and that nothing there is lost."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tests.training.test_record import GOOD
from training import run_folder as module
from training.data import Dataset
from training.options import Experiment, Launch
from training.record import RecordError, parse_records, read_records
from training.run_folder import LOCK, PICTURES, InUse, OpenFolder, RunFolder, lock

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
        command, pipe = [sys.executable, "-c", OWNER, str(folder)], subprocess.PIPE
        root = Path(__file__).parents[2]
        process = subprocess.Popen(command, cwd=root, text=True, stdin=pipe, stdout=pipe)
        assert process.stdout
        started.append((process, int(process.stdout.readline())))
        return started[-1]

    yield start
    for process, child in started:
        process.kill()
        process.communicate()
        os.kill(child, 9)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["of itself", "killed"])
def test_another_process_is_refused_until_the_owner_ends(end, start_owner, tmp_path):
    folder = tmp_path / "run"
    process, child = start_owner(folder)
    owner = f"process {process.pid} on {socket.gethostname()}"
    for _ in range(2):  # the first attempt leaves the owner's name as it is
        with pytest.raises(InUse, match=f"^{folder} is in use by {owner}$") as no, lock(folder):
            pass
        assert no.value.owner == owner
    if end == "killed":
        process.kill()
    process.communicate("" if end != "killed" else None)
    os.kill(child, 0)  # it is there
    with lock(folder):
        assert f"process {os.getpid()} on" in (folder / LOCK).read_text()


def is_free(folder: Path) -> bool:
    with open(folder / LOCK) as file:  # as another process would
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_process_may_enter_twice_and_leaves_with_the_outer_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for _ in range(2):
        with lock(tmp_path):
            with pytest.raises(KeyError), lock(tmp_path / "link" / "."):
                raise KeyError
            assert not is_free(tmp_path)
        assert is_free(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_refuses_nothing(code, tmp_path, monkeypatch, capsys):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)), lock(tmp_path):
            pass
    else:
        with lock(tmp_path), lock(tmp_path):
            pass
        assert f"{tmp_path} does not support locks ({os.strerror(code)})" in capsys.readouterr().err


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("how", ["moved", "its parent moved", "removed"])
def test_a_folder_that_is_not_where_it_was(how, replaced, tmp_path, monkeypatch):
    path, there = tmp_path / "here" / "run", tmp_path / "it's there"
    path.mkdir(parents=True)
    monkeypatch.chdir(path.parent)  # relative paths still lead there; Orbax keeps the absolute one
    opened = OpenFolder(Path("run"))
    opened.check()
    old = path.parent if "parent" in how else path
    path.rmdir() if how == "removed" else old.rename(there)
    if replaced:
        path.mkdir(parents=True)
    end = f"""'{tmp_path}/it'"'"'s there{"/run" * ("parent" in how)}'"""
    message = "was moved or removed while" if how == "removed" else f"moved to .* --out {end}$"
    with pytest.raises(FileNotFoundError, match=message):
        opened.check()
    if how != "removed":  # it comes back
        shutil.rmtree(old, ignore_errors=True)
        there.rename(old)
        opened.check()
    opened.close()


def run_folder(path: Path, resume: bool = False, data: Dataset = DATASET) -> RunFolder:
    return RunFolder(Experiment(), Launch(out=path, resume=resume), data)


@pytest.mark.parametrize("left", [(), (LOCK,), ("config.part",), (LOCK, "config.part")])
def test_a_folder_that_holds_nothing_but_a_lock_is_empty(left, tmp_path):
    for name in left:
        (tmp_path / name).touch()
    with run_folder(tmp_path):
        assert not is_free(tmp_path)
        assert set(os.listdir(tmp_path)) == {LOCK, "config.json"}
    assert is_free(tmp_path)


@pytest.mark.parametrize(
    ("files", "out", "problem"),
    [
        (["thesis.txt"], ".", "already exists and was not changed"),
        (["metrics.jsonl", LOCK], ".", "already exists and was not changed"),
        (["config.json"], ".", "already exists and was not changed"),
        (["file"], "file", "already exists"),
        (["file"], "file/run", "cannot be written: Not a directory; choose another"),
        ([], "link", "is a link to nowhere, which does not exist; create that, "),
        ([], "link/run", "is a link to nowhere, which does not exist; create that, "),
        ([], "loop", "is a link to loop, which does not exist; create that, "),
    ],
)
def test_a_folder_that_is_none_or_holds_something_is_left_as_it_is(files, out, problem, tmp_path):
    for name in files:
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to("nowhere") if "link" in out else None
    (tmp_path / "loop").symlink_to("loop") if out == "loop" else None
    before = set(os.listdir(tmp_path))
    with pytest.raises(OSError, match=problem), run_folder(tmp_path / out):
        pass
    assert set(os.listdir(tmp_path)) == before
    assert all((tmp_path / name).read_text() == "mine" or name == LOCK for name in files)
    assert LOCK not in files or is_free(tmp_path)


@pytest.mark.slow
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


def test_the_config_describes_the_run_and_other_data_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--tag", "it's"])
    with run_folder(tmp_path):
        content = (tmp_path / "config.json").read_bytes()
    saved = json.loads(content)
    assert saved["config"] == dataclasses.asdict(Experiment())
    assert (saved["launch"]["out"], saved["launch"]["resume"]) == (str(tmp_path), False)
    assert saved["command"] == """python train.py --tag 'it'"'"'s'"""
    assert (saved["mean"], saved["std"]) == ([0.25], [0.5])
    assert (saved["num_classes"], saved["channels"]) == (10, 1)
    assert {"jax", "flax", "optax", "optax-autoscale", "python"} <= set(saved["versions"])
    assert {"schema", "commit", "device", "device_count"} < set(saved)
    other = run_folder(tmp_path, True, dataclasses.replace(DATASET, test_labels=LABELS + 1))
    with pytest.raises(ValueError, match="--data-dir"), other:
        pass
    assert (tmp_path / "config.json").read_bytes() == content
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
        (LINES[0], "metrics.jsonl holds 1 epochs;"),
        (LINES[0] + LINES[1][:40], "metrics.jsonl is damaged: epoch 2: "),
        (LINES[1] + LINES[2], "is damaged: epoch 1: the record of epoch 2 stands in its place;"),
        (b"\xff" + LINES[0] + LINES[1], "metrics.jsonl is damaged: epoch 1: "),
    ],
)
def test_a_gap_before_the_checkpoint_is_refused(content, there, tmp_path):
    with pytest.raises(RecordError, match=f"{there}.* checkpoint is after epoch 2"):  # noqa: SIM117
        with interrupted(tmp_path, content, 20) as folder:
            folder.begin(2, pytest.fail)
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
    content, (run, other) = b"".join(LINES[:2]), (tmp_path / name for name in ("run", "other"))
    with pytest.raises(RecordError, match=r"holds 2 epochs, and there is no checkpoint .* copy"):  # noqa: SIM117
        with interrupted(run, content) as folder:
            folder.begin(0, pytest.fail)
    assert (run / "metrics.jsonl").read_bytes() == content
    (run / "checkpoints" / "0").mkdir(parents=True)  # the later ones were damaged
    # And the first epoch's record may be ahead of the first checkpoint.
    for resumed in (run_folder(run, resume=True), interrupted(other, LINES[0])):
        with resumed as folder:
            folder.begin(0, lambda text: None)
        assert read_records(resumed.path) == []


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
    for name in names[1:]:
        assert module.finished_records(tmp_path, 1) == RECORDS[:1]
        assert module.finished_records(tmp_path, 2) == []
        os.utime(tmp_path / name, (0, 0))
        assert module.finished_records(tmp_path, 1) == []
        (tmp_path / name).unlink()
        assert module.finished_records(tmp_path, 1) == []
        (tmp_path / name).touch()


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
        monkeypatch.setattr(module.time, "time", lambda: seconds)  # noqa: B023
        with module.tensorboard(tmp_path / "tensorboard", first) as track:
            for record in RECORDS[first:]:
                track(record)
    shown = events(tmp_path / "tensorboard")
    restarts = [event.step for event in shown if event.session_log.status == SessionLog.START]
    assert restarts == [1, 2]
    scalars = {(v.tag, e.step): v.simple_value for e in shown for v in e.summary.value}
    expected = {"train/loss": 2.5, "train/learning_rate": 1e-3, "train/images_per_second": 640}
    expected |= {"test/loss": 2, "test/accuracy": 0.5, "layer_std/stem": 0.1}
    expected |= {"effect/update_norm_ratio": 0.9, "effect/update_cosine": 0.99}
    numbers = {"global_std": 0.01, "scale_factor": 0.75, "exponent": 2}
    expected |= {f"autoscale/{name}": value for name, value in numbers.items()}
    assert expected.items() <= {tag: pytest.approx(scalars[tag, 3]) for tag, _ in scalars}.items()
    assert {epoch for _, epoch in scalars} == {1, 2, 3}


def test_weights_and_biases_has_the_records(tmp_path, monkeypatch):
    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars["test/accuracy"], "autoscale/scale_factor" in scalars))

        def finish(self, exit_code):
            calls.append(exit_code)

    def init(name, **options):
        if name == "unknown":
            raise KeyError("no login")
        calls.append(options | {"name": name})
        return Run()

    calls: list = []
    fake = types.ModuleType("wandb")
    vars(fake).update(__spec__=ModuleSpec("wandb", None), Error=KeyError, Settings=dict, init=init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for error in (None, KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt):  # noqa: SIM117
            with module.weights_and_biases(tmp_path, Experiment()) as track:
                track(GOOD | {"scale_factor": None})
                if error:
                    raise error
    first, config = calls[0], dataclasses.asdict(Experiment())
    assert first.items() >= {"name": tmp_path.name, "dir": tmp_path, "config": config}.items()
    # The same run goes on.
    assert calls == [first, (1, 0.5, False), 0, first, (1, 0.5, False), 1]
    assert first["id"]
    (tmp_path / "unknown").mkdir()
    tracker = module.weights_and_biases(tmp_path / "unknown", Experiment())
    with pytest.raises(ValueError, match=r"no login.*wandb login.*without --wandb"), tracker:
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        RunFolder(Experiment(), Launch(out=tmp_path, wandb=True), DATASET)
