"""A small run, resumed, and the report from records that are worked out by hand."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from reproduction import transformer as study
from training.record import environment

# The losses of seeds 0, 1 and 2 after the last step. Validation and test disagree on the best rate.
VALIDATION = {("none", 1e-3): (1.9, 2.0, 2.1), ("none", 2e-3): (1.7, 1.8, 1.9)}
VALIDATION |= {("autoscale", 1e-3): (1.8, 1.9, 2.0), ("autoscale", 2e-3): (1.0, None, 1.0)}
TEST = {("none", 1e-3): (1.50, 1.51, 1.52), ("none", 2e-3): (1.60, 1.61, 1.62)}
TEST |= {("autoscale", 1e-3): (1.61, 1.63, 1.65), ("autoscale", 2e-3): (1.0, None, 1.0)}


@pytest.fixture
def folder(tmp_path):
    for (method, rate), seed in itertools.product(VALIDATION, range(3)):
        config = {"method": method, "learning_rate": rate, "seed": seed, "steps": 100}
        last = {"step": 100, "validation_loss": VALIDATION[method, rate][seed]}
        last |= {"test_loss": TEST[method, rate][seed], "norm_ratio": 0.9, "cosine": 0.99}
        first = {"step": 50, "norm_ratio": 0.7, "cosine": 0.97}
        lines = ({"config": config, **environment()}, first, last)
        name = f"{method}-{rate:g}-{seed}.jsonl"
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_the_report_of_hand_worked_runs(folder):
    study.write_report(folder)
    page = (folder / "REPORT.md").read_text()
    assert study.PLAN in page
    # Differences at the best rates: 0.01, 0.02, 0.03; at 1e-3: 0.11, 0.12, 0.13. The standard
    # deviation is 0.01 in both, and half the interval 4.30265 * 0.01 / sqrt(3) = 0.0248.
    best, default = "+0.020 (-0.005 to +0.045)", "+0.120 (+0.095 to +0.145)"
    for line in (
        "| AdamW | 2.000 ± 0.100 | **1.800 ± 0.100** |",
        "| Autoscale | **1.900 ± 0.100** | 1.000 ± 0.000 |",
        "Runs that diverged, and are left out: 1.",
        "| AdamW | 0.002, an end of the grid | 1.610 ± 0.010 | 0.800 [0.800, 0.800] |",
        "| Autoscale | 0.001, an end of the grid | 1.630 ± 0.020 | 0.800 [0.800, 0.800] |",
        "| AdamW | 0.001 | 1.510 ± 0.010 |",
        f"| Autoscale minus AdamW | {best} | 3 | 0.074 | 0.500 |",
        f"| Autoscale minus AdamW | {default} | 3 |",
    ):
        assert line in page
    assert (folder / "transformer.png").exists()


@pytest.mark.parametrize(("records", "missing"), [("none-0.001-2", 1), ("*-2", 4)])
def test_nothing_is_compared_before_all_runs_are_in(folder, records, missing):
    for path in folder.glob(f"{records}.jsonl"):
        path.unlink()
    page = study.report(study.read(folder))
    assert f"planned runs that are missing: {missing}." in page
    assert "Autoscale minus AdamW" not in page
    assert "**" not in page.partition("## Validation loss")[2].partition("In nats")[0]


def test_no_records_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no records"):
        study.write_report(tmp_path)


@pytest.mark.slow
def test_records_are_the_same_after_an_interruption(compile_faster, monkeypatch, tmp_path):
    for name, size in {"WIDTH": 16, "DEPTH": 2, "CONTEXT": 16}.items():
        monkeypatch.setattr(study.transformer, name, size)
    monkeypatch.setattr(study, "EVERY", 2)
    runs = [study.Run(method, 1e-2, 0, steps=5) for method in ("none", "autoscale_norm")]
    study.record(runs, tmp_path / "whole")
    measure, begun = study.measure, []

    def interrupted_once(run):
        begun.append(run.method)
        for line in measure(run):
            if len(begun) == 2 and line["step"] == 4:
                raise KeyboardInterrupt
            yield line

    monkeypatch.setattr(study, "measure", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        study.record(runs, tmp_path / "parts")
    study.record(runs, tmp_path / "parts")
    assert begun == ["none", "autoscale_norm", "autoscale_norm"]
    files = [sorted((tmp_path / name).iterdir()) for name in ("whole", "parts")]
    whole, parts = ({path.name: path.read_text() for path in paths} for paths in files)
    assert whole == parts

    norm, plain = ([json.loads(line) for line in text.splitlines()] for text in whole.values())
    assert norm[0]["config"] == dataclasses.asdict(runs[1])
    for lines in (norm[1:], plain[1:]):
        assert [line["step"] for line in lines] == [2, 4, 5]
        assert np.isfinite([line["test_loss"] for line in lines]).all()
        assert [line["cosine"] for line in lines] == pytest.approx([1, 1, 1], abs=1e-5)
    assert [line["norm_ratio"] for line in plain[1:]] == [1, 1, 1]
    assert [line["scale_factor"] for line in plain[1:]] == [None] * 3
    assert norm[-1]["norm_ratio"] != pytest.approx(1, abs=1e-3)
