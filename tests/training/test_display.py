"""What is shown during a run, and whether the time left comes true."""

import datetime
import io
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.training.test_record import GOOD
from training import display
from training.display import Display
from training.options import Experiment


@pytest.fixture
def now(monkeypatch):
    """The time that the display reads, in a list of one."""
    time = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: time[0])
    return time


@pytest.fixture
def screen(monkeypatch):
    """What is written to a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    terminal = partial(Console, file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(display, "Console", terminal)
    return screen


def make(epochs: int = 4, evaluation: float = 2, **options) -> Display:
    quiet = options.pop("quiet", False)
    return Display(Experiment(epochs=epochs, batch_size=8, **options), 10, evaluation, quiet)


@pytest.mark.parametrize(("done", "between"), [(0, 1.0), (25, 2.0), (30, 6.0), (0, 6.0)])
def test_the_time_left_comes_true(between, done, now, monkeypatch, capsys):
    """Steps of one second or so, in epochs of ten; of an evaluation, the first guess is two."""
    monkeypatch.setattr(display, "PLAIN_INTERVAL", 0.0)
    rng, shown, at = np.random.default_rng(0), make(epochs=6), []
    shown.start(done, [GOOD | {"step": 10 * i + 10} for i in range(done // 10)])
    for step in range(done + 1, 61):
        now[0] += rng.uniform(0.8, 1.2)
        shown.step(step, 1.0, 1e-3, None)
        at.append((step, now[0]))
        if step % 10 == 0:
            shown.evaluating(1024)
            for images in 512, 512:
                now[0] += between / 2 * rng.uniform(0.9, 1.1)
                shown.evaluated(images)
                at.append((step, now[0]))
            shown.epoch(GOOD | {"epoch": step // 10, "step": step})
            at.append((step, now[0]))
    _, *lines = capsys.readouterr().out.splitlines()
    assert ("?" in lines[0]) == (done == 0)  # no speed is known before the second step
    assert lines[-1].endswith(" 0:00:00")
    compared = 0
    for (step, time), line in zip(at, lines, strict=True):
        if step >= done + (10 if between > 4 else 3):
            hours, minutes, seconds = map(int, re.findall(r"(\d+):(\d\d):(\d\d)", line)[0])
            left = datetime.timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds()
            expected = pytest.approx(now[0] - time, rel=0.2 if between < 4 else 0.3, abs=4)
            assert left == expected
            compared += 1
    assert compared > 10


def run_for_a_while(shown: Display) -> None:
    with shown:
        with shown.compiling("[out]: cpu"):
            pass
        shown.start(10, [GOOD | {"update_norm_ratio": None}])
        for step in range(11, 21):
            shown.step(step, 1.5, 2e-3, 0.321)
        shown.evaluating(1024)
        for images in 256, 256:
            shown.evaluated(images)
        shown.epoch(GOOD | {"epoch": 2, "step": 20})


def test_a_terminal_shows_a_table_and_curves(screen):
    run_for_a_while(make())
    table, _, last = screen.getvalue().rpartition("epoch 2/4")
    assert "    2      2.5000     2.0000    50.00%  1.00e-02  0.7500       640" in table
    lines, curve = ("epoch 2/4" + last).splitlines(), "█" * 11 + "▁" * 11
    assert "step 10/10" in lines[1]
    assert [line.split() for line in lines[2:5]] == [
        ["loss", curve, "1.5"],
        ["gradient", "std", curve, "0.002"],
        ["scale", "factor", curve, "0.321"],
    ]
    assert max(map(len, lines)) <= 80


def test_a_terminal_shows_how_long_it_compiles_and_an_evaluation(screen):
    with make(epochs=2) as shown:
        with shown.compiling("[out]: cpu"):
            first = screen.getvalue()
        assert re.search(r"\[out\]: cpu, compiling \.\.\.\n.*compiling 0:00:00", first, re.DOTALL)
        assert screen.getvalue().endswith("\x1b[2K")  # the spinner is gone
        shown.start(9, [])
        shown.step(10, 1.5, 2e-3, 0.321)
        shown.evaluating(10_000)
        shown.evaluated(2560)
    last = screen.getvalue().rpartition("epoch 1/2")[2]
    assert re.search(r"evaluating +━{11}[╸╺ ].* 2560/10000 images", last)
    assert "step 10/10" not in last


@pytest.mark.parametrize("dumb", [False, True])
def test_elsewhere_lines_are_plain_and_few_and_other_processes_show_nothing(
    dumb, monkeypatch, capsys, now
):
    if dumb:  # a terminal that cannot move its cursor
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr(display, "Console", partial(Console, force_terminal=True))

    def slow(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            now[0] += 12
            real(*args)

        return call

    for name in "step", "evaluated":
        monkeypatch.setattr(Display, name, slow(getattr(Display, name)))
    run_for_a_while(make())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[out]: cpu, compiling ..."
    measured = "loss 1.5  gradient std 0.002  scale factor 0.321"
    assert lines[2] == f"epoch 2, step 13/40: {measured}  0:06:36 left"
    assert lines[5] == "epoch 2, evaluating: 512/1024 images  0:05:28 left"
    assert len(lines) == 2 + 3 + 1 + 1
    assert "\x1b" not in "".join(lines)
    run_for_a_while(make(quiet=True))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("effect", [False, True])
def test_the_table_of_a_method_without_a_scale_factor_and_of_a_measured_effect(effect, capsys):
    with make(epochs=2, effect=effect) as shown:
        shown.start(0, [])
        shown.step(1, 1.5, 2e-3, None, 0.875 if effect else None)
        shown.epoch(GOOD | {"scale_factor": None, "update_norm_ratio": 0.75})
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[-3:-1] == (["ratio", "cosine"] if effect else ["scale", "images/s"])
    assert line.split()[4:-1] == ["1.00e-02", "-", *(["0.750", "0.990"] if effect else ["640"])]
    assert max(len(header), len(line)) <= 80
