"""The figures of a study, some of them drawn after the paper's Figures 1 to 4."""

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reproduction.presets import PAPER_ACCURACY, PRESETS
from reproduction.records import by_epoch, replacing, table
from reproduction.statistics import MARGIN, differences
from reproduction.studies import Study, describe
from training.optimizers import METHODS, method_label
from training.plots import STYLE, plot_layers

SEEDS = "; lines are means over seeds, bands their standard deviation."
# Okabe and Ito's colors, told apart by the color-blind, and three more.
COLORS = {
    "none": "#000000",
    "gradient_normalization": "#009E73",
    "gradient_centralization": "#0072B2",
    "zscore": "#CC79A7",
    "clip": "#999999",
    "centering": "#E69F00",
    "scaling": "#56B4E9",
    "constant": "#8C510A",
    "autoscale": "#D55E00",
    "autoscale_p1": "#D55E00",
    "autoscale_direction": "#332288",
    "autoscale_norm": "#999933",
}
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
# Whose effect on the steps is drawn, as far as it was measured: four of them, in this order.
EFFECTS = (
    *("autoscale", "scaling", "centering", "zscore"),
    *("gradient_centralization", "gradient_normalization"),
)

Look = tuple[str, Any]  # color, and line as Matplotlib has it


class Picture(NamedTuple):
    """A drawn figure, for the report."""

    name: str  # of its files
    title: str
    caption: str  # after the title

    def __str__(self) -> str:
        return f"![{self.title}]({self.name}.png)\n\n*{self.title}{self.caption}*"


def draw(
    study: Study, runs: pd.DataFrame, found: pd.DataFrame, folder: Path
) -> list[Picture]:
    """Draws all figures for which there are records, each as PNG and SVG.

    Args:
      study: the study.
      runs: its table of runs.
      found: its differences.
      folder: where the files are written.
    """
    shown = runs[runs["records"].map(len) > 0]
    groups = list(shown.groupby("group", sort=False))
    looks = looks_of(shown)
    traced = [
        (title, ours)
        for title, each in groups
        if len(ours := each[(each["method"] == "autoscale") & (each["state"] == "finished")])
    ]
    if any((ours["dataset"] == "cifar10").any() for _, ours in traced):  # as in the paper
        traced = [each for each in traced if (each[1]["dataset"] == "cifar10").any()]
    compared = [(title, each) for title, each in groups if each["arm"].nunique() > 1]
    affected = [(title, each) for title, each in groups if len(affecting(each))]
    known = found[found["value"].notna()] if len(found) else found

    def columns(count: int) -> float:
        return 1 + 3.2 * max(count, 1.5)

    drawn: list[Picture] = []

    def add(name: str, title: str, caption: str, size: tuple[float, float], paint: Any) -> None:
        with figure_of(folder / name, size) as figure:
            paint(figure)
        drawn.append(Picture(name, title, caption))

    if len(known):
        heights = 0.5 + 0.24 * len(known) + 0.35 * known["group"].nunique()
        add(
            "differences",
            "Differences in test accuracy",
            ", with 95% intervals; dots are the seeds. Between the dotted lines, differences are "
            f"within {MARGIN:g} point.",
            (7, heights),
            lambda figure: forests(figure, known),
        )
    for name in ("learning_rate", "weight_decay"):
        if panels := varied(shown, name):
            words = name.replace("_", " ")
            add(
                name,
                f"Test accuracy against the {words}",
                "; lines are means over seeds, dots the seeds.",
                (columns(len(panels)), 3),
                lambda figure, name=name, panels=panels: against(figure, panels, name),
            )
    if not study.preset:
        rows = 0.6 + 2.4 * len(groups)
        add("curves", "Training", SEEDS, (14, rows), lambda figure: curves(figure, groups, looks))
    if study.preset and traced:
        add(
            "figure1",
            "Standard deviation of each layer's gradient under Autoscale",
            ", from the first layer (dark) to the last (bright); means over seeds.",
            (columns(len(traced)), 3),
            lambda figure: layers(figure, traced),
        )
        add(
            "figure2",
            "Global standard deviation of the gradients under Autoscale, and its factor",
            SEEDS,
            (columns(len(traced)), 5.4),
            lambda figure: dynamics(figure, traced),
        )
        add(
            "figure3",
            "Factor with p = 2 and with p = 1",
            ", of the standard deviations measured under Autoscale" + SEEDS,
            (columns(len(traced)), 3),
            lambda figure: exponents(figure, traced),
        )
    if study.preset and compared:
        add(
            "figure4",
            "Test accuracy by epoch, minus the plain optimizer's",
            SEEDS.replace("bands", "taken within each, bands"),
            (columns(len(compared)), 3),
            lambda figure: gains(figure, compared, looks),
        )
    if affected:
        add(
            "effect",
            "Norm of the update relative to the plain optimizer's, in the first epoch",
            "; means over seeds. The other methods are in the table.",
            (columns(len(affected)), 3),
            lambda figure: effects(figure, affected, looks),
        )
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


def looks_of(runs: pd.DataFrame) -> dict[str, Look]:
    """A color for the method of each arm, and a line; no two arms have the same."""
    looks: dict[str, Look] = {}
    for arm, method in zip(runs["arm"], runs["method"], strict=True):
        if arm not in looks:
            color = COLORS.get(method, "#666666")
            lines = LINES[1:] if method == "autoscale_p1" else LINES
            free = [line for line in lines if (color, line) not in looks.values()]
            looks[arm] = color, (free or lines)[0]
    return looks


Groups = Sequence[tuple[Any, pd.DataFrame]]  # title and runs


def layers(figure: Figure, groups: Groups) -> None:
    """Figure 1: the standard deviation of each layer's gradient, by epoch."""
    all_axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, runs) in zip(all_axes, groups, strict=True):
        stds = np.array(
            [[list(r["layer_std"].values()) for r in records] for records in runs["records"]]
        )
        names = runs["records"].iloc[0][0]["layer_std"]
        means = dict(zip(names, stds.mean(0).T.tolist(), strict=True))
        plot_layers(figure, axes, list(range(1, stds.shape[1] + 1)), means)
        finish(axes, title, yscale="log")
    all_axes[0].set_ylabel("gradient std of each layer")


def dynamics(figure: Figure, groups: Groups) -> None:
    """Figure 2: the global standard deviation, and below it the factor, by epoch."""
    grid = figure.subplots(2, len(groups), squeeze=False, sharex="col")
    for (above, below), (title, runs) in zip(grid.T, groups, strict=True):
        band(above, by_epoch(runs, "global_std"), (COLORS["autoscale"], "-"))
        band(below, by_epoch(runs, "scale_factor"), (COLORS["autoscale"], "-"))
        finish(above, title, xlabel="")
        finish(below, "")
    grid[0, 0].set_ylabel("global gradient std $s_t$")
    grid[1, 0].set_ylabel("scale factor $a_t$")


def exponents(figure: Figure, groups: Groups) -> None:
    """Figure 3: the factor with p = 2 and with p = 1, on the same network."""
    all_axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, runs) in zip(all_axes, groups, strict=True):
        for exponent, look in ((2, (COLORS["autoscale"], "-")), (1, (COLORS["gradient_centralization"], "--"))):
            factors = (4 / np.log(by_epoch(runs, "global_std")).abs()) ** exponent
            band(axes, factors, look, f"p = {exponent}")
        finish(axes, title)
        axes.set_ylim(0)
    all_axes[0].set_ylabel("scale factor $a_t$")
    common_legend(figure, all_axes)


def gains(figure: Figure, groups: Groups, looks: Mapping[str, Look]) -> None:
    """Figure 4: the test accuracy by epoch, as the difference from the plain optimizer."""
    all_axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, runs) in zip(all_axes, groups, strict=True):
        finished = runs[runs["state"] == "finished"]
        accuracy = {arm: by_epoch(each, "test_accuracy") for arm, each in finished.groupby("arm")}
        first = plain_arm(finished)
        axes.axhline(0, color="black", linewidth=0.8)
        for arm in dict.fromkeys(finished["arm"]):
            if arm != first:
                band(axes, 100 * (accuracy[arm] - accuracy[first]).dropna(), looks[arm], arm)
        finish(axes, title)
    all_axes[0].set_ylabel("test accuracy minus plain, points")
    common_legend(figure, all_axes)


def plain_arm(runs: pd.DataFrame) -> str:
    """The arm that the others are compared with."""
    plain = runs[runs["method"] == "none"]
    return (plain if len(plain) else runs)["arm"].iloc[0]


def curves(figure: Figure, groups: Groups, looks: Mapping[str, Look]) -> None:
    """What was recorded by epoch: a row for each group, a column for each quantity."""
    names = {
        "test_accuracy": "test accuracy, %",
        "test_loss": "test loss",
        "global_std": "global gradient std $s_t$",
        "scale_factor": "scale factor $a_t$",
        "update_norm_ratio": "update norm, relative to plain",
    }
    there = [
        name
        for name in names
        if any(by_epoch(runs, name).notna().to_numpy().any() for _, runs in groups)
    ]
    grid = figure.subplots(len(groups), len(there), squeeze=False)
    for row, (title, runs) in zip(grid, groups, strict=True):
        for axes, name in zip(row, there, strict=True):
            for arm, each in runs.groupby("arm", sort=False):
                values = by_epoch(each, name).dropna(how="all")
                if len(values):
                    band(axes, values * (100 if "accuracy" in name else 1), looks[str(arm)], str(arm))
            finish(axes, "", yscale="log" if name == "global_std" else "linear")
            axes.set_ylabel(names[name])
        row[0].set_title(title, loc="left")
    common_legend(figure, list(grid.flat))


def varied(runs: pd.DataFrame, name: str) -> list[tuple[str, pd.DataFrame]]:
    """The finished runs among which an option has several values, by title."""
    others = {"learning_rate", "weight_decay"} - {name}
    finished = runs[runs["state"] == "finished"]
    panels = []
    keys = ["dataset", "optimizer", "model", "repeat", "epochs"]
    for _, each in finished.groupby(keys, sort=False):
        parts = [("", each)] if name == "weight_decay" else list(each.groupby(list(others)))
        for _, part in parts:
            if part[name].nunique() > 1:
                it = part["experiment"].iloc[0]
                title = f"{describe(it, 'model')} on {describe(it, 'dataset')}, "
                panels.append((title + describe(it, "optimizer"), part))
    return panels


def against(figure: Figure, panels: Sequence[tuple[str, pd.DataFrame]], name: str) -> None:
    """The accuracy against an option, a line for each method, the seeds as dots."""
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, runs) in zip(all_axes, panels, strict=True):
        for method, each in runs.groupby("method", sort=False):
            color = COLORS.get(str(method), "#666666")
            means = each.groupby(name)["accuracy"].mean()
            text = method_label(str(method), each["optimizer"].iloc[0])
            line = "--" if method == "autoscale_p1" else "-"
            axes.plot(means.index, means, line, color=color, label=text, linewidth=1.5)
            axes.plot(each[name], each["accuracy"], "o", color=color, markersize=3, alpha=0.6)
        ticks = sorted(set(runs[name]))
        smallest = min(tick for tick in ticks if tick > 0)
        axes.set_xscale("symlog", linthresh=smallest) if ticks[0] == 0 else axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(title=textwrap.fill(title, 32), xlabel=name.replace("_", " "))
    all_axes[0].set_ylabel("test accuracy, %")
    common_legend(figure, all_axes)


def affecting(runs: pd.DataFrame) -> list[str]:
    """The arms whose effect is drawn, with its first epoch recorded by step."""
    measured = [
        (EFFECTS.index(method), arm)
        for arm, method, records in zip(runs["arm"], runs["method"], runs["records"], strict=True)
        if method in EFFECTS and records[0]["update_norm_ratio_by_step"]
    ]
    return list(dict.fromkeys(arm for _, arm in sorted(measured)))[:4]


def effects(figure: Figure, groups: Groups, looks: Mapping[str, Look]) -> None:
    """The ratio of norms by step of the first epoch, and method."""
    all_axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, runs) in zip(all_axes, groups, strict=True):
        axes.axhline(1, color="black", linewidth=0.8)
        for arm in affecting(runs):
            there = runs[(runs["arm"] == arm) & (runs["state"] == "finished")]
            ratios = [records[0]["update_norm_ratio_by_step"] for records in there["records"]]
            mean, (color, line) = np.mean(ratios, axis=0), looks[arm]
            steps = np.arange(1, len(mean) + 1)
            axes.plot(steps, mean, linestyle=line, color=color, label=arm, linewidth=1.2)
        finish(axes, title, xlabel="step")
    all_axes[0].set_ylabel("norm, relative to plain")
    common_legend(figure, all_axes)


def forests(figure: Figure, found: pd.DataFrame) -> None:
    """The differences of each group, one below the other."""
    groups = list(found.groupby("group", sort=False))
    heights = [len(rows) + 1.2 for _, rows in groups]
    grid = figure.subplots(
        len(groups), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    for axes, (title, rows) in zip(grid[:, 0], groups, strict=True):
        forest(axes, rows, list(rows["label"]))
        axes.set_title(title, loc="right")  # it may be wider than the axes
    grid[-1, 0].set_xlabel("points of test accuracy")


def forest(axes: Axes, rows: pd.DataFrame, labels: Sequence[str]) -> None:
    """Differences with their intervals and seeds."""
    axes.axvline(0, color="black", linewidth=0.8)
    for edge in (-MARGIN, MARGIN):
        axes.axvline(edge, color="black", linewidth=0.6, linestyle=":")
    for place, (_, row) in enumerate(rows.iterrows()):
        # Without the last digits, which the version of NumPy or SciPy may change.
        value, low, high = (round(row[key], 6) for key in ("value", "low", "high"))
        ours = row["label"].startswith("Autoscale minus")
        color = COLORS["autoscale" if ours else "none"]
        seeds = row["by_seed"].round(6)
        axes.plot(seeds, [place] * len(seeds), "o", color=color, markersize=2.5, alpha=0.4)
        axes.plot([low, high], [place, place], color=color, linewidth=1.5)
        axes.plot(value, place, "o", color=color, markersize=5)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def draw_verdict(results: Path) -> None:
    """Draws `verdict.png`: Autoscale on CIFAR-100 and, below it, on digits; if both have records."""
    found = {}
    for name in ("cifar100", "digits"):
        study, runs = PRESETS[name], table(PRESETS[name], results / name)
        rows = differences(study, runs)
        rows = rows[(rows["repeat"] == "") & rows["low"].notna()]
        rows = rows[rows["label"].str.startswith("Autoscale minus")]
        found[name] = rows[~rows["label"].str.contains("midpoint|Normalization|Centralization")]
    if not all(map(len, found.values())):
        return
    ours = (found["cifar100"], found["digits"])
    with figure_of(results / "verdict", (6.5, 3.6)) as figure:
        above, below = figure.subplots(
            2, 1, sharex=True, gridspec_kw={"height_ratios": [len(rows) + 1 for rows in ours]}
        )
        for axes, rows in zip((above, below), ours, strict=True):
            axes.axvspan(-MARGIN, MARGIN, color="black", alpha=0.07, linewidth=0)
        names = ours[0]["label"].str.removeprefix("Autoscale ") + [
            f" ({n} seeds)" for n in ours[0]["n"]
        ]
        forest(above, ours[0], list(names))
        paper = PAPER_ACCURACY["resnet20"]
        claimed = paper["autoscale"] - paper["none"]
        above.plot(claimed, 0, "D", color="black", fillstyle="none")
        above.annotate("the paper,\n200 epochs", (claimed + 0.15, 0), va="center", fontsize=7)
        above.set_title("CIFAR-100, ResNet-20, 20 epochs: Autoscale ...", loc="left")
        networks = ours[1]["group"].str.partition(" on ")[0]
        forest(below, ours[1], [f"{name}, minus AdamW" for name in networks])
        below.set_title("digits, 10 epochs: Autoscale ...", loc="left")
        below.set_xlabel("points of test accuracy; 95% intervals, dots are seeds")


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


def band(axes: Axes, values: pd.DataFrame, look: Look, name: str = "") -> None:
    """Draws the mean over the rows by column, and the standard deviation around it."""
    (color, line), mean, std = look, values.mean(), values.std().fillna(0)
    marker = "o" if len(mean) == 1 else ""
    axes.plot(mean, linestyle=line, marker=marker, color=color, label=name, linewidth=1.5)
    axes.fill_between(
        mean.index, mean - std, mean + std, color=color, alpha=0.08, linewidth=0
    )


def finish(axes: Axes, title: str, *, yscale: Any = "linear", xlabel: str = "epoch") -> None:
    axes.set(title=textwrap.fill(title, 32), yscale=yscale, xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
