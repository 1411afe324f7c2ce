"""When a run writes a checkpoint and stops, and that it outlives whoever reads its output."""

import logging
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.sharding import AxisType

from training import signals
from training.signals import Interrupted, Request, Requests, interruptible

ROOT = Path(__file__).parents[2]


def test_a_checkpoint_is_due_every_so_many_minutes(monkeypatch):
    now, due = [1000.0], []
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    requests = Requests(jax.make_mesh((8,), ("data",), (AxisType.Auto,)), 2.0)
    requests.begin()
    for seconds in (1, 60, 58, 2, 118, 3, 1000, 1):
        now[0] += seconds
        due.append(requests.next().save)
    assert due == [False, False, False, True, False, True, True, False]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_a_signal_is_kept_for_all_later_requests_and_only_while_entered(name, monkeypatch, capfd):
    number = getattr(signal, name)
    before = signal.SIG_DFL
    first = signal.signal(number, before)  # nohup, for one, ignores SIGHUP
    with Requests(jax.make_mesh((8,), ("data",), (AxisType.Auto,)), 1.0) as requests:
        requests.begin()
        assert requests.next() == Request(False, 0)
        assert signal.getsignal(number) is not before  # else it would end the tests
        signal.raise_signal(number)
        assert [requests.next().signal for _ in range(2)] == [number] * 2
        assert requests.signal == number
        monkeypatch.setattr(jax, "process_count", lambda: 2)  # they travel over the devices
        assert jax.device_get(requests.next()).tolist() == [0, number]
    assert signal.signal(number, first) is before
    assert capfd.readouterr().err == f"train.py: {name}: stopping after this step\n"


def test_what_a_stopped_run_says_and_its_exit_code():
    with pytest.raises(KeyError, match="mine"):
        interruptible(lambda: {}["mine"])
    stopped = Interrupted(signal.SIGUSR1, 12, Path("a run"))
    assert stopped.exit_code == 128 + signal.SIGUSR1
    assert str(stopped).startswith("SIGUSR1: stopped after step 12,")
    assert str(stopped).endswith("python train.py --resume --out 'a run'")


def child(code: str, *arguments: str, **pipes: Any) -> subprocess.Popen[Any]:
    options = [each for each in arguments if each == "-u"]
    program = f"import signal, sys\nfrom training.signals import *\n{code}"
    command = [sys.executable, *options, "-c", program, *arguments]
    return subprocess.Popen(command, cwd=ROOT, **pipes)


IN_A_RUN = """
from training.devices import make_mesh
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
with Requests(make_mesh(), 1.0) as requests:
    signal.raise_signal(signal.SIGHUP)
    if begun := "begun" in sys.argv:
        requests.begin()
    signal.raise_signal(getattr(signal, sys.argv[-1]))
    print(requests.signal, flush=True)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    print("not reached")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "begun"), [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGINT, ("begun",))]
)
def test_a_signal_before_the_run_begins_ends_at_once_and_so_does_a_second_ctrl_c(number, begun):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = child(IN_A_RUN, *begun, number.name, **pipes)
    said, errors = process.communicate(timeout=60)
    if begun:
        assert (process.returncode, said) == (130, b"%d\n" % number)
    else:
        assert (process.returncode, said) == (128 + number, b"")
        assert errors == b"train.py: %s: stopped before it took a step\n" % number.name.encode()


# Prints more than a pipe's or a buffer's size; waits before it does, and before it ends.
TALKS = """
outlive_readers()
print("first", flush=True)
sys.stdin.readline()
for number in range(10_000):
    print(number)
    print(number, file=sys.stderr)
sys.stdin.readline()
print("the end")  # left to the flush at exit
sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "options"),
    [
        *[("is slow", options) for options in ((), ("-u",))],
        *[("closes the pipe", options) for options in ((), ("-u",))],
        ("closes the terminal", ()),
    ],
)
def test_a_program_outlives_its_reader(reader, options):
    ours, theirs = pty.openpty() if "terminal" in reader else os.pipe()
    os.set_blocking(theirs, reader != "is slow")
    process = child(TALKS, *options, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert process.stdin
    with open(ours, "rb", buffering=0) as file:
        assert file.read(5) == b"first"
        if reader == "is slow":
            process.stdin.write(b"go\ngo\n")
            process.stdin.close()
            time.sleep(0.5)
            lines = b"".join(iter(lambda: file.read(10_000), b"")).splitlines()
            assert (len(lines), lines[-1]) == (2 + 2 * 10_000, b"the end")
    if "closes" in reader:
        process.communicate(b"go\ngo\n")
    assert process.wait(timeout=60) == 7


@pytest.mark.slow
def test_a_full_disk_loses_only_what_does_not_fit():
    with open("/dev/full", "wb") as full:
        process = child(TALKS, stdin=subprocess.DEVNULL, stdout=full, stderr=full)
        assert process.wait(timeout=60) == 7
        stream = signals._Enduring(full.fileno(), "w", closefd=False)
        assert stream.write(b"lost") == 4
        # It is not given up: there may be space again.
        assert os.path.samestat(os.fstat(full.fileno()), os.stat("/dev/full"))


@pytest.mark.slow
def test_a_closed_stream_and_characters_that_the_encoding_lacks():
    code = "sys.stdout = None; outlive_readers(); print(); print('\\udce9 é', file=sys.stderr)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = child(code, stderr=subprocess.PIPE, env=environment)
    assert process.communicate(timeout=60)[1] == b"\\udce9 \\xe9\n"
    assert process.returncode == 0


@pytest.fixture
def _restored(monkeypatch):
    """What `one_line_errors` changes for the whole program."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    levels = {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    "error",
    [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 8 bytes.")],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_one_line_with_what_needs_less(error):
    says = pytest.raises(SystemExit, match=r"^a\.py: out of memory .*--batch-size")
    with says as ended, signals.one_line_errors("a.py"):
        raise error
    assert "\n" not in str(ended.value)


@pytest.mark.usefixtures("_restored")
def test_an_error_of_our_own_keeps_its_traceback_and_asks_for_a_report():
    with pytest.raises(KeyError) as ended, signals.one_line_errors("a.py"):
        raise KeyError("ours")
    assert "report it" in ended.value.__notes__[0]
