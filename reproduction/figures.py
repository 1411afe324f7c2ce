"""The figures of a study, drawn after the paper's Figures 1 to 4."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reproduction.files import replacing
from reproduction.groups import Arm, Group
from reproduction.studies import Run
from training.optimizers import METHODS
from training.plots import STYLE, plot_layers

SEEDS = "; lines are means over seeds, bands their standard deviation."


def draw(groups: Sequence[Group], folder: Path) -> list[tuple[str, str, str]]:
    """Draws all figures for which there are records, each as PNG and SVG.

    Returns:
      For each figure the name of its file, its title, and the rest of its caption.
    """
    traced = [group for group in groups if group.finished("autoscale")]
    if any(group.dataset == "cifar10" for group in traced):  # as in the paper
        traced = [group for group in traced if group.dataset == "cifar10"]
    mapped = [group for group in traced if group.model == "vgg16_bn"] or traced[:1]
    pictures: list[tuple[str, str, str, Callable[[Figure, Any], None], Sequence[Group]]] = [
        (
            "figure1",
            "Standard deviation of each layer's gradient under Autoscale",
            ", from the first layer (dark) to the last (bright); means over seeds.",
            layers,
            traced,
        ),
        (
            "figure2",
            "Global standard deviation of the gradients under Autoscale, and its factor",
            SEEDS,
            dynamics,
            traced,
        ),
        (
            "figure3",
            "Factor that each exponent gives for the standard deviations measured under Autoscale",
            SEEDS,
            exponents,
            mapped,
        ),
        (
            "figure4",
            "Test accuracy by method",
            SEEDS,
            accuracies,
            [group for group in groups if len(group.shown) > 1],
        ),
        (
            "effect",
            "Norm of each method's update relative to the plain optimizer's, in the first epoch",
            "; means over seeds.",
            effects,
            [group for group in groups if any(map(effect_by_step, group.shown.values()))],
        ),
    ]
    drawn = []
    for name, title, rest, picture, shown in pictures:
        if shown:
            rows = 2 if picture is dynamics else 1
            width = len(shown) * (2 if picture is exponents else 1)
            with figure_of(folder / name, (1 + 3.2 * max(width, 1.5), 0.6 + 2.4 * rows)) as figure:
                picture(figure, shown)
            drawn.append((name, title, rest))
    return drawn


@contextlib.contextmanager
def figure_of(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw on, saved as `path` with the suffixes png and svg, deterministically."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": path.name}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with replacing(path.with_suffix(".png")) as part:
            figure.savefig(part, format="png")
        with replacing(path.with_suffix(".svg")) as part:
            figure.savefig(part, format="svg", metadata={"Date": None})


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
    for axes, group in zip(all_axes, groups, strict=True):
        for arm in group.shown.values():
            if runs := arm.finished:
                percent = 100 * values(runs, "test_accuracy")
                band(axes, epochs(runs), percent, arm.method, arm.line, arm.label)
        finish(axes, group.title)
    all_axes[0].set_ylabel("test accuracy, %")
    common_legend(figure, all_axes)


def effects(figure: Figure, groups: Sequence[Group]) -> None:
    """The ratio of norms by step of the first epoch, and method."""
    all_axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, group in zip(all_axes, groups, strict=True):
        axes.axhline(1, color="black", linewidth=0.8)
        for arm in group.shown.values():
            if ratios := effect_by_step(arm):
                mean = np.mean(ratios, axis=0)
                color = METHODS[arm.method].color
                axes.plot(
                    np.arange(1, len(mean) + 1),
                    mean,
                    linestyle=arm.line,
                    color=color,
                    label=arm.label,
                    linewidth=1.2,
                )
        finish(axes, group.title, xlabel="step")
    all_axes[0].set_ylabel("norm, relative to plain")
    common_legend(figure, all_axes)


def effect_by_step(arm: Arm) -> list[list[float]]:
    """The ratios of norms of each run that has them, by step of its first epoch."""
    runs = arm.finished if arm.method != "none" else []
    by_step = [run.records[0]["update_norm_ratio_by_step"] for run in runs]
    return [ratios for ratios in by_step if ratios]


def common_legend(figure: Figure, all_axes: Sequence[Axes]) -> None:
    """One legend for all axes, in as few rows as the figure is wide enough for.

    It stands below the axes, and the figure becomes higher by it, so that they keep their height.
    """
    legend: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    for columns in range(len(legend), 0, -1):
        drawn = figure.legend(
            legend.values(), legend.keys(), loc="outside lower center", ncols=columns
        )
        size = drawn.get_window_extent()
        if columns == 1 or size.width <= figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)
            return
        drawn.remove()


def epochs(runs: Sequence[Run]) -> list[int]:
    return [record["epoch"] for record in runs[0].records]


def values(runs: Sequence[Run], name: str) -> np.ndarray:
    """A recorded value, of shape `(seeds, epochs)`."""
    return np.array([[record[name] for record in run.records] for run in runs], float)


def band(
    axes: Axes, x: Sequence[int], y: np.ndarray, method: str, line: Any = None, name: str = ""
) -> None:
    """Draws the mean over the first axis of `y`, and its standard deviation around it."""
    look = METHODS[method]
    mean, std = y.mean(0), y.std(0, ddof=1) if len(y) > 1 else np.zeros(y.shape[1])
    axes.plot(x, mean, linestyle=line or look.line, color=look.color, label=name, linewidth=1.5)
    axes.fill_between(x, mean - std, mean + std, color=look.color, alpha=0.08, linewidth=0)


def finish(axes: Axes, title: str, *, yscale: str = "linear", xlabel: str = "epoch") -> None:
    axes.set(title=title, yscale=yscale, xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
