"""What is shown while a run goes on, and whether the time left comes true."""

import io
from functools import partial

import numpy as np
import pytest
from rich.console import Console

from training import display
from training.config import Experiment
from training.display import Clock, Display
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
@pytest.mark.parametrize("between", [1.0, 2.0, 20.0])
def test_the_time_left_comes_true(between, done, now):
    """Steps of one second or so, in epochs of ten; of what is between, the first guess is two."""
    rng, epochs, of_epoch, guesses = np.random.default_rng(0), 6, 10, []
    clock = Clock(epochs, of_epoch, gap=2)
    clock.start(done)
    for step in range(done + 1, epochs * of_epoch + 1):
        now[0] += rng.uniform(0.8, 1.2)
        clock.step(step)
        guesses.append((step, now[0], clock.seconds_left()))
        if step % of_epoch == 0:
            now[0] += between * rng.uniform(0.9, 1.1)
            if len(guesses) > of_epoch:
                guesses.append((step, now[0], clock.seconds_left()))
    seen_between = (done // of_epoch + 1) * of_epoch
    for step, time, left in guesses:
        if between < 4 or step > seen_between:
            assert left == pytest.approx(now[0] - time, rel=0.2, abs=2.5)


def test_no_time_is_told_before_the_first_step(now):
    clock = Clock(2, 10, gap=1)
    clock.start(0)
    assert clock.left() == "?"


def run_for_a_while(shown: Display) -> None:
    with shown:
        shown.say("[out]: compiling")
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


def test_a_terminal_shows_a_table_and_curves(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        display,
        "Console",
        partial(Console, file=screen, force_terminal=True, width=80, color_system=None),
    )
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


def test_elsewhere_lines_are_plain_and_few(monkeypatch, capsys, now):
    def step(self: Display, *args: float) -> None:
        now[0] += 12
        real(self, *args)

    real = Display.step
    monkeypatch.setattr(Display, "step", step)
    run_for_a_while(Display(Experiment(epochs=4, batch_size=8), steps_per_epoch=10, evaluation=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[out]: compiling"
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
