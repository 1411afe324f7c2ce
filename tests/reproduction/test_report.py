import dataclasses
import json
import math
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from scipy.stats import ttest_ind

from reproduction.report import write_report
from reproduction.studies import PAPER_METHODS, STUDIES
from training.record import SCHEMA

ROOT = Path(__file__).parents[2]


def write(folder: Path, study: str, accuracies: dict, epochs: int = 3, **description) -> None:
    """Records of a study whose final accuracies are as given, by (model, method), then by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in STUDIES[study].experiments():
        values = accuracies.get((run.model, run.method, run.optimizer), ())
        if run.seed >= len(values):
            continue
        about = {
            "schema": SCHEMA,
            "config": dataclasses.asdict(dataclasses.replace(run, epochs=epochs)),
            "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"},
            "device": "cpu",
            "device_count": 2,
            "commit": "abc",
            "diverged": None,
        } | description
        records = [
            {
                "epoch": epoch,
                "step": 10 * epoch,
                "train_loss": 2.0,
                "test_loss": 1.0,
                "learning_rate": 1e-3,
                "test_accuracy": values[run.seed] * epoch / epochs,
                "global_std": math.exp(-4 - epoch / 10),
                "scale_factor": 0.5,
                "exponent": 2 - run.seed % 2 if "autoscale" in run.method else None,
                "layer_std": {"stem": 0.1 / epoch, "classifier": 0.2 / epoch},
                "images_per_second": 640.0,
                "seconds": 1.0,
            }
            for epoch in range(1, epochs + 1)
        ]
        lines = [json.dumps(line) + "\n" for line in (about, *records)]
        (folder / f"{run.name}.jsonl").write_text("".join(lines))


def row(report: str, method: str) -> list[str]:
    accuracies, _, _ = report.partition("## What the records support")
    (line,) = (line for line in accuracies.splitlines() if line.startswith(f"| {method} | "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_statistics_are_those_worked_out_by_hand(tmp_path):
    # Means 50, 52 and 50.5; variances 2.5, 2.5 and 2.5; n = 5, so that the difference of two means
    # has a standard error of 1 and Welch's test has 8 degrees of freedom.
    base = np.array([0.48, 0.49, 0.50, 0.51, 0.52])
    write(
        tmp_path,
        "ablation",
        {
            ("resnet20", "none", "sgd"): base,
            ("resnet20", "autoscale", "sgd"): base + 0.02,
            ("resnet20", "scaling", "sgd"): base + 0.005,
        },
    )
    write_report("ablation", tmp_path)
    report = (tmp_path / "REPORT.md").read_text()
    # t(0.975, 4) = 2.776 times sqrt(2.5 / 5) = 1.96; t(0.975, 8) = 2.306;
    # P(|t_8| > 2) = 0.0805, and P(|t_8| > 0.5) = 0.6305, from tables.
    assert row(report, "SGD") == [*("SGD", "50.00", "1.58", "5", "48.04 to 51.96", "-", "-", "-")]
    assert row(report, "Autoscale") == [
        *("Autoscale", "52.00", "1.58", "5", "50.04 to 53.96"),
        *("+2.00 (-0.31 to +4.31)", "0.081", "0.161"),  # Holm: 2 x 0.0805
    ]
    assert row(report, "scaling only")[5:] == [*("+0.50 (-1.81 to +2.81)", "0.631", "0.631")]
    assert "no difference to SGD is supported" in report
    assert "| ResNet-20 on digits, SGD | Autoscale | 2 1 2 1 2 |" in report
    assert "100 ms (x1.00)" in report  # batches of 64 at 640 images per second


def test_a_clear_difference_is_claimed_and_an_unclear_one_beside_it_is_not(tmp_path):
    base = np.array([0.48, 0.49, 0.50, 0.51, 0.52])
    write(
        tmp_path,
        "digits",
        {
            ("resnet20", "none", "adamw"): base,
            ("resnet20", "autoscale", "adamw"): base + 0.2,
            ("resnet20", "zscore", "adamw"): base - 0.01,
        },
    )
    write_report("digits", tmp_path)
    report = (tmp_path / "REPORT.md").read_text()
    assert "supported: Autoscale is above AdamW by 20.00 points; the other diff" in report
    assert row(report, "Autoscale")[:2] == ["Autoscale", "61.34"]  # the paper's beside it


def test_the_detectable_difference_is_the_one_that_simulations_find(tmp_path):
    """With it, 80 % of simulated studies reject the null hypothesis at the corrected level."""
    base = np.array([0.48, 0.49, 0.50, 0.51, 0.52])  # standard deviation 1.58 points
    methods = ("none", "autoscale", "scaling", "centering")
    write(tmp_path, "ablation", {("resnet20", method, "sgd"): base for method in methods})
    write_report("ablation", tmp_path)
    told = re.search(r"a true difference of ([\d.]+) points", (tmp_path / "REPORT.md").read_text())
    assert told
    rng = np.random.default_rng(0)
    ours, plain = rng.normal(float(told[1]), 1.58, (5, 4000)), rng.normal(0, 1.58, (5, 4000))
    found = ttest_ind(ours, plain).pvalue < 0.05 / 3
    assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_one_seed_supports_nothing(tmp_path):
    accuracies = {("resnet20", method, "adamw"): [0.1] for method in PAPER_METHODS}
    write(tmp_path, "cpu", accuracies)
    write_report("cpu", tmp_path)
    report = (tmp_path / "REPORT.md").read_text()
    assert "nothing can be tested, and no difference is claimed" in report
    assert row(report, "Autoscale")[2:] == ["10.00", "-", "1", "-", "-", "-", "-"]


def test_a_run_that_diverged_is_told_and_not_averaged(tmp_path):
    write(tmp_path, "ablation", {("resnet20", "none", "sgd"): [0.5, 0.6]})
    seeds = {("resnet20", "scaling", "sgd"): [0.1]}
    write(tmp_path, "ablation", seeds, diverged="step 7: the training loss is nan; hint")
    write_report("ablation", tmp_path)
    report = (tmp_path / "REPORT.md").read_text()
    assert "Diverged, and not in the table: scaling only, seed 0: step 7: the training" in report
    assert row(report, "SGD")[1:4] == ["55.00", "7.07", "2"]
    assert row(report, "scaling only")[1:4] == ["-", "-", "0"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".jsonl"}


def test_a_report_comes_out_the_same_to_the_byte(tmp_path):
    accuracies = {("vit", method, "adamw"): [0.5, 0.6] for method in ("none", "autoscale")}
    for copy in ("one", "two"):
        write(tmp_path / copy, "vit", accuracies)
        write_report("vit", tmp_path / copy)
    first, second = contents(tmp_path / "one"), contents(tmp_path / "two")
    pictures = [f"figure{n}.{kind}" for n in (1, 2, 3, 4) for kind in ("png", "svg")]
    assert set(first) == {"REPORT.md", *pictures}
    assert first == second


@pytest.mark.parametrize("study", [name for name in STUDIES if (ROOT / "results" / name).exists()])
def test_the_committed_reports_are_those_of_the_committed_records(study, tmp_path):
    committed = ROOT / "results" / study
    for path in committed.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_report(study, tmp_path)
    pictures = "".join(path.read_text() for path in committed.glob("*.svg"))
    same_matplotlib = f"Matplotlib v{mpl.__version__}" in pictures
    for file, content in contents(tmp_path).items():
        if file == "REPORT.md" or same_matplotlib:
            assert content == (committed / file).read_bytes(), file


def test_a_folder_without_records_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no records; make them with"):
        write_report("digits", tmp_path)
