"""Studies: which runs they are made of, and which of their differences are tested."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from pydantic import ConfigDict, TypeAdapter, ValidationError

from models import MODELS
from reproduction import replacing
from training import UserError
from training.data import DATASETS
from training.optimizers import OPTIMIZERS, method_label
from training.options import (
    Experiment,
    MethodName,
    ModelName,
    OptimizerName,
    experiment_of,
    option,
)
from training.record import explain

FILE = "study.json"  # the options of a study of one's own

NO_HINT = tyro.conf.arg(help_behavior_hint="")  # of a default that the help describes itself

Kind = Literal["primary", "family", "descriptive", "exploratory"]
Arms = Mapping[str, Experiment]  # by label, the first run of each


class Outcome(NamedTuple):
    """What a study compares, after the last epoch."""

    column: str  # of `records.table`
    label: str
    unit: str
    units: str  # in headings
    digits: int  # after the point, of differences
    margin: float  # of equivalence: a smaller difference would not decide which method to use
    diverged: float  # that of a run that diverged, in the sign test: worse than any other

    @property
    def within(self) -> str:
        """The margin in words."""
        return f"{self.margin:g} {self.unit}{'s' * (self.margin != 1)}"


ACCURACY = Outcome("accuracy", "test accuracy", "point", "points", 2, 1.0, -1.0)
# The margin is the standard deviation between seeds on digits, before the learning rate was tuned.
LOSS = Outcome("test_loss", "test loss", "nat", "nats of test loss", 4, 0.03, 1e9)


class Family(NamedTuple):
    """Differences that are tested together, or that are only described."""

    title: str
    kind: Kind
    contrasts: list[dict[str, float]]  # weights of arms: {"Autoscale": 1, "AdamW": -1}
    pool: Sequence[str] = ()  # arms whose residuals are pooled, and that tests wait for; (): all


def versus_plain(arms: Arms) -> list[Family]:
    """Every arm against the plain optimizer; against the first arm, if there is none."""
    first = next((label for label, it in arms.items() if it.method == "none"), next(iter(arms)))
    contrasts = [{label: 1.0, first: -1.0} for label in arms if label != first]
    return [Family(f"Every arm against {first}", "family", contrasts)]


class Study(NamedTuple):
    """Runs that are reported together.

    Runs are compared within a group. A group has several arms, and an arm has runs that differ in
    their seeds.
    """

    name: str
    title: str
    experiments: tuple[Experiment, ...]  # in the order in which they are made
    scale: str = ""  # for captions
    groups: tuple[str, ...] = ("dataset", "optimizer", "model")  # options that tell groups apart
    arms: tuple[str, ...] = ("method",)  # options that tell arms apart
    families: Callable[[Arms], list[Family]] = versus_plain
    outcome: Outcome = ACCURACY
    plan: str = ""  # hypotheses, tests and margins, fixed before the runs
    preset: bool = False
    fixed_before: bool = True  # whether the tests were chosen before the first run
    beside: str = ""  # a preset whose runs are in the figures by learning rate and penalty as well
    runs: tuple[Path, ...] = ()  # folders of train.py that it is made of, in place of a grid

    def group(self, experiment: Experiment) -> str:
        """The title of a run's group."""
        title = f"{MODELS[experiment.model].label} on {DATASETS[experiment.dataset].label}"
        more = [name for name in self.groups if name not in ("dataset", "model")]
        return ", ".join([title, *(describe(experiment, name) for name in more)])

    def arm(self, experiment: Experiment) -> str:
        """The label of a run's arm."""
        parts = [describe(experiment, name) for name in self.arms]
        return ", ".join(dict.fromkeys(filter(None, parts)))


def describe(experiment: Experiment, name: str) -> str:
    """An option in titles and labels.

    >>> describe(Experiment(optimizer="sgd", method="none"), "method")
    'SGD'
    >>> describe(Experiment(learning_rate=4e-3), "learning_rate")
    'learning rate 0.004'
    """
    it, value = experiment, getattr(experiment, name)
    match name:
        case "dataset":
            return DATASETS[value].label
        case "model":
            return MODELS[value].label
        case "optimizer":
            return OPTIMIZERS[value].label
        case "method":
            return method_label(value, it.optimizer)
        case "tag":
            words = value.replace("penalty", "penalty x").replace("-lr", ", lr")
            return re.sub(r"\blr(?=\d)", "learning rate ", words)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{name.replace('_', ' ')} {text}"


@dataclasses.dataclass(frozen=True)
class Axes:
    """Options that take several values; every combination of them is a run."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    methods: Annotated[tuple[MethodName, ...], NO_HINT] = ()
    """Gradient methods (default: none, and --method)."""
    models: Annotated[tuple[ModelName, ...], NO_HINT] = ()
    """Networks (default: --model)."""
    optimizers: Annotated[tuple[OptimizerName, ...], NO_HINT] = ()
    """Optimizers (default: --optimizer)."""
    learning_rates: Annotated[tuple[float, ...], NO_HINT] = ()
    """Learning rates (default: --learning-rate; for several --optimizers the default of each)."""
    weight_decays: Annotated[tuple[float, ...], NO_HINT] = ()
    """Weight decays (default: --weight-decay)."""
    seeds: Annotated[int | None, NO_HINT] = None
    """Number of seeds, from --seed on (default: 5; of a preset, its own)."""

    def resolve(self, experiment: Experiment) -> "Axes":
        """The axes with the values that they have by default."""
        it, rates = experiment, self.learning_rates
        optimizers = self.optimizers or (it.optimizer,)
        if not rates and len(set(optimizers)) == 1:
            rates = (usual_rate(it, optimizers[0]),)
        values = {
            "methods": self.methods or ("none", it.method),
            "models": self.models or (it.model,),
            "optimizers": optimizers,
            "learning_rates": rates,
            "weight_decays": self.weight_decays or (it.weight_decay,),
        }
        once: dict[str, Any] = {key: tuple(dict.fromkeys(each)) for key, each in values.items()}
        return Axes(**once, seeds=5 if self.seeds is None else self.seeds)


def usual_rate(experiment: Experiment, optimizer: str) -> float:
    """The learning rate of an experiment, or with another optimizer that one's default."""
    same = optimizer == experiment.optimizer
    return experiment.learning_rate if same else OPTIMIZERS[optimizer].learning_rate


def grid(experiment: Experiment, axes: Axes) -> tuple[Experiment, ...]:
    """Every combination of the axes' values, the other options being those of `experiment`.

    The cheapest runs come first, and all methods of a seed before the next seed: a study in
    progress compares methods on the same seeds. The tag, which is part of a run's name, tells
    learning rates and weight decays apart.

    Raises:
      ValueError: for an impossible option.
    """
    it, axes = experiment, axes.resolve(experiment)
    runs = []
    for model, optimizer, decay, method in itertools.product(
        axes.models, axes.optimizers, axes.weight_decays, axes.methods
    ):
        usual = usual_rate(it, optimizer)
        for rate in axes.learning_rates or (usual,):
            tags = [it.tag, *[f"lr{rate:.12g}"] * (rate != usual)]
            tags += [f"wd{decay:.12g}"] * (decay != it.weight_decay)
            options = {"method": method, "model": model, "optimizer": optimizer}
            options |= {"learning_rate": rate, "weight_decay": decay}
            options |= {"tag": "-".join(filter(None, tags))}
            for seed in range(it.seed, it.seed + (axes.seeds or 0)):
                runs.append(experiment_of(vars(it) | options | {"seed": seed}))
    return tuple(sorted(runs, key=lambda each: (cost(each), each.seed)))


def of_grid(name: str, experiment: Experiment, axes: Axes) -> Study:
    """A study of one's own."""
    runs, axes = grid(experiment, axes), axes.resolve(experiment)
    several = {"learning_rate": axes.learning_rates, "weight_decay": axes.weight_decays}
    outcome, it = ACCURACY, experiment
    if it.validation_size:  # which chooses each method's learning rate
        del several["learning_rate"]
        outcome = LOSS
    more = [key for key, values in several.items() if len(values) > 1]
    label = DATASETS[it.dataset].label
    scale = f"{label}, {it.num_train:,} training images, {it.epochs} epochs"
    groups = ("dataset", "optimizer", "model", *more)
    return Study(name, name, runs, scale, groups, outcome=outcome)


def of_runs(name: str, runs: Mapping[Path, Experiment]) -> Study:
    """A study of runs that `train.py` made.

    Arms are told apart by the options in which the runs differ; by their folders, where two runs
    differ in none.
    """
    its = list(runs.values())
    same = ("dataset", "model", "method", "seed", "effect", "tag")
    apart = [key for key in vars(its[0]) if len({getattr(it, key) for it in its}) > 1]
    arms = ["method", *(key for key in apart if key not in same)]
    if all(it.learning_rate == OPTIMIZERS[it.optimizer].learning_rate for it in its):
        arms = [key for key in arms if key != "learning_rate"]  # which the optimizer implies

    def told_apart() -> bool:
        keys = ("dataset", "model", "seed", *arms)
        return len({tuple(getattr(it, key) for key in keys) for it in its}) == len(its)

    if not told_apart():
        arms.append("tag")
    if not told_apart():
        its = [dataclasses.replace(it, tag=str(path)) for path, it in zip(runs, its, strict=True)]
    groups = ("dataset", *(["optimizer"] if "optimizer" not in arms else []), "model")
    return Study(name, name, tuple(its), "the runs' own", groups, tuple(arms), runs=tuple(runs))


@dataclasses.dataclass(frozen=True)
class Begun:
    """The options of a study of one's own, as its folder keeps them."""

    experiment: Experiment
    axes: Axes
    runs: tuple[Path, ...]  # of train.py, in place of a grid


_BEGUN = TypeAdapter(Begun)


def save(folder: Path, begun: Begun) -> None:
    """Writes the options of a study into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as part:
        part.write_bytes(_BEGUN.dump_json(begun, indent=2) + b"\n")


def load(folder: Path) -> Begun | None:
    """The options of the study in a folder; None if there is none.

    Raises:
      ValueError: if the file is damaged; the message names it.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return _BEGUN.validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{path} is damaged: {explain(error)}; put back a copy of it, or give another --name"
        ) from error


def extend(name: str, begun: Begun, experiment: Experiment, axes: Axes) -> Axes:
    """The axes of a study that was begun, with further values.

    Raises:
      ValueError: if another option differs.
    """
    advice = "give the new study another --name"
    for key, value in vars(begun.experiment).items():
        if (given := getattr(experiment, key)) != value:
            raise UserError(
                f"{option(key)} is {given}, and the study {name} was begun with {value}; {advice}"
            )
    old, new = begun.axes.resolve(experiment), axes.resolve(experiment)
    if bool(old.learning_rates) != bool(new.learning_rates):
        raise UserError(
            f"the study {name} cannot have both --learning-rates and the default of each "
            f"optimizer; {advice}"
        )
    united: dict[str, Any] = vars(old) | {"seeds": max(old.seeds or 0, new.seeds or 0)}
    for key in united.keys() - {"seeds"}:
        united[key] = tuple(dict.fromkeys((*united[key], *getattr(new, key))))
    return Axes(**united)


def cost(experiment: Experiment) -> float:
    """The duration of a run up to a factor: its multiply-adds."""
    data = DATASETS[experiment.dataset]
    area = (data.image_size / 32) ** 2
    return experiment.epochs * experiment.num_train * area * MODELS[experiment.model].multiply_adds


def same_results(experiment: Experiment) -> Experiment:
    """The experiment without `effect`, the option that does not change its results."""
    return dataclasses.replace(experiment, effect=False)
