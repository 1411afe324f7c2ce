import dataclasses
import json
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from training.config import Experiment, Launch, recipe
from training.provenance import environment

from reproduction import studies
from reproduction.studies import STUDIES, compressed, cost, same_results
from training import config
from training.optimizers import learning_rate_schedule
from training.record import SCHEMA

ROOT = Path(__file__).parents[2]


def test_the_papers_study_is_section_5_of_the_paper():
    runs = STUDIES["paper"].experiments(seeds=1)
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


@pytest.mark.parametrize("study", STUDIES)
def test_runs_go_grid_by_grid_by_cost_and_then_by_seed_with_all_methods_of_each(study):
    runs = STUDIES[study].experiments()
    assert len({run.name for run in runs}) == len(runs)
    for grid in STUDIES[study].grids:
        part = runs[: len(grid.experiments(None))]
        del runs[: len(part)]
        assert [cost(run) for run in part] == sorted(map(cost, part))
        for _, equal in groupby(part, key=cost):
            seeds = [(seed, len(list(runs))) for seed, runs in groupby(equal, key=lambda c: c.seed)]
            assert [seed for seed, _ in seeds] == list(range(len(seeds)))
            assert len({count for _, count in seeds}) == 1
    assert not runs


@pytest.mark.parametrize("study", ["cifar100", "cifar100-gpu"])
def test_the_study_on_cifar100_is_what_its_plan_says(study):
    runs = STUDIES[study].experiments()
    assert [run.seed for run in runs[:12]] == [seed for seed in range(6) for _ in range(2)]
    arms = Counter((run.optimizer, run.method, run.weight_decay) for run in runs)
    assert arms == {
        ("adamw", "none", 5e-5): 6,
        ("adamw", "autoscale", 5e-5): 6,
        ("adam", "none", 5e-4): 4,
        ("adam", "autoscale", 5e-4): 4,
        ("adam", "none", 1.05e-3): 4,
        ("adam", "none", 2e-3): 4,
        ("adamw", "scaling", 5e-5): 3,
        ("adamw", "centering", 5e-5): 3,
        ("adamw", "gradient_normalization", 5e-5): 2,
        ("adamw", "gradient_centralization", 5e-5): 2,
        ("adamw", "zscore", 5e-5): 2,
    }
    for run in runs:
        assert (run.dataset, run.model, run.epochs) == ("cifar100", "resnet20", 20)
        assert (run.batch_size, run.cutmix_probability, run.effect) == (256, 1.0, True)
        assert run.decay_epochs == pytest.approx(3)


def test_only_the_timing_study_goes_without_the_effect():
    for name, study in STUDIES.items():
        assert {run.effect for run in study.experiments()} == {name != "cpu"}


def record(epoch: int, **changes) -> dict:
    """A line of `metrics.jsonl`."""
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train_loss": 2.5,
        "test_loss": 2.0,
        "test_accuracy": 0.125 * epoch,
        "learning_rate": 1e-3,
        "global_std": 0.01,
        "scale_factor": None,
        "exponent": None,
        "layer_std": {"stem": 0.1},
        "update_norm_ratio": None,
        "update_cosine": None,
        "update_norm_ratio_by_step": None,
        "images_per_second": 640.0,
        "seconds": 1.0,
    } | changes


def make_run(folder: Path, experiment: Experiment, records: list[dict]) -> None:
    """The output of a run."""
    folder.mkdir()
    launch = Launch(out=folder, data_dir=folder / "data")
    about = {
        "schema": SCHEMA,
        "command": f"python reproduce.py --data-dir {folder}",
        "num_classes": 100,
        "channels": 3,
        **environment(),
    }
    config.save(folder, experiment, launch, **about)
    lines = [json.dumps(line) + "\n" for line in records]
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_what_is_published_reads_back_and_names_no_folder(tmp_path):
    experiment = dataclasses.replace(STUDIES["cpu"].experiments()[0], epochs=2)
    records = [record(1), record(2)]
    make_run(tmp_path / "run", experiment, records)
    path = tmp_path / "results" / f"{experiment.name}.jsonl"
    run = studies.publish(experiment, tmp_path / "run", path, diverged=None)
    assert (run.experiment, run.records) == (experiment, records)
    assert studies.read(path.parent) == {experiment.name: run}
    assert str(tmp_path) not in path.read_text()


def test_the_published_command_makes_the_same_run(tmp_path):
    runs = [study.experiments()[-1] for study in STUDIES.values()]
    runs.append(compressed(recipe("cifar100"), 20))  # as many epochs as digits have by default
    runs.append(dataclasses.replace(recipe("cifar10", "sgd"), batch_size=64))
    for number, experiment in enumerate(runs):
        folder = tmp_path / str(number)
        make_run(folder, experiment, [])
        run = studies.publish(experiment, folder, tmp_path / "run.jsonl", diverged="step 3")
        python, script, *arguments = run.description["command"].split()
        assert (python, script) == ("python", "train.py")
        assert config.parse(arguments).experiment == experiment


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]\n", '{"schema": 1}\n', '{"schema": 2, "config": {"colour": "red"}}\n'],
)
def test_a_file_that_is_no_record_is_named(text, tmp_path):
    (tmp_path / "digits-resnet20-none-adamw-seed0.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"seed0\.jsonl is not the record of a run: .*delete it"):
        studies.read(tmp_path)


@pytest.mark.parametrize("study", [name for name in STUDIES if (ROOT / "results" / name).exists()])
def test_committed_records_are_of_their_study_and_say_what_was_migrated(study):
    planned = [same_results(experiment) for experiment in STUDIES[study].experiments()]
    for name, run in studies.read(ROOT / "results" / study).items():
        assert name == run.experiment.name
        assert same_results(run.experiment) in planned
        assert config.parse(run.description["command"].split()[2:]).experiment == run.experiment
        migrated = run.description.get("migrated", {})
        if "method" in migrated:
            assert (migrated["method"], run.experiment.method) == ("adamw", "none")
            command = migrated["command"].replace("--method=adamw", "--method=none")
            assert command == run.description["command"]


def test_every_experiment_of_a_study_is_valid():
    for study in STUDIES.values():
        for experiment in study.experiments():
            experiment.validate()
