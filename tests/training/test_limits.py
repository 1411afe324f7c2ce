"""Invalid values, and the largest and smallest valid ones."""

import dataclasses
import re
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from training.config import MAX_STEPS, Experiment, Launch, parse
from training.program import Program

import reproduce
from training.data import Dataset

HUGE = 10**400  # no float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("epochs", value) for value in (MAX_STEPS + 1, HUGE)],
        *[("batch_size", value) for value in (-HUGE, 0)],
        *[("learning_rate", value) for value in (1e300, 1e-300, float("inf"), float("nan"))],
        *[("weight_decay", value) for value in (1e300, float("nan"))],
        *[("decay_epochs", value) for value in (float("inf"), float("nan"))],
        *[("seed", value) for value in (2**32, HUGE, -HUGE)],
    ],
)
def test_values_beyond_the_limits(name, value):
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(
        ValueError, match=rf"^{option} is {re.escape(str(value))}; it must be finite"
    ):
        dataclasses.replace(Experiment(), **{name: value}).validate()


def test_values_at_the_limits():
    largest, smallest = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
    Experiment(epochs=MAX_STEPS, learning_rate=largest, seed=2**32 - 1).validate()
    Experiment(learning_rate=smallest, weight_decay=largest, decay_epochs=1e300).validate()
    Experiment(batch_size=HUGE).validate()  # the data set has a word about it
    Launch(checkpoint_minutes=1e300).validate()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--checkpoint-minutes", "inf"], "--checkpoint-minutes is inf"),
        (["--coordinator", "here", "--num-processes", "1", "--process-id", "0"], "--coordinator"),
        (["--coordinator", "a:b", "--num-processes", "1", "--process-id", "0"], "--coordinator"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], "--process-id is"),
        (
            ["--coordinator", "a:1", "--num-processes", str(2**31), "--process-id", "0"],
            "--num-processes is",
        ),
        (["--out", "caf\udce9"], "--out is '.*caf.udce9', which is not UTF-8"),
        (["--data-dir", "caf\udce9"], "--data-dir is '.*caf.udce9', which is not UTF-8"),
    ],
)
def test_launches_that_cannot_be(args, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse(args)


def test_paths_of_any_letters():
    assert parse(["--out", "café/本"]).launch.out == Path("café/本")


def test_a_working_directory_that_is_not_utf_8(tmp_path, monkeypatch):
    (tmp_path / "caf\udce9").mkdir()
    monkeypatch.chdir(tmp_path / "caf\udce9")
    with pytest.raises(ValueError, match=r"^--out is .* not UTF-8"):
        parse([])
    parse(["--out", str(tmp_path), "--data-dir", str(tmp_path)])


def data(size: int) -> Dataset:
    images, labels = np.zeros((size, 16, 16, 1), np.uint8), np.zeros(size, np.int32)
    return Dataset(images, labels, images, labels, num_classes=3, mean=(0.5,), std=(0.25,))


@pytest.mark.parametrize("name", ["epochs", "decay_epochs"])
def test_steps_that_cannot_be_counted(name):
    """Six steps an epoch: 357,913,941 epochs are 2,147,483,646 steps, and one more is too many."""
    mesh = jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )
    experiment = Experiment(batch_size=2)

    def make(value: float) -> Program:
        changed = dataclasses.replace(experiment, **{name: value})
        return Program(changed, data(13), mesh)

    assert make(357_913_941).learning_rate(1) == pytest.approx(1e-3)
    option = f"--{name.replace('_', '-')}"
    for value in (357_913_942, 1e300 if name == "decay_epochs" else MAX_STEPS):
        with pytest.raises(
            ValueError, match=f"^{option} is {re.escape(str(value))}; .*at most 357"
        ):
            make(value)


@pytest.mark.parametrize("hours", ["inf", "nan", "1e300", "-1"])
def test_hours_that_no_clock_counts(hours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", f"--hours={hours}"])
    with pytest.raises(SystemExit, match=r"^reproduce.py: --hours is .*; it must be positive, and"):
        reproduce.main()
    assert not list(tmp_path.iterdir())


def test_the_most_hours():
    with reproduce.time_limit(reproduce.MAX_HOURS):
        assert any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seeds", str(HUGE)], "--seeds is 1000"),
        (["--results", "caf\udce9"], "--results is '.*', which is not UTF-8"),
        (["--data-dir", "caf\udce9"], "--data-dir is '.*', which is not UTF-8"),
    ],
)
def test_other_options_of_a_study(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *args])
    with pytest.raises(SystemExit, match=f"^reproduce.py: {message}"):
        reproduce.main()
    assert not list(tmp_path.iterdir())
