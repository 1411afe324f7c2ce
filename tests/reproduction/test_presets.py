"""The presets: what their plans say, and the committed records and reports."""

import dataclasses
from collections import Counter
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import pytest

from reproduction import records
from reproduction.presets import PRESETS, compressed
from reproduction.report import write_report
from reproduction.studies import cost, same_results
from training.optimizers import learning_rate_schedule
from training.options import parse, recipe

ROOT = Path(__file__).parents[2]
PUBLISHED = [name for name in PRESETS if (ROOT / "results" / name).exists()]


def test_the_papers_study_is_section_5_of_the_paper():
    runs = [run for run in PRESETS["paper"].experiments if run.seed == 0]
    assert Counter((run.dataset, run.epochs) for run in runs) == {
        ("cifar100", 200): 3 * 5,
        ("cifar10", 300): 3,
    }
    for run in runs:
        changed = {"model": run.model, "method": run.method, "effect": True}
        assert run == dataclasses.replace(recipe(run.dataset), **changed)


def test_the_same_study_at_any_scale_ends_at_the_same_learning_rate():
    full = recipe("cifar100")
    ends = []
    for run in (full, compressed(full, 5), compressed(full, 20)):
        schedule = learning_rate_schedule(run.learning_rate, run.decay_epochs, 0, 195)
        ends.append(float(schedule(run.epochs * 195 - 1)))
    assert ends == pytest.approx([1e-3 * 0.75**6] * 3)


@pytest.mark.parametrize("name", ["digits", "vit", "digits-rates", "vit-rates"])
def test_runs_go_by_cost_and_then_by_seed_with_all_methods_of_each(name):
    runs = PRESETS[name].experiments
    assert len({run.name for run in runs}) == len(runs)
    assert [cost(run) for run in runs] == sorted(map(cost, runs))
    for _, equal in groupby(runs, key=cost):
        seeds = [(seed, len(list(each))) for seed, each in groupby(equal, key=lambda it: it.seed)]
        assert [seed for seed, _ in seeds] == list(range(len(seeds)))
        assert len({count for _, count in seeds}) == 1


def test_the_primary_arms_of_the_study_on_cifar100_come_first_seed_by_seed():
    runs = PRESETS["cifar100"].experiments
    assert len(runs) == 40
    assert [run.seed for run in runs[:12]] == [seed for seed in range(6) for _ in range(2)]
    assert {(run.optimizer, run.method) for run in runs[:12]} == {
        ("adamw", "none"),
        ("adamw", "autoscale"),
    }


def test_the_study_of_rates_on_cifar100_is_what_its_plan_says():
    study = PRESETS["cifar100-rates"]
    arms = Counter((run.optimizer, run.method, run.learning_rate) for run in study.experiments[:16])
    rates = (2e-3, 4e-3, 8e-3, 16e-3)
    assert arms == {
        ("adamw", method, rate): 2 for method in ("none", "autoscale") for rate in rates
    }
    penalties = Counter((run.method, run.weight_decay) for run in study.experiments[-6:])
    assert penalties == {("autoscale", 1.05e-3): 2, ("autoscale", 2e-3): 2, ("none", 4e-3): 2}
    fresh = study.experiments[16:-6]
    assert [run.seed for run in fresh] == [6, 6, 7, 7, 8, 8, 9, 9]
    assert study.group(fresh[0]) == "ResNet-20 on CIFAR-100, AdamW, fresh, learning rate 0.008"
    (family,) = study.families({study.arm(run): run for run in fresh[:2]})
    assert (family.kind, family.contrasts) == ("primary", [{"Autoscale": 1, "AdamW": -1}])


def test_the_fresh_pairs_have_the_best_learning_rate_of_the_records():
    planned = PRESETS["cifar100-rates"].experiments
    committed = records.read(ROOT / "results" / "cifar100-rates")
    accuracies: Counter[float] = Counter()
    for run in planned[:16]:
        accuracies[run.learning_rate] += committed[run.name].records[-1]["test_accuracy"]
    best = max(accuracies, key=accuracies.__getitem__)
    assert {run.learning_rate for run in planned[16:-6]} == {best}


@pytest.mark.parametrize("name", PUBLISHED)
def test_committed_records_are_of_their_study_and_say_what_was_migrated(name):
    planned = [same_results(experiment) for experiment in PRESETS[name].experiments]
    folders = [ROOT / "results" / name, *(ROOT / "results" / name).glob("*/")]
    for run in (run for folder in folders for run in records.read(folder).values()):
        assert same_results(run.experiment) in planned
        if run.experiment.seed == 0:  # the others' differ in that alone
            assert parse(run.description["command"].split()[2:])[0] == run.experiment
        migrated = run.description.get("migrated", {})
        if "method" in migrated:
            assert (migrated["method"], run.experiment.method) == ("adamw", "none")
            command = migrated["command"].replace("--method=adamw", "--method=none")
            assert command == run.description["command"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_committed_reports_are_those_of_the_committed_records(name, tmp_path):
    committed, copy = ROOT / "results" / name, tmp_path / "results" / name
    for study in filter(None, (name, PRESETS[name].beside)):
        for path in (ROOT / "results" / study).rglob("*.jsonl"):
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    write_report(PRESETS[name], copy)
    made, there = (
        {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if path.suffix in (".md", ".png")
        }
        for folder in (copy, committed)
    )
    if f"Matplotlib version{mpl.__version__}".encode() in b"".join(there.values()):
        assert made == there
    assert made.keys() == there.keys()
    assert made["REPORT.md"] == there["REPORT.md"]
