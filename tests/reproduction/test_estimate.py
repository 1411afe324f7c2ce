"""The time that a study will take, from rates worked out by hand."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import pytest

from models import MODELS
from reproduction import estimate, studies
from reproduction.records import Run
from tests.programs import TINY
from training.options import Experiment

HERE = {"device": "cpu", "device_count": jax.device_count()}
# 10 epochs of 1,437 images of 16x16 pixels, of 40.6 million multiply-adds at 32x32 pixels.
EXPERIMENT = Experiment(dataset="digits", model="resnet20", epochs=10)


def run_of(seconds: float, experiment: Experiment = EXPERIMENT, **changes) -> Run:
    records = [{"seconds": seconds} for _ in range(experiment.epochs)]
    return Run(experiment, HERE | changes, records)


def test_the_rate_is_the_median_of_finished_runs_on_such_devices():
    slow = dataclasses.replace(EXPERIMENT, model="vit")
    runs = [
        *(run_of(6.0), run_of(7.0), run_of(99.0), run_of(30.0, slow)),
        *(run_of(0.1, device="NVIDIA H100"), run_of(0.1, device_count=2)),
        Run(EXPERIMENT, HERE, []),
    ]
    rates = estimate.rates_of(runs)
    rate = 7.0 * 10 / (10 * 1437 * 0.25 * 40.6)
    assert rates.keys() == {("digits", "resnet20"), ("digits", "vit")}
    assert rates["digits", "resnet20"] == pytest.approx(rate)
    left = [EXPERIMENT, dataclasses.replace(EXPERIMENT, epochs=30), slow]
    assert estimate.time_left(left, rates) == "about 0:09:40 left"
    assert estimate.time_left([], rates) == "nothing left"


def test_an_unknown_model_is_measured_once(monkeypatch):
    deep = dataclasses.replace(EXPERIMENT, model="resnet56")
    rates, measured = estimate.rates_of([run_of(6.0)]), []

    def measured_rate(experiment: Experiment) -> float:
        measured.append(experiment.model)
        return 100 / studies.cost(experiment)

    monkeypatch.setattr(estimate, "measured_rate", measured_rate)
    for _ in range(2):
        assert estimate.time_left([EXPERIMENT, deep, deep], rates) == "about 0:04:20 left"
    assert measured == ["resnet56"]


def test_a_measured_step_stands_for_all_steps_of_the_runs(monkeypatch, capsys):
    """A clock by which each step takes a second: 22 steps and 287 / 64 / 3 evaluate an epoch."""
    monkeypatch.setitem(MODELS, "resnet20", TINY)
    clock = itertools.count()
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    rate = estimate.measured_rate(EXPERIMENT)
    for epochs in (1, 10):
        it = dataclasses.replace(EXPERIMENT, epochs=epochs)
        assert rate * studies.cost(it) == pytest.approx(epochs * (1437 // 64 + 287 / 64 / 3))
    assert "measuring 3 steps of resnet20 ..." in capsys.readouterr().out
