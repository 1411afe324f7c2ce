"""The measurements for a machine with an accelerator, tried on a CPU."""

import json
from functools import partial

import pytest

from benchmarks import accelerator
from models import MODELS, resnet8
from training.data import DATASETS

pytestmark = pytest.mark.slow


def test_all_parts_are_measured_and_written(tmp_path, monkeypatch, capsys):
    tiny = MODELS["resnet20"]._replace(make=partial(resnet8, widths=(4, 8)))
    monkeypatch.setitem(MODELS, "resnet20", tiny)
    monkeypatch.setitem(DATASETS, "cifar100", DATASETS["cifar100"]._replace(num_train=500))
    accelerator.main(tmp_path / "accelerator.json")
    results = json.loads((tmp_path / "accelerator.json").read_text())

    (speed,) = results["speed"]
    assert speed["images/s"] > 0
    assert speed["host ms"] > 0
    methods = {row["method"]: row for row in results["update"]}
    assert list(methods) == ["none", "autoscale", "clip", "zscore"]
    assert methods["none"]["ratio"].startswith("1.000 ")
    (epoch,) = results["epoch"]
    assert epoch["training s"] > 0
    assert epoch["evaluation s"] > 0
    assert results["resume"] == [{"model": "resnet20", "steps": 2, "equal to the bit": True}]
    assert results["compiled"] == [{"compiled": "no counts for cpu"}]
    output = capsys.readouterr().out
    assert "| model | precision | images/s | ms | host ms |\n| --- | --- |" in output


def test_a_state_that_was_not_restored_is_told(tmp_path, monkeypatch):
    """The comparison is of the steps after the checkpoint, not of two equal checksums."""
    tiny = MODELS["resnet20"]._replace(make=partial(resnet8, widths=(4, 8)))
    monkeypatch.setitem(MODELS, "resnet20", tiny)
    monkeypatch.setitem(DATASETS, "cifar100", DATASETS["cifar100"]._replace(num_train=500))
    monkeypatch.setattr(accelerator.Checkpoints, "restore", lambda self, like: like)
    (row,) = accelerator.resume("resnet20", 16, 2)
    assert not row["equal to the bit"]
