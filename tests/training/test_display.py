"""What is shown during a run, and whether the time left comes true."""

import datetime
import io
import re
from functools import partial

import numpy as np
import pytest
from rich.console import Console
from training.config import Experiment

from training import display
from training.display import Display
from training.record import Record

RECORD = Record(
    epoch=1,
    step=10,
    train_loss=2.5,
    test_loss=1.25,
    test_accuracy=0.5,
    learning_rate=0.1,
    global_std=3e-3,
    scale_factor=0.4567,
    exponent=2,
    layer_std={},
    update_norm_ratio=None,
    update_cosine=None,
    update_norm_ratio_by_step=None,
    images_per_second=123.4,
    seconds=10.0,
)


@pytest.fixture
def now(monkeypatch):
    """The time that the display reads, in a list of one."""
    time = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: time[0])
    return time


@pytest.mark.parametrize("done", [0, 25, 30])
@pytest.mark.parametrize("between", [1.0, 2.0, 6.0])
def test_the_time_left_comes_true(between, done, now, monkeypatch, capsys):
    """Steps of one second or so, in epochs of ten; of an evaluation, the first guess is two."""
    monkeypatch.setattr(display, "PLAIN_INTERVAL", 0.0)
    rng, epochs, of_epoch, at = np.random.default_rng(0), 6, 10, []
    shown = Display(Experiment(epochs=epochs), of_epoch, evaluation=2)
    shown.start(done, [Record(**RECORD | {"step": 10 * i + 10}) for i in range(done // of_epoch)])
    for step in range(done + 1, epochs * of_epoch + 1):
        now[0] += rng.uniform(0.8, 1.2)
        shown.step(step, 1.0, 1e-3, None)
        at.append((step, now[0]))
        if step % of_epoch == 0:
            shown.evaluating()
            now[0] += between * rng.uniform(0.9, 1.1)
            shown.epoch(Record(**RECORD | {"epoch": step // of_epoch, "step": step}))
            at.append((step, now[0]))
    _, *lines = capsys.readouterr().out.splitlines()
    assert ("?" in lines[0]) == (done == 0)  # no speed is known before the second step
    assert lines[-1].endswith(" 0:00:00")
    compared = 0
    for (step, time), line in zip(at, lines, strict=True):
        if step < done + 3 or (between > 4 and step < done + of_epoch):
            continue
        hours, minutes, seconds = map(int, re.findall(r"(\d+):(\d\d):(\d\d)", line)[0])
        left = datetime.timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds()
        assert left == pytest.approx(now[0] - time, rel=0.2 if between < 4 else 0.3, abs=4)
        compared += 1
    assert compared > 10


def run_for_a_while(shown: Display) -> None:
    with shown:
        with shown.compiling("[out]: cpu"):
            pass
        shown.start(10, [RECORD])
        for step in range(11, 21):
            shown.step(step, 1.5, 2e-3, 0.321)
        shown.epoch(Record(**RECORD | {"epoch": 2, "step": 20}))


def test_a_run_whose_effect_is_measured_shows_it_in_its_table(capsys, now):
    experiment = Experiment(epochs=2, effect=True)
    with Display(experiment, steps_per_epoch=10, evaluation=2) as shown:
        shown.start(0, [])
        shown.step(1, 1.5, 2e-3, 0.321, 0.875)
        shown.epoch(Record(**RECORD | {"update_norm_ratio": 0.75, "update_cosine": 0.875}))
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["ratio", "cosine", "left"]
    assert line.split()[-3:-1] == ["0.750", "0.875"]
    assert max(len(header), len(line)) <= 80


@pytest.fixture
def screen(monkeypatch):
    """What is written to a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    monkeypatch.setattr(
        display,
        "Console",
        partial(Console, file=screen, force_terminal=True, width=80, color_system=None),
    )
    return screen


def test_a_terminal_shows_a_table_and_curves(screen):
    run_for_a_while(Display(Experiment(epochs=4, batch_size=8), steps_per_epoch=10, evaluation=2))
    shown = screen.getvalue()
    table, _, last = shown.rpartition("epoch 2/4")
    assert "    2      2.5000     1.2500    50.00%  3.00e-03  0.4567       123" in table
    lines = ("epoch 2/4" + last).splitlines()
    assert "step 10/10" in lines[1]
    assert lines[2].split() == ["loss", "█" * 11 + "▁" * 11, "1.5"]
    assert lines[3].split() == ["gradient", "std", "█" * 11 + "▁" * 11, "0.002"]
    assert lines[4].split() == ["scale", "factor", "█" * 11 + "▁" * 11, "0.321"]
    assert max(map(len, lines)) <= 80


def test_a_terminal_shows_how_long_it_compiles(screen):
    with Display(Experiment(), steps_per_epoch=10, evaluation=2) as shown:
        with shown.compiling("[out]: cpu"):
            first = screen.getvalue()
        assert re.search(r"\[out\]: cpu, compiling \.\.\.\n.*compiling 0:00:00", first, re.DOTALL)
        assert screen.getvalue().endswith("\x1b[2K")  # the spinner is gone


def test_a_terminal_shows_an_evaluation(screen):
    with Display(Experiment(epochs=2), steps_per_epoch=10, evaluation=2) as shown:
        shown.start(9, [])
        shown.step(10, 1.5, 2e-3, 0.321)
        shown.evaluating()
    last = screen.getvalue().rpartition("epoch 1/2")[2]
    assert "evaluating" in last
    assert "step 10/10" not in last


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(screen, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    run_for_a_while(Display(Experiment(epochs=4, batch_size=8), steps_per_epoch=10, evaluation=2))
    assert "\x1b" not in screen.getvalue()
    assert len(screen.getvalue().splitlines()) == 3


def test_elsewhere_lines_are_plain_and_few(monkeypatch, capsys, now):
    def step(self: Display, *args: float) -> None:
        now[0] += 12
        real(self, *args)

    real = Display.step
    monkeypatch.setattr(Display, "step", step)
    run_for_a_while(Display(Experiment(epochs=4, batch_size=8), steps_per_epoch=10, evaluation=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[out]: cpu, compiling ..."
    assert lines[2] == (
        "epoch 2, step 13/40: loss 1.5  gradient std 0.002  scale factor 0.321  0:06:36 left"
    )
    assert len(lines) == 2 + 3 + 1
    assert "\x1b" not in "".join(lines)


def test_other_processes_show_nothing(capsys):
    run_for_a_while(Display(Experiment(epochs=4), steps_per_epoch=10, evaluation=2, quiet=True))
    assert capsys.readouterr().out == ""


def test_a_method_without_a_scale_factor(capsys):
    shown = Display(Experiment(epochs=2), steps_per_epoch=10, evaluation=2)
    with shown:
        shown.start(0, [])
        shown.step(1, 1.0, 1e-3, None)
        shown.epoch(Record(**RECORD | {"scale_factor": None}))
    assert "3.00e-03       -       123" in capsys.readouterr().out
