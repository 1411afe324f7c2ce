"""The studies: which runs each of them is made of, and where their records are."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from training.config import FREE, Config, recipe
from training.record import Record
from training.run_folder import read_records

TABLE_1 = ("adamw", "gradient_normalization", "gradient_centralization", "zscore", "autoscale")
PAPERS_MODELS = ("resnet20", "resnet56", "vgg16_bn")
# Multiply-adds of a 32x32 image, in millions: how the cost of one model is guessed from another's.
MULTIPLY_ADDS = {"resnet20": 41, "resnet56": 125, "vit": 178, "vgg16_bn": 313}


class Grid(NamedTuple):
    """Runs of one recipe: every model with every method, `seeds` times."""

    recipe: Config
    models: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int

    def cells(self, seeds: int | None) -> list[Config]:
        """Its runs, those of the first `seeds` seeds (default: as many as the grid has)."""
        return [
            dataclasses.replace(self.recipe, **{"model": model, "method": method, "seed": seed})
            for model in self.models
            for method in self.methods
            for seed in range(self.seeds if seeds is None else seeds)
        ]


class Study(NamedTuple):
    """Grids that are reported together, and what a reader has to know about them."""

    title: str
    scale: str  # at which scale, for captions
    grids: tuple[Grid, ...]

    def cells(self, seeds: int | None = None) -> list[Config]:
        """All runs: the cheapest first; of equal ones all methods of a seed before the next seed.

        So a study that was left unfinished compares methods on the same seeds.
        """
        cells = [cell for grid in self.grids for cell in grid.cells(seeds)]
        methods = list(dict.fromkeys(cell.method for cell in cells))
        return sorted(cells, key=lambda cell: (cost(cell), cell.seed, methods.index(cell.method)))


def compressed(config: Config, epochs: int) -> Config:
    """The recipe in fewer epochs, in which the learning rate decays as far as in 200."""
    return dataclasses.replace(config, epochs=epochs, decay_epochs=30 * epochs / 200)


DIGITS, DIGITS_SGD = (
    dataclasses.replace(compressed(recipe("digits", optimizer), 10), train_size=640)
    for optimizer in ("adamw", "sgd")
)
DIGITS_SCALE = (
    "640 of scikit-learn's digits, enlarged to 16x16 pixels, for 10 epochs, in place of CIFAR-100 "
    "for 200"
)
PARTS = (
    *("adamw", "centering", "scaling", "constant"),
    *("autoscale", "autoscale_p1", "autoscale_p2", "autoscale_max1"),
)

STUDIES = {
    "digits": Study(
        "The paper's comparison, in minutes",
        DIGITS_SCALE,
        (Grid(DIGITS, PAPERS_MODELS, TABLE_1, 5),),
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
        (Grid(compressed(recipe("digits"), 40), ("vit",), ("adamw", "autoscale"), 3),),
    ),
    "cpu": Study(
        "The paper's comparison on CIFAR-100, as far as a CPU goes",
        "CIFAR-100, 5 epochs in place of 200",
        (Grid(compressed(recipe("cifar100"), 5), ("resnet20",), TABLE_1, 1),),
    ),
    "paper": Study(
        "The paper's comparison",
        "the paper's own: CIFAR-100, 200 epochs; its figures: CIFAR-10, 300 epochs",
        (
            Grid(recipe("cifar100"), PAPERS_MODELS, TABLE_1, 5),
            Grid(recipe("cifar10"), PAPERS_MODELS, ("autoscale",), 1),
        ),
    ),
}


def name(cell: Config) -> str:
    """What a run's files are called."""
    optimizer = "" if cell.optimizer == "adamw" else f"-{cell.optimizer}"
    return f"{cell.dataset}-{cell.model}-{cell.method}{optimizer}-seed{cell.seed}"


def cost(cell: Config) -> float:
    """How long a run takes, up to a factor: its multiply-adds."""
    images = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000}[cell.dataset]
    area = {"digits": 1 / 4}.get(cell.dataset, 1)  # digits are 16x16
    return cell.epochs * (cell.train_size or images) * area * MULTIPLY_ADDS[cell.model]


class Run(NamedTuple):
    """A finished run."""

    cell: Config
    description: dict[str, Any]  # command, versions, device, commit; what made it diverge, if so
    records: list[Record]


def publish(config: Config, path: Path, diverged: str | None) -> Run:
    """Writes a finished run's record file: a line that describes it, then its epochs.

    Args:
      config: the run, whose folder is `config.folder`.
      path: the file, `results/<study>/<name>.jsonl`.
      diverged: why it ended before its last epoch, if it did.
    """
    description = json.loads((config.folder / "config.json").read_text())
    options = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key == "epochs" or key not in FREE
    }
    default = dataclasses.asdict(recipe(config.dataset, config.optimizer))
    given = {
        key: value
        for key, value in options.items()
        if key in ("dataset", "optimizer") or value != default[key]
    }
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    description |= {
        "command": shlex.join(["python", "train.py", *arguments]),
        "config": options,
        "diverged": diverged,
    }
    try:
        records = read_records(config.folder)
    except FileNotFoundError:  # it diverged in its first epoch
        records = []
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in (description, *records)))
    part.replace(path)
    return read_run(path)


def read_run(path: Path) -> Run:
    """A finished run, from its record file.

    Raises:
      ValueError: if the file is no such record.
    """
    try:
        description, *records = map(json.loads, path.read_text().splitlines())
        return Run(Config(**description.pop("config")), description, records)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the record of a run: {error}; remove it, and its run is made anew"
        ) from error


def read(folder: Path) -> list[Run]:
    """The finished runs of a study, in the order of their names."""
    return [read_run(path) for path in sorted(folder.glob("*.jsonl"))]
