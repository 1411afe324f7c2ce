"""The figures of a study, drawn after the paper's Figures 1 to 4."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reproduction.files import replacing
from reproduction.groups import Group
from reproduction.studies import Run
from training.optimizers import METHODS, method_label
from training.plots import STYLE, plot_layers


def draw(groups: Sequence[Group], folder: Path) -> list[tuple[str, str]]:
    """Draws what the records allow, each as PNG and SVG; returns (name, caption) of each."""
    traced = [group for group in groups if group.finished("autoscale")]
    if any(group.dataset == "cifar10" for group in traced):  # as in the paper
        traced = [group for group in traced if group.dataset == "cifar10"]
    compared = [group for group in groups if len(group.runs) > 1]
    mapped = [group for group in traced if group.model == "vgg16_bn"] or traced[-1:]
    seeds = "lines are means over seeds, bands their standard deviation"
    pictures: list[tuple[str, str, Callable[[Figure, Any], None], Sequence[Group]]] = [
        (
            "figure1",
            "Standard deviation of each layer's gradient under Autoscale, from the first layer "
            "(dark) to the last (bright); means over seeds.",
            layers,
            traced,
        ),
        (
            "figure2",
            f"Global standard deviation of the gradients under Autoscale, and its factor; {seeds}.",
            dynamics,
            traced,
        ),
        (
            "figure3",
            "The factor that each exponent gives for the standard deviations measured under "
            f"Autoscale; {seeds}.",
            exponents,
            mapped,
        ),
        ("figure4", f"Test accuracy by method; {seeds}.", accuracies, compared),
    ]
    drawn = []
    for name, caption, picture, shown in pictures:
        if shown:
            with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
                rows = 2 if picture is dynamics else 1
                size = (1 + 3.2 * max(len(shown), 1.5), 0.6 + 2.4 * rows)
                figure = Figure(figsize=size, layout="constrained")
                picture(figure, shown)
                with replacing(folder / f"{name}.png") as part:
                    figure.savefig(part, format="png")
                with replacing(folder / f"{name}.svg") as part:
                    figure.savefig(part, format="svg", metadata={"Date": None})
            drawn.append((name, caption))
    return drawn


def layers(figure: Figure, groups: Sequence[Group]) -> None:
    """Figure 1: the standard deviation of each layer's gradient, by epoch."""
    all_axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(all_axes, groups, strict=True):
        runs = group.finished("autoscale")
        names = runs[0].records[0]["layer_std"]
        means = {
            layer: np.mean([[r["layer_std"][layer] for r in run.records] for run in runs], axis=0)
            for layer in names
        }
        plot_layers(figure, axes, epochs(runs), means)
        finish(axes, group.title, yscale="log")
    all_axes[0].set_ylabel("gradient std of each layer")


def dynamics(figure: Figure, groups: Sequence[Group]) -> None:
    """Figure 2: the global standard deviation, and below it the factor, by epoch."""
    grid = figure.subplots(2, len(groups), squeeze=False, sharex="col")
    for (above, below), group in zip(grid.T, groups, strict=True):
        runs = group.finished("autoscale")
        band(above, epochs(runs), values(runs, "global_std"), "autoscale")
        band(below, epochs(runs), values(runs, "scale_factor"), "autoscale")
        finish(above, group.title, xlabel="")
        finish(below, "")
    grid[0, 0].set_ylabel("global gradient std $s_t$")
    grid[1, 0].set_ylabel("scale factor $a_t$")


def exponents(figure: Figure, groups: Sequence[Group]) -> None:
    """Figure 3: the factor with p = 2 and with p = 1."""
    all_axes = figure.subplots(1, 2 * len(groups), squeeze=False)[0]
    for index, axes in enumerate(all_axes):
        group, exponent = groups[index // 2], 2 - index % 2
        runs = group.finished("autoscale")
        factors = (4 / np.abs(np.log(values(runs, "global_std")))) ** exponent
        band(axes, epochs(runs), factors, f"autoscale_p{exponent}")
        finish(axes, f"{group.title}, $p_t = {exponent}$")
    all_axes[0].set_ylabel("scale factor $a_t$")


def accuracies(figure: Figure, groups: Sequence[Group]) -> None:
    """Figure 4: the test accuracy by epoch and method."""
    all_axes = figure.subplots(1, len(groups), squeeze=False)[0]
    legend: dict[str, Any] = {}
    for axes, group in zip(all_axes, groups, strict=True):
        for method in group.runs:
            if runs := group.finished(method):
                percent = 100 * values(runs, "test_accuracy")
                band(axes, epochs(runs), percent, method, method_label(method, group.optimizer))
        finish(axes, group.title)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    all_axes[0].set_ylabel("test accuracy, %")
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(groups) + 2)


def epochs(runs: Sequence[Run]) -> list[int]:
    return [record["epoch"] for record in runs[0].records]


def values(runs: Sequence[Run], name: str) -> np.ndarray:
    """What was recorded, of shape `(seeds, epochs)`."""
    return np.array([[record[name] for record in run.records] for run in runs], float)


def band(axes: Axes, x: Sequence[int], y: np.ndarray, method: str, name: str = "") -> None:
    """Draws the mean over the first axis of `y`, and its standard deviation around it."""
    look = METHODS[method]
    mean, std = y.mean(0), y.std(0, ddof=1) if len(y) > 1 else np.zeros(y.shape[1])
    axes.plot(x, mean, linestyle=look.line, color=look.color, label=name, linewidth=1.5)
    axes.fill_between(x, mean - std, mean + std, color=look.color, alpha=0.08, linewidth=0)


def finish(axes: Axes, title: str, *, yscale: str = "linear", xlabel: str = "epoch") -> None:
    axes.set(title=title, yscale=yscale, xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
