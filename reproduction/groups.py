"""The runs of a study as they are shown: by model and by method, each with its name and look."""

from collections.abc import Iterable
from typing import NamedTuple

from reproduction.studies import Run

MODELS = {"resnet20": "ResNet-20", "resnet56": "ResNet-56", "vgg16_bn": "VGG-16-BN", "vit": "ViT"}
DATASETS = {"digits": "digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


class Look(NamedTuple):
    """How a method is shown, in every table and picture."""

    label: str
    color: str  # Okabe and Ito's: told apart by the colour-blind
    line: str = "-"


METHODS = {
    "adamw": Look("AdamW", "#000000"),
    "gradient_normalization": Look("Gradient Normalization", "#009E73"),
    "gradient_centralization": Look("Gradient Centralization", "#0072B2"),
    "zscore": Look("Z-Score Normalization", "#CC79A7"),
    "clip": Look("Clipping", "#E69F00"),
    "centering": Look("centring only", "#0072B2", "--"),
    "scaling": Look("scaling only", "#56B4E9"),
    "constant": Look("centring, constant factor", "#009E73", "--"),
    "autoscale": Look("Autoscale", "#D55E00"),
    "autoscale_p1": Look("Autoscale, p = 1", "#D55E00", "--"),
    "autoscale_p2": Look("Autoscale, p = 2", "#D55E00", ":"),
    "autoscale_max1": Look("Autoscale, max_scale = 1", "#D55E00", "-."),
}


def label(method: str, optimizer: str = "adamw") -> str:
    """A method's name, in tables and legends."""
    return "SGD" if (method, optimizer) == ("adamw", "sgd") else METHODS[method].label


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
        cell = run.cell
        model, method = models.index(cell.model), methods.index(cell.method)
        return cell.dataset, cell.optimizer, model, method, cell.seed

    groups: dict[tuple[str, str, str], Group] = {}
    for run in sorted(runs, key=order):
        cell = run.cell
        title = f"{MODELS[cell.model]} on {DATASETS[cell.dataset]}"
        title += ", SGD" if cell.optimizer == "sgd" else ""
        new = Group(title, cell.model, cell.optimizer, cell.dataset, {})
        found = groups.setdefault((cell.dataset, cell.optimizer, cell.model), new)
        found.runs.setdefault(cell.method, []).append(run)
    return list(groups.values())
