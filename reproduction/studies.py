"""The studies: which runs each of them is made of, and where their records are."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from models import MODELS
from training.config import Experiment, experiment_of, option, recipe
from training.data import DATASETS
from training.record import SCHEMA, Record, RecordError, parse_records, read_records

# The paper's Table 1: top-1 test accuracy on CIFAR-100 in percent, one run each.
PAPER_ACCURACY = {
    "resnet20": {
        "none": 59.32,
        "gradient_normalization": 59.58,
        "gradient_centralization": 60.72,
        "zscore": 59.53,
        "autoscale": 61.34,
    },
    "resnet56": {
        "none": 70.01,
        "gradient_normalization": 70.50,
        "gradient_centralization": 69.73,
        "zscore": 68.58,
        "autoscale": 71.29,
    },
    "vgg16_bn": {
        "none": 74.54,
        "gradient_normalization": 74.18,
        "gradient_centralization": 73.82,
        "zscore": 73.91,
        "autoscale": 74.54,
    },
}
PAPER_MODELS = tuple(PAPER_ACCURACY)
PAPER_METHODS = tuple(PAPER_ACCURACY["resnet20"])


class Grid(NamedTuple):
    """Runs of one recipe: every model with every method, `seeds` times."""

    recipe: Experiment
    models: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int

    def experiments(self, seeds: int | None) -> list[Experiment]:
        """Its runs, those of the first `seeds` seeds (default: as many as the grid has)."""
        return [
            dataclasses.replace(self.recipe, model=model, method=method, seed=seed)
            for model in self.models
            for method in self.methods
            for seed in range(self.seeds if seeds is None else seeds)
        ]


class Study(NamedTuple):
    """Grids that are reported together, and what a reader has to know about them."""

    title: str
    scale: str  # at which scale, for captions
    grids: tuple[Grid, ...]

    def experiments(self, seeds: int | None = None) -> list[Experiment]:
        """All runs: the cheapest first; of equal ones all methods of a seed before the next seed.

        So a study that was left unfinished compares methods on the same seeds.
        """
        runs = [experiment for grid in self.grids for experiment in grid.experiments(seeds)]
        methods = list(dict.fromkeys(run.method for run in runs))
        return sorted(runs, key=lambda run: (cost(run), run.seed, methods.index(run.method)))


def compressed(experiment: Experiment, epochs: int) -> Experiment:
    """The recipe in fewer epochs, in which the learning rate decays as far as in 200."""
    return dataclasses.replace(experiment, epochs=epochs, decay_epochs=30 * epochs / 200)


DIGITS, DIGITS_SGD = (
    dataclasses.replace(compressed(recipe("digits", optimizer), 10), train_size=640)
    for optimizer in ("adamw", "sgd")
)
DIGITS_SCALE = (
    "640 of scikit-learn's digits, enlarged to 16x16 pixels, for 10 epochs, in place of CIFAR-100 "
    "for 200"
)
PARTS = (
    *("none", "centering", "scaling", "constant"),
    *("autoscale", "autoscale_p1", "autoscale_p2", "autoscale_max1"),
)

STUDIES = {
    "digits": Study(
        "The paper's comparison, in minutes",
        DIGITS_SCALE,
        (Grid(DIGITS, PAPER_MODELS, PAPER_METHODS, 5),),
    ),
    "ablation": Study(
        "Which part of the method does the work?",
        DIGITS_SCALE,
        (
            Grid(DIGITS, ("resnet20",), PARTS, 5),
            Grid(DIGITS_SGD, ("resnet20",), PARTS, 5),
        ),
    ),
    "vit": Study(
        "A Vision Transformer",
        "scikit-learn's digits, enlarged to 16x16 pixels, for 40 epochs",
        (Grid(compressed(recipe("digits"), 40), ("vit",), ("none", "autoscale"), 3),),
    ),
    "cpu": Study(
        "The paper's comparison on CIFAR-100, as far as a CPU goes",
        "CIFAR-100, 5 epochs in place of 200",
        (Grid(compressed(recipe("cifar100"), 5), ("resnet20",), PAPER_METHODS, 1),),
    ),
    "paper": Study(
        "The paper's comparison",
        "the paper's own: CIFAR-100, 200 epochs; its figures: CIFAR-10, 300 epochs",
        (
            Grid(recipe("cifar100"), PAPER_MODELS, PAPER_METHODS, 5),
            Grid(recipe("cifar10"), PAPER_MODELS, ("autoscale",), 1),
        ),
    ),
}


def cost(experiment: Experiment) -> float:
    """How long a run takes, up to a factor: its multiply-adds."""
    data = DATASETS[experiment.dataset]
    images = experiment.train_size or data.num_train
    area = (data.image_size / 32) ** 2
    return experiment.epochs * images * area * MODELS[experiment.model].multiply_adds


class Run(NamedTuple):
    """A finished run."""

    experiment: Experiment
    description: dict[str, Any]  # command, versions, device, commit; what made it diverge, if so
    records: list[Record]


def publish(experiment: Experiment, folder: Path, path: Path, diverged: str | None) -> Run:
    """Writes a finished run's record file: a line that describes it, then its epochs.

    Args:
      experiment: what was run.
      folder: the run's.
      path: the file, `results/<study>/<name>.jsonl`.
      diverged: why it ended before its last epoch, if it did.

    Returns:
      The run, as `read_run` reads it from the file.

    Raises:
      RecordError: if the folder does not hold the records of all epochs.
    """
    default = dataclasses.asdict(recipe(experiment.dataset, experiment.optimizer))
    options = dataclasses.asdict(experiment)
    arguments = [
        f"{option(key)}={value}"
        for key, value in options.items()
        if key in ("dataset", "optimizer") or value != default[key]
    ]
    description = json.loads((folder / "config.json").read_text())
    del description["launch"]
    description |= {
        "command": shlex.join(["python", "train.py", *arguments]),
        "diverged": diverged,
    }
    # A run that diverged in its first epoch has no records.
    records = read_records(folder) if (folder / "metrics.jsonl").exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in (description, *records)))
    run = read_run(part)
    part.replace(path)
    return run


def read_run(path: Path) -> Run:
    """A finished run, from its record file.

    Raises:
      RecordError: if the file is not such a record.
    """
    try:
        first, *lines = path.read_text().splitlines()
        description = json.loads(first)
        if description["schema"] != SCHEMA:
            raise ValueError(f"its schema is {description['schema']}, not {SCHEMA}")
        experiment = experiment_of(description.pop("config"))
        records = parse_records(lines, path)
        if len(records) != experiment.epochs and not description["diverged"]:
            raise ValueError(f"it has {len(records)} of {experiment.epochs} epochs")
        return Run(experiment, description, records)
    except RecordError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{path} is not the record of a run: {error}; delete it to rerun"
        ) from error


def read(folder: Path) -> dict[str, Run]:
    """The finished runs of a study by name, in the order of their names."""
    return {path.stem: read_run(path) for path in sorted(folder.glob("*.jsonl"))}
