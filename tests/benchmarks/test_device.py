import random

import pytest

from benchmarks import device
from models import MODELS
from tests.programs import TINY


def test_kernels_are_added_up_by_name_and_gaps_are_found():
    kernels = [("a", 8.0, 10.0), ("b", 2.0, 5.0), ("c", 3.0, 4.0), ("a", 0.0, 4.0)]  # not in 5..8
    assert device.idle(kernels) == pytest.approx(3 / 10)
    a, b = (
        {"kernel": "a", "share": "60.0%", "runs": 2},
        {"kernel": "b", "share": "30.0%", "runs": 1},
    )
    assert device.largest(kernels, 2) == [a, b]


@pytest.mark.parametrize("deterministic", [True, False])
def test_steps_that_differ_are_told(deterministic):
    training, rng = device.Training.__new__(device.Training), random.Random(0)
    training.state = 0.0
    training.step = lambda: vars(training).update(state=1.0 if deterministic else rng.random())
    assert training.is_deterministic(2) == deterministic


@pytest.mark.slow
def test_all_parts_are_measured(compile_faster, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "resnet20", TINY)
    monkeypatch.setattr(device.devices, "prepare", lambda batch_size: None)
    device.main(("resnet20",), ("float32",), batch_size=16, steps=2, repeats=2)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | " in line]
    speed = dict(zip(rows[0], rows[2], strict=True))
    assert float(speed["images/s"]) > 0
    assert 0 <= float(speed["idle"].rstrip("%")) < 100
    assert len(rows) == 3 + 2 + 5 + 2 + 2  # with five kernels and two methods
