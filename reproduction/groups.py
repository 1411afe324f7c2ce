"""The runs of a study as reports show them: by data set, model and optimizer, then by arm."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from training.config import Experiment

from models import MODELS
from reproduction.studies import Run, Study
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS, method_label

VARIANT_LINES = (":", "-.", (0, (5, 1)), (0, (1, 1)))  # as Matplotlib has them


class Arm(NamedTuple):
    """Runs that differ only in their seed."""

    method: str
    label: str
    line: Any  # how its curves are drawn
    seeds: list[int]  # that were planned
    runs: dict[int, Run]  # those that exist, by seed

    @property
    def finished(self) -> list[Run]:
        """The runs that did not diverge."""
        return [run for run in self.runs.values() if not run.description["diverged"]]

    @property
    def missing(self) -> int:
        """The number of planned runs that are missing."""
        return sum(seed not in self.runs for seed in self.seeds)

    def accuracies(self) -> dict[int, float | None]:
        """Final test accuracies in percent, of the planned seeds; None for a run that diverged."""
        return {
            seed: None
            if self.runs[seed].description["diverged"]
            else 100 * self.runs[seed].records[-1]["test_accuracy"]
            for seed in self.seeds
            if seed in self.runs
        }


class Group(NamedTuple):
    """Runs that differ in method, weight decay and seed."""

    title: str
    dataset: str
    model: str
    optimizer: str
    epochs: int
    # By method; where a weight decay is not the group's first, as in "none x2.1".
    arms: dict[str, Arm]

    @property
    def scale(self) -> str:
        """Data set and number of epochs, and the device if it is not a CPU."""
        runs = [run for arm in self.arms.values() for run in arm.runs.values()]
        devices = {run.description["device"] for run in runs} - {"cpu"}
        return ", ".join([DATASETS[self.dataset].label, f"{self.epochs} epochs", *sorted(devices)])

    @property
    def shown(self) -> dict[str, Arm]:
        """The arms with runs."""
        return {key: arm for key, arm in self.arms.items() if arm.runs}

    def accuracies(self, keys: Iterable[str]) -> Mapping[str, Mapping[int, float | None]]:
        """The accuracies of some arms, in the form that `reproduction.inference` takes."""
        return {key: self.arms[key].accuracies() for key in keys}

    def finished(self, key: str) -> list[Run]:
        """The runs of an arm that did not diverge."""
        return self.arms[key].finished if key in self.arms else []


def group(study: Study, runs: Iterable[Run]) -> list[Group]:
    """The planned arms of a study and those of its runs, with the runs that exist.

    Args:
      study: the study, whose plan gives the seeds of each arm.
      runs: its runs; unplanned ones get an arm without planned seeds.
    """
    planned, runs = study.experiments(), list(runs)
    groups: dict[tuple[str, ...], Group] = {}
    first: dict[tuple[str, ...], float] = {}  # weight decay of each group

    def arm(it: Experiment) -> Arm:
        key = (it.dataset, it.optimizer, it.model)
        if key not in groups:
            title = f"{MODELS[it.model].label} on {DATASETS[it.dataset].label}"
            title += f", {OPTIMIZERS[it.optimizer].label}"
            groups[key] = Group(title, it.dataset, it.model, it.optimizer, it.epochs, {})
            first[key] = it.weight_decay
        arms = groups[key].arms
        name, label, line = (
            it.method,
            method_label(it.method, it.optimizer),
            METHODS[it.method].line,
        )
        if not math.isclose(it.weight_decay, first[key]):
            factor = f"x{it.weight_decay / first[key]:g}"
            name = f"{name} {factor}"
            label += f", {'weight decay' if it.optimizer == 'adamw' else 'penalty'} {factor}"
            variants = sum(other.method == it.method for other in arms.values())
            line = VARIANT_LINES[(variants - 1) % len(VARIANT_LINES)] if variants else line
        return arms.setdefault(name, Arm(it.method, label, line, [], {}))

    for experiment in planned:
        arm(experiment).seeds.append(experiment.seed)
    for run in sorted(runs, key=lambda run: run.experiment.seed):
        arm(run.experiment).runs[run.experiment.seed] = run

    methods, models, optimizers = list(METHODS), list(MODELS), list(OPTIMIZERS)

    def place(each: Group) -> tuple[str, int, int]:
        return each.dataset, optimizers.index(each.optimizer), models.index(each.model)

    for key, each in groups.items():
        order = sorted(each.arms.items(), key=lambda item: methods.index(item[1].method))
        groups[key] = each._replace(arms=dict(order))
    return sorted(groups.values(), key=place)
