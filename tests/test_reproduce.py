"""A study from the command line: interrupted, shared, extended, and complete in the end."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import reproduce
from reproduction import records, studies
from reproduction.studies import Axes
from tests import programs
from tests.programs import contents, epochs, no_process_outlives_its_test, wait_for  # noqa: F401
from training.options import Experiment
from training.run_folder import lock

MINE = ["--name=mine", "--seeds=2", "--epochs=6", "--train-size=96", "--batch-size=16"]
NAMES = [f"digits-resnet20-{m}-adamw-seed{k}" for k in (0, 1) for m in ("none", "autoscale")]


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    return programs.start(*(args or MINE), program="reproduce", cwd=folder)


def finish(process: subprocess.Popen[str], returncode: int = 0) -> str:
    stdout, stderr = programs.finish(process, returncode)
    assert "Traceback" not in stderr
    return stdout + stderr


def run_of(folder: Path, name: str) -> Path:
    return folder / "studies" / "mine" / "runs" / name


def made(output: str) -> list[str]:
    return re.findall(r"^run \d of \d+, .*: (\S+)$", output, re.MULTILINE)


def untimed(folder: Path, name: str) -> list[dict]:
    """The epochs of a record in the folder of a study."""
    _, *rest = (folder / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0, "images_per_second": 0} for line in rest]


def call(monkeypatch, folder: Path, *args: str) -> None:
    """The same in this process, for what trains nothing."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *args])
    monkeypatch.chdir(folder)
    reproduce.main()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The study, run by a single process."""
    folder = tmp_path_factory.mktemp("alone")
    output = finish(start(folder))
    assert made(output) == NAMES
    assert re.search(r"^run 1 of 4, about 0:\d\d:\d\d left: ", output, re.M)
    assert "Autoscale minus AdamW: " in output
    assert output.endswith("studies/mine/REPORT.md holds the report of 4 runs\n")
    return folder


def assert_complete(folder: Path, alone: Path) -> None:
    mine = folder / "studies" / "mine"
    assert list(records.read(mine)) == sorted(NAMES)
    for name in NAMES:
        assert untimed(mine, name) == untimed(alone / "studies" / "mine", name)
        assert not (mine / "runs" / name / "checkpoints").exists()
    assert f"| {jax.device_count()} x cpu | 4 | 4 |" in (mine / "REPORT.md").read_text()
    assert not list(mine.glob("*.part"))


@pytest.mark.slow
def test_a_study_that_is_killed_and_stopped_ends_as_one_that_never_was(
    alone, tmp_path, monkeypatch, capsys
):
    process = start(tmp_path)
    wait_for(lambda: epochs(run_of(tmp_path, NAMES[0])) > 1, process)
    process.kill()
    process.communicate()
    call(monkeypatch, tmp_path, "--name=mine", "--dry-run")
    output = capsys.readouterr().out
    assert re.search(rf"\d/6 epochs  {NAMES[0]}", output)
    assert "0 of 4 done, about " in output

    process = start(tmp_path, "--name=mine")  # its options are in its folder
    wait_for(lambda: epochs(run_of(tmp_path, NAMES[1])) > 0, process)
    process.send_signal(signal.SIGTERM)
    assert "run the same command again to continue" in finish(process, 128 + signal.SIGTERM)
    finish(start(tmp_path, "--name=mine"))
    assert_complete(tmp_path, alone)

    report = tmp_path / "studies" / "mine" / "REPORT.md"
    written = report.read_bytes()
    report.unlink()
    call(monkeypatch, tmp_path, "--name=mine", "--report")
    assert report.read_bytes() == written


@pytest.mark.slow
def test_further_values_extend_a_study(alone, tmp_path):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    (tmp_path / "studies" / "mine" / f"{NAMES[2]}.jsonl").unlink()  # which is made again
    output = finish(start(tmp_path, "--name=mine", "--methods=clip", "--seeds=1"))
    clip = [f"digits-resnet20-clip-adamw-seed{seed}" for seed in (0, 1)]
    assert sorted(made(output)) == sorted([NAMES[2], *clip])
    mine = tmp_path / "studies" / "mine"
    assert untimed(mine, NAMES[2]) == untimed(alone / "studies" / "mine", NAMES[2])
    assert "Clipping minus AdamW" in (mine / "REPORT.md").read_text()


@pytest.mark.slow
def test_two_processes_share_a_study_and_one_that_stands_still_is_left_alone(alone, tmp_path):
    both = [start(tmp_path) for _ in range(2)]
    outputs = [finish(process) for process in both]
    assert sorted(made(outputs[0]) + made(outputs[1])) == sorted(NAMES)
    assert all(made(output) for output in outputs)
    assert_complete(tmp_path, alone)

    for name in (NAMES[0], NAMES[3]):
        (tmp_path / "studies" / "mine" / f"{name}.jsonl").unlink()
        shutil.rmtree(run_of(tmp_path, name))
    first, held = start(tmp_path), run_of(tmp_path, NAMES[0])
    wait_for(lambda: epochs(held) > 0, first)
    first.send_signal(signal.SIGSTOP)
    before = contents(held)
    output = finish(start(tmp_path))
    assert made(output) == NAMES[3:]
    owner = f"process {first.pid} on {socket.gethostname()}"
    assert f"{held.relative_to(tmp_path)} is in use by {owner}\n" in output
    assert "1 of 4 runs are left to other processes" in output
    assert "REPORT.md holds the report of 3 runs" in output
    assert contents(held) == before
    first.kill()
    first.communicate()
    assert made(finish(start(tmp_path))) == NAMES[:1]
    assert_complete(tmp_path, alone)


@pytest.mark.slow
def test_a_repetition_has_a_folder_of_its_device_and_hours_are_kept(alone, tmp_path):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    mine = tmp_path / "studies" / "mine"
    (mine / "cpu").mkdir()
    for name in NAMES[1:]:  # only one run is left to be made
        shutil.copy(mine / f"{name}.jsonl", mine / "cpu")
    begin = time.monotonic()
    output = finish(start(tmp_path, "--name=mine", "--repeat", "--hours=0.0001"), 143)
    assert "run the same command again to continue" in output
    assert time.monotonic() - begin < 120
    output = finish(start(tmp_path, "--name=mine", "--repeat"))
    assert made(output) == NAMES[:1]
    assert untimed(mine / "cpu", NAMES[0]) == untimed(mine, NAMES[0])
    assert output.endswith("holds the report of 8 runs\n")


@pytest.mark.slow
def test_runs_of_train_py_are_reported_from_their_folders(alone, tmp_path, monkeypatch, capsys):
    runs = [str(alone / "studies" / "mine" / "runs" / name) for name in NAMES]
    with open(shutil.copytree(runs[3], tmp_path / "half") / "metrics.jsonl", "r+") as file:
        file.truncate(len(file.readline() + file.readline()))
    call(monkeypatch, tmp_path, "--name", "seen", "--runs", *runs[:3])
    call(monkeypatch, tmp_path, "--name", "seen", "--runs", "half")  # one more
    output = capsys.readouterr().out
    assert "Autoscale minus AdamW" in output
    text = (tmp_path / "studies" / "seen" / "REPORT.md").read_text()
    assert "| Autoscale | 1 | 2 of 6 |" in text
    assert "| AdamW | 1 | 6 of 6 |" in text
    assert "Descriptive, not tested." in text  # a run has not finished
    assert (tmp_path / "studies" / "seen" / "curves.png").exists()
    call(monkeypatch, tmp_path, "--name", "seen", "--report")
    assert (tmp_path / "studies" / "seen" / "REPORT.md").read_text() == text


def test_a_preset_is_made_in_a_fresh_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.estimate, "measured_rate", lambda it: 1e-9)
    call(monkeypatch, tmp_path, "--preset", "digits", "--dry-run")
    output = capsys.readouterr().out
    assert "0 of 50 done, about 0:" in output
    call(monkeypatch, tmp_path, "--preset", "digits", "--dry-run", "--seeds", "7")
    assert "0 of 70 done, about 0:" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hours", "0"], "--hours is 0.0; it must be positive"),
        (["--seeds", "-1"], "--seeds is -1; it must be positive"),
        (["--results", "file"], "cannot be created: Not a directory; give another folder"),
        (["--report"], "holds no records; make them without --report"),
        (["--methods", "none"], "needs a name: give it one with --name"),
        (["--preset", "vit", "--epochs", "3"], "needs a name: give it one with --name"),
        (["--preset", "vit", "--name", "x"], "--preset is vit and --name is x; give one"),
        (["--name", "a/b"], "--name is 'a/b'; it names a folder, and must consist of"),
        (["--name", "digits"], "--name is 'digits'; .* not be a preset: digits, "),
        (["--name", "x", "--weight-decays", "-1"], "weight_decay is -1.0; it should be greater"),
        (["--name", "x", "--runs", "nowhere"], "nowhere does not exist; give the folder of a run"),
        (["--name", "x", "--report"], "there is no study x in studies; leave out --report"),
        (["--name", "begun", "--epochs", "9"], "--epochs is 9, and the study begun .* with 2"),
        (["--name", "begun", "--runs", "run"], "begun cannot have both --runs and runs of its own"),
    ],
)
def test_bad_options_are_one_line(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    experiment = Experiment(epochs=2)
    axes = Axes().resolve(experiment)
    studies.save(tmp_path / "studies" / "begun", studies.Begun(experiment, axes, ()))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, *arguments)
    assert re.match(f"reproduce.py: .*{message}", str(stopped.value))
    assert "\n" not in str(stopped.value)


def test_an_invalid_record_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    mine = tmp_path / "studies" / "mine"
    mine.mkdir(parents=True)
    (mine / f"{NAMES[0]}.jsonl").write_text("{}\n")
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match=f"{NAMES[0]}.jsonl is not the record of a run"):
            call(monkeypatch, tmp_path, *MINE, *more)
    assert not (mine / "runs").exists()


@pytest.mark.slow
def test_what_other_processes_do_meanwhile_counts(alone, tmp_path, monkeypatch, capsys):
    """A run that is finished between the reading of the records and the lock, and the report."""
    done, mine, trained = alone / "studies" / "mine", tmp_path / "studies" / "mine", []

    def lock_late(folder: Path):
        if not trained:
            shutil.copy(done / f"{NAMES[0]}.jsonl", mine)
        return lock(folder)

    def make(experiment, work) -> None:
        trained.append(experiment.name)
        shutil.copy(done / f"{experiment.name}.jsonl", mine)

    def write_slowly(*arguments, write_report=reproduce.write_report):
        found = write_report(*arguments)
        shutil.copy(done / f"{NAMES[3]}.jsonl", mine)
        return found

    monkeypatch.setattr(reproduce.estimate, "measured_rate", lambda it: 1e-9)
    monkeypatch.setattr(reproduce, "lock", lock_late)
    monkeypatch.setattr(reproduce, "make", make)
    monkeypatch.setattr(reproduce, "write_report", write_slowly)
    monkeypatch.setattr(reproduce, "make_missing", lambda work: reproduce_missing(work, 3))
    call(monkeypatch, tmp_path, *MINE)
    assert trained == NAMES[1:3]
    assert capsys.readouterr().out.endswith("holds the report of 4 runs\n")


def reproduce_missing(work, count: int, make_missing=reproduce.make_missing):
    """All but the last runs, which are another process's."""
    return make_missing(work._replace(experiments=work.experiments[:count]))


def test_nothing_is_reported_where_nothing_is_done_yet(tmp_path, monkeypatch, capsys):
    def raise_in_use(folder: Path):
        raise reproduce.InUse(folder, "another process")

    monkeypatch.setattr(reproduce, "lock", raise_in_use)
    call(monkeypatch, tmp_path, *MINE)
    output = capsys.readouterr().out
    assert output.count(" is in use by another process\n") == 4
    assert "4 of 4 runs are left to other processes" in output
    assert not list(tmp_path.rglob("REPORT.md"))


@pytest.mark.slow
def test_where_the_packages_of_statistics_are_missing_one_line_says_how_to_install_them():
    blocked = "import runpy, sys; sys.modules['pandas'] = None; sys.path.insert(0, '.'); "
    command = [sys.executable, "-c", f"{blocked}runpy.run_path('reproduce.py')"]
    ended = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "need pandas: " in ended.stderr
    assert "pip install --group reproduce" in ended.stderr
