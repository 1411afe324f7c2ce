"""The runs of a study as they are shown: by data set, model and optimizer, then by method."""

from collections.abc import Iterable
from typing import NamedTuple

from models import MODELS
from reproduction.studies import Run
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS


class Group(NamedTuple):
    """Runs that differ in method and seed only."""

    title: str
    model: str
    optimizer: str
    dataset: str
    runs: dict[str, list[Run]]  # by method

    def finished(self, method: str) -> list[Run]:
        """The runs of a method that did not diverge."""
        return [run for run in self.runs.get(method, ()) if not run.description["diverged"]]


def group(runs: Iterable[Run]) -> list[Group]:
    """The runs by data set, optimizer and model, then by method and seed."""
    methods, models = list(METHODS), list(MODELS)

    def order(run: Run) -> tuple[str, str, int, int, int]:
        it = run.experiment
        model, method = models.index(it.model), methods.index(it.method)
        return it.dataset, it.optimizer, model, method, it.seed

    groups: dict[tuple[str, str, str], Group] = {}
    for run in sorted(runs, key=order):
        it = run.experiment
        title = f"{MODELS[it.model].label} on {DATASETS[it.dataset].label}"
        title += f", {OPTIMIZERS[it.optimizer].label}"
        new = Group(title, it.model, it.optimizer, it.dataset, {})
        found = groups.setdefault((it.dataset, it.optimizer, it.model), new)
        found.runs.setdefault(it.method, []).append(run)
    return list(groups.values())
