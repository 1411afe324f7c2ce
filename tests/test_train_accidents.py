"""Whatever happens to a run, nothing is lost: it goes on, or ends with a line and is resumed."""

import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import train
from tests.programs import (  # noqa: F401
    ARGS,
    STEPS,
    after,
    assert_same_run,
    contents,
    epochs,
    finish,
    main,
    no_process_outlives_its_test,
    refused,
    start,
    wait_for,
)
from training import data
from training.display import Display
from training.record import read_records
from training.run_folder import finished_records, lock

pytestmark = pytest.mark.slow

OFTEN = ("--checkpoint-minutes", "0.0005")
SIMPLE = tuple(arg for arg in ARGS if arg != "--effect")  # which takes longer to compile


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A run that was never interrupted."""
    out = tmp_path_factory.mktemp("reference") / "run"
    main(*ARGS, "--out", out)
    return out


def checkpoints(out: Path) -> list[str]:
    folder = out / "checkpoints"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def latest(out: Path) -> int:
    return max((int(name) for name in checkpoints(out) if name.isdigit()), default=0)


def test_sigkill_at_any_moment(reference, tmp_path):
    """Inside a checkpoint's write, right after an epoch's record, and inside an epoch."""
    moments = [
        lambda: any("tmp" in name and name[0] != "0" for name in checkpoints(tmp_path)),
        lambda: epochs(tmp_path) > 0,
        lambda: latest(tmp_path) > STEPS,
    ]
    for attempt, moment in enumerate(moments):
        process = start(*ARGS, *OFTEN, "--out", tmp_path, *(["--resume"] if attempt else []))
        wait_for(moment, process)
        process.kill()
        process.communicate()
    main("--resume", "--out", tmp_path)
    assert_same_run(tmp_path, reference)


def stopped_by(number: int, *args: str | Path, owner: object = Display, name="step", call=1) -> Any:
    """The exit code of a run that gets a signal after a call of a function."""
    send = partial(signal.raise_signal, number)
    before = signal.signal(number, signal.default_int_handler)  # nohup, for one, ignores SIGHUP
    try:
        with after(owner, name, call, send), pytest.raises(SystemExit) as stopped:
            main(*args)
    finally:
        signal.signal(number, before)
    return stopped.value.code


def printed_command(said: str) -> list[str]:
    (command,) = re.findall(r"resume with: python train.py (.*)$", said, re.MULTILINE)
    return shlex.split(command)


@pytest.mark.parametrize(
    ("name", "owner", "function", "call"),
    [
        ("SIGTERM", Display, "step", 1),
        ("SIGINT", Display, "step", STEPS - 1),
        ("SIGHUP", Display, "step", STEPS),
        ("SIGXCPU", Display, "evaluating", 1),
        # A study whose last epoch it reaches must not go on with the next run.
        ("SIGTERM", Display, "evaluating", 3),
        ("SIGTERM", train, "save_model", 1),
    ],
)
def test_a_signal_stops_after_a_step(name, owner, function, call, reference, tmp_path, capfd):
    number = signal.Signals[name]
    stopped = stopped_by(number, *ARGS, "--out", tmp_path, owner=owner, name=function, call=call)
    assert stopped == 128 + number
    at_once, at_the_end = capfd.readouterr().err.splitlines()
    assert at_once == f"train.py: {name}: stopping after this step"
    assert at_the_end.startswith(f"train.py: {name}: stopped after step {latest(tmp_path)}, ")
    main(*printed_command(at_the_end))
    assert_same_run(tmp_path, reference)


def test_a_signal_while_it_compiles_ends_at_once(tmp_path):
    """The compiler runs for minutes without ever returning to Python; this one does for ever."""
    hangs = """
import ctypes, signal, threading, time
def compile(*_):
    time.sleep(1)  # until the main thread waits, which this signal does not wake
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    mutex = ctypes.create_string_buffer(128)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
train.Program.compile = compile
"""
    process = start(*ARGS, "--out", tmp_path, before=hangs)
    _, stderr = finish(process, 143)
    assert stderr == "train.py: SIGTERM: stopped before it took a step\n"


def test_the_printed_command_resumes_from_anywhere(tmp_path, monkeypatch, capfd):
    """With the data that the run began with, and none where it is typed."""
    load, out = data.load, tmp_path / "a run"

    def load_there(name, data_dir, **options):
        assert Path(data_dir, name).exists()
        return load(name, **options)

    monkeypatch.setattr(data, "load", load_there)
    (tmp_path / "here" / "data" / "digits").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    args = (*ARGS, "--data-dir", "data", "--out", out)
    assert stopped_by(signal.SIGTERM, *args) == 143
    monkeypatch.chdir(tmp_path)
    main(*printed_command(capfd.readouterr().err))
    assert epochs(out) == 3


def test_a_folder_that_is_renamed(reference, tmp_path):
    out, now = tmp_path / "run", tmp_path / "another name"
    with after(Display, "step", 2 * STEPS - 1, lambda: out.rename(now)):
        said = refused(*ARGS, "--out", out)
    assert said.startswith(f"{out} was moved to {now} while the run was in progress; ")
    assert not (out / "metrics.jsonl").exists()
    main(*printed_command(said))
    assert_same_run(now, reference)


def test_auto_resume_starts_continues_and_leaves_a_finished_run(tmp_path, monkeypatch, capsys):
    """What `make train` does."""
    monkeypatch.chdir(tmp_path)
    out, load = Path("runs", "digits-resnet20-autoscale-adamw-seed0"), data.load
    assert stopped_by(signal.SIGTERM, *ARGS, "--auto-resume", name="epoch") == 143
    assert epochs(out) == 1
    main(*ARGS, "--auto-resume")
    assert epochs(out) == 3
    *_, result, pictures = capsys.readouterr().out.splitlines()
    before = contents(out)
    monkeypatch.setattr(data, "load", None)  # called by all that trains
    main(*ARGS, "--auto-resume")
    again, *end = capsys.readouterr().out.splitlines()
    assert again.startswith(f"{out} has finished already; ")
    assert end == [result, pictures]
    monkeypatch.setattr(data, "load", load)
    assert "already exists and was not changed; resume it with --resume" in refused(*ARGS)
    assert contents(out) == before


def test_config_json_repeats_the_run(reference, tmp_path):
    main("--config", reference / "config.json", "--out", tmp_path)
    assert_same_run(tmp_path, reference)


def test_more_epochs_may_be_asked_for_and_fewer_may_not(reference, tmp_path):
    main(*ARGS, "--epochs", "2", "--out", tmp_path)
    before = contents(tmp_path)
    said = refused("--resume", "--out", tmp_path, "--epochs", "1")
    assert said.startswith(f"--epochs is 1, and the run in {tmp_path} ")
    assert contents(tmp_path) == before
    main("--resume", "--out", tmp_path, "--epochs", "3")
    assert_same_run(tmp_path, reference)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["epochs"] == 3


def test_a_full_disk_ends_the_run_and_loses_nothing(reference, tmp_path):
    """A real file system of 256 KiB, where it may be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed")
    try:
        _, stderr = finish(start(*ARGS, "--out", tmp_path / "run"), 1)
        (line,) = stderr.splitlines()
        assert line.startswith("train.py: ")
        assert "resume with --resume" in line
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
        main("--resume", "--out", tmp_path / "run")
        assert_same_run(tmp_path / "run", reference)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("output", ["pipe", "terminal"])
def test_a_run_outlives_its_output(output, reference, tmp_path):
    args = (*ARGS, "--out", tmp_path)
    if output == "pipe":
        process = start(*args)
        assert process.stdout.readline().endswith("compiling ...\n")
        process.stdout.close()
        process.stderr.close()
    else:
        ours, theirs = pty.openpty()
        process = start(*args, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = b""
        while b"train loss" not in shown:  # the live view has begun
            shown += os.read(ours, 1024)
        os.close(ours)
    assert process.wait(timeout=240) == 0
    assert finished_records(tmp_path, 3)
    assert_same_run(tmp_path, reference)


def in_use(out: Path, process: subprocess.Popen[str]) -> str:
    return f"{out} is in use by process {process.pid} on {socket.gethostname()}"


def test_a_second_process_does_not_resume_what_the_first_one_trains(tmp_path):
    first = start(*ARGS, "--epochs", "10000", "--out", tmp_path)
    wait_for(lambda: epochs(tmp_path), first)
    for resume in ([], ["--resume"]):
        said = refused(*ARGS, "--epochs", "10000", "--out", tmp_path, *resume)
        assert said == in_use(tmp_path, first)
    assert first.poll() is None
    first.kill()
    first.communicate()
    done = epochs(tmp_path)
    main("--resume", "--epochs", str(done + 1), "--out", tmp_path)
    assert len(read_records(tmp_path)) == done + 1  # epochs 1, 2, ... once each


def test_of_two_fresh_runs_at_the_same_instant_one_wins(tmp_path):
    wait = """
import os, sys
def wait(self, enter=train.RunFolder.__enter__):
    go = os.path.dirname(os.path.dirname(sys.argv[-1])) + "/go"
    open(f"{go}-{os.getpid()}", "w").close()
    while not os.path.exists(go):
        pass
    return enter(self)
train.RunFolder.__enter__ = wait
"""
    out = tmp_path / "a" / "run"
    both = [start(*ARGS, "--epochs", "10000", "--out", out, before=wait) for _ in range(2)]
    for process in both:
        wait_for((tmp_path / f"go-{process.pid}").exists, process)
    (tmp_path / "go").touch()
    while all(process.poll() is None for process in both):
        time.sleep(0.01)
    winner, loser = sorted(both, key=lambda process: process.poll() is not None)
    assert finish(loser, 1)[1] == f"train.py: {in_use(out, winner)}\n"
    wait_for(lambda: epochs(out), winner)


def start_pair(out: Path, *args: str) -> list[subprocess.Popen[str]]:
    """Two processes of one run, each with a device."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    args = (*SIMPLE, *args, "--coordinator", address, "--num-processes", "2", "--process-id")
    return [start(*args, str(number), "--out", out, number=2) for number in range(2)]


def test_two_processes_equal_one_with_two_devices(tmp_path):
    """Also when either is killed, both continue, and in the end one continues alone.

    Few starts: each time, process 1 compiles anew, as JAX lets process 0 alone write its cache.
    """
    out, alone = tmp_path / "together", tmp_path / "alone"

    def kill(pair: list[subprocess.Popen[str]], victim: int) -> None:
        pair[victim].kill()
        other = pair[1 - victim]
        other.send_signal(signal.SIGCONT)
        said = other.communicate(timeout=60)[1].splitlines()
        assert other.returncode not in (0, None)
        assert said[-1].startswith(f"train.py, process {1 - victim} of 2: terminated early")
        assert said[-1].endswith("start all of them again with --resume")
        pair[victim].communicate()

    args = ("--epochs", "4", *OFTEN)
    pair = start_pair(out, *args)
    wait_for((out / "checkpoints" / "0").exists, pair[0])  # while they compile
    for process in pair:
        process.send_signal(signal.SIGSTOP)
    assert refused("--resume", "--out", out) == in_use(out, pair[0])
    kill(pair, 0)
    with lock(out):  # though the small process that watched over it may live on
        pass
    pair = start_pair(out, *args, "--resume")
    wait_for(lambda: latest(out) > STEPS, pair[0])
    kill(pair, 1)
    pair = start_pair(out, *args, "--resume", "--checkpoint-minutes", "1")
    assert finish(pair[0])[1] == ""
    assert finish(pair[1])[1] == "train.py, process 1 of 2: process 0 shows the progress\n"
    finish(start("--resume", "--epochs", "5", "--out", out, number=2))
    finish(start(*SIMPLE, "--epochs", "5", "--out", alone, number=2))
    assert_same_run(out, alone)
