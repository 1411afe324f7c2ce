"""Records of a study with chosen outcomes."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reproduction.studies import Axes, Study, of_grid
from training.options import Experiment
from training.record import SCHEMA

# Final accuracies by seed, of the arm (model, method, optimizer) or, of the one with this weight
# decay, (model, method, optimizer, weight decay); None for a run that diverged.
Outcomes = Mapping[tuple, Sequence[float | None]]

ABOUT = {
    "schema": SCHEMA,
    "command": "python train.py",
    "num_classes": 10,
    "channels": 1,
    "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"},
    "device": "cpu",
    "device_count": 2,
    "commit": "f2f4ca1a5ec737719d3260e2e7f02ed80c563a95",
}


def record(epoch: int, **changes: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl`; a change may be a function of the epoch."""
    line = {
        "epoch": epoch,
        "step": 10 * epoch,
        "train_loss": 2.0 / epoch,
        "test_loss": 1.0,
        "test_accuracy": 0.25 * epoch,
        "learning_rate": 1e-3,
        "global_std": 0.01,
        "scale_factor": None,
        "exponent": None,
        "layer_std": {"stem": 0.1 / epoch, "classifier": 0.2 * epoch},
        "images_per_second": 640.0,
        "seconds": 1.0,
    }
    return line | {
        key: value(epoch) if callable(value) else value for key, value in changes.items()
    }


def write_run(path: Path, experiment: Experiment, records: Sequence[Any], **about: Any) -> None:
    """Writes a record file."""
    first = ABOUT | {"config": dataclasses.asdict(experiment), "diverged": None} | about
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, *records)))


def short(study: Study, epochs: int = 3) -> Study:
    """The study with runs of a few epochs."""
    runs = (dataclasses.replace(run, epochs=epochs) for run in study.experiments)
    return study._replace(experiments=tuple(runs))


def write(study: Study, folder: Path, outcomes: Outcomes, **changes: Any) -> None:
    """Writes the records of a study's planned runs whose outcomes are given.

    Args:
      study: the study.
      folder: its folder.
      outcomes: final test accuracies, 0 to 1.
      changes: to the record of an epoch; a device is one of the description.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"device": changes.pop("device", "cpu")}
    for run in study.experiments:
        arm = (run.model, run.method, run.optimizer)
        values = outcomes.get((*arm, run.weight_decay), outcomes.get(arm, ()))
        if run.seed >= len(values):
            continue
        final, ours = values[run.seed], "autoscale" in run.method
        if final is None:
            about["diverged"] = "step 7: the training loss is nan; hint"
            write_run(folder / f"{run.name}.jsonl", run, [], **about)
            del about["diverged"]
            continue
        own = {
            "test_accuracy": lambda epoch, run=run, final=final: final * epoch / run.epochs,
            "global_std": lambda epoch, run=run: math.exp(-4 - epoch * (1 + run.seed / 10) / 10),
            "exponent": 2 - run.seed % 2 if ours else None,
            "scale_factor": 0.5 if ours else None,
            "validation_loss": 1 + run.learning_rate if run.validation_size else None,
        }
        lines = [record(epoch, **own | changes) for epoch in range(1, run.epochs + 1)]
        write_run(folder / f"{run.name}.jsonl", run, lines, **about)


def write_tuned(folder: Path) -> Study:
    """A study of two methods, whose best learning rates are 2e-3 and 4e-3, with all records."""
    axes = Axes(learning_rates=(1e-3, 2e-3, 4e-3), seeds=3)
    study = of_grid("mine", Experiment(epochs=3, validation_size=9), axes)
    for run in study.experiments:
        plain = run.method == "none"
        away, path = abs(run.learning_rate - (2e-3 if plain else 4e-3)), f"{run.name}.jsonl"
        # What is not to be looked at would be better.
        test = 0.1 if away else 1 + run.seed / 10 + (0 if plain else [-0.1, 0, 0.4][run.seed])
        validation = 0.5 + run.seed / 10 + 1e3 * away
        if plain and run.learning_rate == 1e-3:
            validation = 0.1
            if run.seed == 2:
                write_run(folder / path, run, [], diverged="step 7: the loss is nan; hint")
                continue
        losses = {"test_loss": test, "validation_loss": validation, "validation_accuracy": 0.5}
        write_run(folder / path, run, [record(epoch, **losses) for epoch in (1, 2, 3)])
    return study


def cifar100(ours: list[float]) -> dict:
    """Those of the study on CIFAR-100; `ours`: `autoscale` minus `none` before AdamW, in points."""
    plain = np.array([0.40, 0.42, 0.41, 0.43, 0.40, 0.42])
    rest = ("scaling", "centering", "gradient_normalization", "gradient_centralization", "zscore")
    noise = np.array([0.001, -0.001, 0.0005, 0, 0, 0])
    return {
        ("resnet20", "none", "adamw"): plain,
        ("resnet20", "autoscale", "adamw"): plain[: len(ours)] + np.array(ours) / 100,
        **{("resnet20", method, "adamw"): plain + noise for method in rest},
        ("resnet20", "none", "adam", 5e-4): plain[:4],
        ("resnet20", "autoscale", "adam", 5e-4): [0.4200, 0.4395, 0.4305, 0.4500],
        ("resnet20", "none", "adam", 1.05e-3): [0.4200, 0.4405, 0.4295, 0.4500],
        ("resnet20", "none", "adam", 2e-3): [0.4205, 0.4400, 0.4300, 0.4500],
    }
