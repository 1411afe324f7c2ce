"""The studies: which runs each of them is made of, and where their records are."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.config import Experiment, experiment_of, option, recipe

from models import MODELS
from reproduction.files import replacing
from training.data import DATASETS
from training.record import SCHEMA, Record, RecordError, parse_records, read_records

# The first line of a record file.
DESCRIPTION = (
    *("schema", "config", "command", "num_classes", "channels"),
    *("versions", "device", "device_count", "commit", "diverged"),
)

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
    """Grids that are reported together, and their description."""

    title: str
    scale: str  # for captions
    grids: tuple[Grid, ...]
    plan: str = ""  # hypotheses, tests and margins, fixed before the runs

    def experiments(self, seeds: int | None = None) -> list[Experiment]:
        """All runs, grid by grid: the cheapest first, all methods of a seed before the next seed.

        So an unfinished study still compares methods on the same seeds.
        """
        return [
            experiment
            for grid in self.grids
            for experiment in sorted(grid.experiments(seeds), key=lambda run: (cost(run), run.seed))
        ]


def compressed(experiment: Experiment, epochs: int) -> Experiment:
    """The recipe in fewer epochs, with the same total decay of the learning rate as in 200."""
    return dataclasses.replace(experiment, epochs=epochs, decay_epochs=30 * epochs / 200)


def measured(experiment: Experiment) -> Experiment:
    """The same, with its effect on the plain optimizer's updates recorded."""
    return dataclasses.replace(experiment, effect=True)


DIGITS, DIGITS_SGD = (
    dataclasses.replace(compressed(recipe("digits", optimizer), 10), train_size=640)
    for optimizer in ("adamw", "sgd")
)
DIGITS_SCALE = (
    "640 of scikit-learn's digits, enlarged to 16x16 pixels, for 10 epochs, in place of CIFAR-100 "
    "for 200"
)
PARTS = (
    *("none", "centering", "scaling", "constant", "autoscale", "autoscale_p1"),
    *("autoscale_direction", "autoscale_norm"),
)

CIFAR100 = measured(compressed(recipe("cifar100"), 20))
# The recipe's total decay in a tenth of its epochs, to first order.
WEIGHT_DECAY = 5e-5 * 200 / 20
# The mean of 1 / a_t in a pilot run of 10 epochs, one seed.
STRONGER = 2.1


def with_penalty(factor: float) -> Experiment:
    """CIFAR-100 with Adam and an L2 penalty, a multiple of the recipe's."""
    weight_decay = float(f"{WEIGHT_DECAY * factor:.12g}")
    tag = "" if factor == 1 else f"penalty{factor:g}"
    return dataclasses.replace(CIFAR100, optimizer="adam", weight_decay=weight_decay, tag=tag)


CIFAR100_PLAN = """\
Fixed before the first run. All runs: ResNet-20 on CIFAR-100 for 20 epochs, the paper's schedule
compressed in proportion, the same seeds for all methods, so that runs of one seed start from
the same parameters and see the same batches. The outcome is the test accuracy after the last
epoch, in points.

- **A, primary.** `autoscale` against `none` before AdamW, 6 seeds each. Two tests, and no
  others before all 12 runs are in: the paired t-test at alpha = 0.05, two-sided, and
  equivalence within 1 point (two one-sided paired t-tests at 0.05). The paper's claim is +2.0
  points, from one run each.
- **C, the mechanism.** With Adam and an L2 penalty in place of AdamW, 4 seeds each: `none`,
  `autoscale`, `none` with the penalty times 2.1 (the mean of 1 / a_t in a pilot run of 10
  epochs: `autoscale` comes before the penalty, and a factor a_t < 1 there multiplies the
  penalty's share by 1 / a_t), and `none` with the penalty times 4. Weight decay 5e-4, ten times
  the recipe's for a tenth of its epochs. Descriptive, with 95% intervals: is `autoscale` nearer
  to the plain or to the stronger penalty, and would a still stronger one do more?
- **B, which half acts.** `scaling` and `centering` before AdamW against `none`, 3 seeds each.
  One family of two tests with Holm's correction.
- **Baselines.** Gradient Normalization, Gradient Centralization and Z-score before AdamW, 2
  seeds each: descriptive.

A run diverges when its loss or gradients are not finite; the rule for it is in
`reproduction/inference.py`. Secondary, descriptive: the test loss, the mean accuracy of the
last three epochs, the effect on the updates. Whatever else is looked at later is called
exploratory."""

CIFAR100_GPU_PLAN = f"""\
All runs of the study [on a CPU](../cifar100/REPORT.md) again, with the same seeds, on one GPU. When
this was fixed, A was finished there, with +0.48 points (-0.28 to +1.23), and C had 2 runs. So A
is here a repetition: the paper's claim stays judged by the CPU's, and what the CPU has not
finished is judged by these runs. Beside them, descriptive, the mean over both devices of each
seed's difference. By default a GPU multiplies float32 numbers as TF32, and so it does here.

{CIFAR100_PLAN}"""

CIFAR100_GRIDS = (
    Grid(CIFAR100, ("resnet20",), ("none", "autoscale"), 6),
    Grid(with_penalty(1), ("resnet20",), ("none", "autoscale"), 4),
    Grid(with_penalty(STRONGER), ("resnet20",), ("none",), 4),
    Grid(with_penalty(4), ("resnet20",), ("none",), 4),
    Grid(CIFAR100, ("resnet20",), ("scaling", "centering"), 3),
    Grid(
        CIFAR100,
        ("resnet20",),
        ("gradient_normalization", "gradient_centralization", "zscore"),
        2,
    ),
)

STUDIES = {
    "digits": Study(
        "The paper's comparison, in minutes",
        DIGITS_SCALE,
        (Grid(measured(DIGITS), PAPER_MODELS, PAPER_METHODS, 5),),
    ),
    "ablation": Study(
        "Which part of the method does the work?",
        DIGITS_SCALE,
        (
            Grid(measured(DIGITS), ("resnet20",), PARTS, 5),
            Grid(measured(DIGITS_SGD), ("resnet20",), PARTS, 5),
        ),
    ),
    "vit": Study(
        "A Vision Transformer",
        "scikit-learn's digits, enlarged to 16x16 pixels, for 40 epochs",
        (Grid(measured(compressed(recipe("digits"), 40)), ("vit",), ("none", "autoscale"), 3),),
    ),
    "cpu": Study(
        "The paper's comparison on CIFAR-100, as far as a CPU goes",
        "CIFAR-100, 5 epochs in place of 200",
        (Grid(compressed(recipe("cifar100"), 5), ("resnet20",), PAPER_METHODS, 1),),
    ),
    "cifar100": Study(
        "Does it help on CIFAR-100, and why?",
        "CIFAR-100, 20 epochs in place of 200",
        CIFAR100_GRIDS,
        CIFAR100_PLAN,
    ),
    "cifar100-gpu": Study(
        "Does it help on CIFAR-100, and why? Again, on a GPU",
        "CIFAR-100, 20 epochs in place of 200",
        CIFAR100_GRIDS,
        CIFAR100_GPU_PLAN,
    ),
    "paper": Study(
        "The paper's comparison",
        "the paper's own: CIFAR-100, 200 epochs; its figures: CIFAR-10, 300 epochs",
        (
            Grid(measured(recipe("cifar100")), PAPER_MODELS, PAPER_METHODS, 5),
            Grid(measured(recipe("cifar10")), PAPER_MODELS, ("autoscale",), 1),
        ),
    ),
}


def cost(experiment: Experiment) -> float:
    """The duration of a run up to a factor: its multiply-adds."""
    data = DATASETS[experiment.dataset]
    images = experiment.train_size or data.num_train
    area = (data.image_size / 32) ** 2
    return experiment.epochs * images * area * MODELS[experiment.model].multiply_adds


def same_results(experiment: Experiment) -> Experiment:
    """The experiment without `effect`, the option that does not change its results."""
    return dataclasses.replace(experiment, effect=False)


class Run(NamedTuple):
    """A finished run."""

    experiment: Experiment
    description: dict[str, Any]  # command, versions, device, commit; what made it diverge, if so
    records: list[Record]


def publish(experiment: Experiment, folder: Path, path: Path, diverged: str | None) -> Run:
    """Writes a finished run's record file: a line that describes it, then its epochs.

    Args:
      experiment: the run's configuration.
      folder: the run's folder.
      path: the file, `results/<study>/<name>.jsonl`.
      diverged: why the run stopped before its last epoch, if it did.

    Returns:
      The run, as `read_run` reads it from the file.

    Raises:
      RecordError: if the folder lacks the records of some epochs; then nothing is written.
    """
    default = dataclasses.asdict(recipe(experiment.dataset, experiment.optimizer))
    options = dataclasses.asdict(experiment)
    arguments = [
        option(key) if value is True else f"{option(key)}={value}"
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
    if len(records) != experiment.epochs and not diverged:
        raise RecordError(
            f"{folder / 'metrics.jsonl'} has {len(records)} of {experiment.epochs} epochs; "
            f"remove {folder} to rerun"
        )
    lines = [json.dumps(line) for line in (description, *records)]
    run = _parse(lines, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text("".join(line + "\n" for line in lines))
    return run


def read_run(path: Path) -> Run:
    """A finished run, from its record file.

    Raises:
      RecordError: if the file is not such a record, or is named after another run.
    """
    try:
        run = _parse(path.read_bytes().splitlines(), path)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    if path.stem != run.experiment.name:
        raise RecordError(f"{path} is the record of {run.experiment.name}; move it away")
    return run


def read(folder: Path) -> dict[str, Run]:
    """The finished runs of a study by name, sorted by name.

    Raises:
      RecordError: if a file is not the record of a run.
    """
    return {path.stem: read_run(path) for path in sorted(folder.glob("*.jsonl"))}


def _parse(lines: Sequence[str | bytes], path: Path) -> Run:
    """A finished run, from the lines of its record file `path`; raises RecordError."""
    try:
        if not lines:
            raise ValueError("it is empty")
        description = json.loads(lines[0])
        if not isinstance(description, dict):
            raise ValueError("its first line does not describe one")
        if (schema := description.get("schema", 1)) != SCHEMA:
            raise ValueError(f"its schema is {schema}, not {SCHEMA}")
        if missing := [key for key in DESCRIPTION if key not in description]:
            raise ValueError(f"missing: {', '.join(missing)}")
        experiment = experiment_of(description.pop("config"))
        records = parse_records(lines[1:], path)
        missed = experiment.epochs - len(records)
        if missed < 0 or (missed > 0 and not description["diverged"]):
            raise ValueError(f"it has {len(records)} of {experiment.epochs} epochs")
        return Run(experiment, description, records)
    except RecordError as error:
        raise RecordError(f"{error}; delete it to rerun") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(
            f"{path} is not the record of a run: {error}; delete it to rerun"
        ) from error
