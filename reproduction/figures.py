"""The figures of a study, some of them drawn after the paper's Figures 1 to 4."""

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from reproduction import replacing
from reproduction.presets import PAPER_ACCURACY, PRESETS
from reproduction.records import Table, by_epoch, table
from reproduction.statistics import differences
from reproduction.studies import ACCURACY, Outcome, Study, describe
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
OTHER = "#666666"
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
# Whose effect on the steps is drawn, as far as it was measured: four of them, in this order.
EFFECTS = (
    *("autoscale", "scaling", "centering", "zscore"),
    *("gradient_centralization", "gradient_normalization"),
)

Look = tuple[str, Any]  # color, and line as Matplotlib has it
Groups = Sequence[tuple[Any, Table]]  # title and runs
Paint = Callable[[Figure, Groups], None]


def draw(study: Study, runs: Table, found: Table, folder: Path) -> list[str]:
    """Draws all figures for which there are records, as PNG.

    Args:
      study: the study.
      runs: the table of those of its runs that exist.
      found: its differences.
      folder: where the files are written.

    Returns:
      The figures with their captions, in Markdown.
    """
    shown: list[str] = []

    def show(name: str, there: Groups, paint: Paint, title: str, caption: str) -> None:
        if there:
            with figure_of(folder / name, (1 + 3.2 * max(len(there), 1.5), 3)) as figure:
                paint(figure, there)
            shown.append(f"![{title}]({name}.png)\n\n*{title}{caption}*")

    runs = runs[runs["records"].map(len) > 0]
    runs = runs.assign(look=runs["arm"].map(looks_of(runs)))
    done = runs[runs["state"] == "finished"]
    known, outcome = found[found["value"].notna()] if len(found) else found, study.outcome
    text = f", with 95% intervals; dots are the seeds, the band is {outcome.within} on each side."
    title = f"Differences in {outcome.label}"
    show("differences", groups(known), partial(forests, outcome=outcome), title, text)
    # Repetitions on other devices have few runs, and are in the tables.
    runs, done = runs[runs["repeat"] == ""], done[done["repeat"] == ""]
    drawn = done
    if study.beside:
        other = table(PRESETS[study.beside], folder.parent / study.beside)
        other = other[(other["state"] == "finished") & (other["repeat"] == "")]
        drawn = pd.concat([done, other[other["method"].isin(done["method"])]])
    # Those of another study may have other arms.
    drawn = drawn.assign(arm=[describe(it, "method") for it in drawn["experiment"]])
    validated = runs["validation_size"].any()  # then test results are for chosen runs only
    for name in ("learning_rate", "weight_decay"):
        quantity = "Validation loss" if validated else "Test accuracy"
        title = f"{quantity} against the {name.replace('_', ' ')}"
        text = "; lines are means over seeds, dots the seeds."
        text += f" The runs of the study {study.beside} are among them." * bool(study.beside)
        show(name, varied(drawn, name), partial(against, name=name), title, text)
    runs, done = runs[runs["chosen"]], done[done["chosen"]]
    if study.preset:
        traced = done[done["method"] == "autoscale"]
        if (traced["dataset"] == "cifar10").any():  # as in the paper
            traced = traced[traced["dataset"] == "cifar10"]
        title = "Standard deviation of each layer's gradient under Autoscale"
        text = ", from the first layer (dark) to the last (bright); means over seeds."
        show("figure1", groups(traced), layers, title, text)
        title = "Global standard deviation of the gradients under Autoscale, and its factor"
        show("figure2", groups(traced), dynamics, title, SEEDS)
        text = ", of the standard deviations measured under Autoscale" + SEEDS
        show("figure3", groups(traced), exponents, "Factor with p = 2 and with p = 1", text)
        compared = done[done.groupby("group")["arm"].transform("nunique") > 1]
        title = "Test accuracy by epoch, minus the plain optimizer's"
        show("figure4", groups(compared), gains, title, SEEDS)
    else:
        show("curves", groups(runs), curves, "The runs by epoch", SEEDS)
    title = "Norm of the update relative to the plain optimizer's, in the first epoch"
    text = "; means over seeds. The other methods are in the table."
    show("effect", [each for each in groups(done) if affecting(each[1])], effects, title, text)
    return shown


def groups(rows: Table) -> Groups:
    """The groups of a table, by title."""
    return list(rows.groupby("group", sort=False)) if len(rows) else []


@contextlib.contextmanager
def figure_of(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw on, saved as `path` with the suffix png."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with replacing(path.with_suffix(".png")) as part:
            figure.savefig(part, format="png")


def looks_of(runs: Table) -> dict[str, Look]:
    """A color for the method of each arm, and a line; no two arms have the same."""
    looks: dict[str, Look] = {}
    for arm, method in zip(runs["arm"], runs["method"], strict=True):
        if arm not in looks:
            color = COLORS.get(method, OTHER)
            lines = LINES[1:] if method == "autoscale_p1" else LINES
            free = [line for line in lines if (color, line) not in looks.values()]
            looks[arm] = color, (free or lines)[0]
    return looks


def panels(figure: Figure, groups: Groups, ylabel: str) -> Iterator[tuple[Axes, str, Table]]:
    """Axes in a row for the groups, with one legend."""
    all_axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, runs) in zip(all_axes, groups, strict=True):
        yield axes, title, runs
    all_axes[0].set_ylabel(ylabel)
    common_legend(figure, all_axes)


def layers(figure: Figure, groups: Groups) -> None:
    """Figure 1: the standard deviation of each layer's gradient, by epoch."""
    for axes, title, runs in panels(figure, groups, "gradient std of each layer"):
        stds = np.array(
            [[list(r["layer_std"].values()) for r in records] for records in runs["records"]]
        )
        names = runs["records"].iloc[0][0]["layer_std"]
        means = dict(zip(names, stds.mean(0).T.tolist(), strict=True))
        plot_layers(figure, axes, list(range(1, stds.shape[1] + 1)), means)
        finish(axes, title, yscale="log")


def dynamics(figure: Figure, groups: Groups) -> None:
    """Figure 2: the global standard deviation, and below it the factor, by epoch."""
    figure.set_figheight(5.4)
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
    for axes, title, runs in panels(figure, groups, "scale factor $a_t$"):
        for exponent, look in ((2, (COLORS["autoscale"], "-")), (1, ("#0072B2", "--"))):
            factors = (4 / np.log(by_epoch(runs, "global_std")).abs()) ** exponent
            band(axes, factors, look, f"p = {exponent}")
        finish(axes, title)
        axes.set_ylim(0)


def gains(figure: Figure, groups: Groups) -> None:
    """Figure 4: the test accuracy by epoch, as the difference from the plain optimizer."""
    for axes, title, runs in panels(figure, groups, "test accuracy minus plain, points"):
        first = plain_arm(runs)
        plain = by_epoch(runs[runs["arm"] == first], "test_accuracy")
        axes.axhline(0, color="black", linewidth=0.8)
        for arm, each in runs[runs["arm"] != first].groupby("arm", sort=False):
            difference = 100 * (by_epoch(each, "test_accuracy") - plain).dropna()
            band(axes, difference, each["look"].iloc[0], str(arm))
        finish(axes, title)


def plain_arm(runs: Table) -> str:
    """The arm that the others are compared with."""
    plain = runs[runs["method"] == "none"]
    return (plain if len(plain) else runs)["arm"].iloc[0]


def curves(figure: Figure, groups: Groups) -> None:
    """What was recorded by epoch: a row for each group, a column for each quantity."""
    names = {
        "test_accuracy": "test accuracy, %",
        "test_loss": "test loss",
        "global_std": "global gradient std $s_t$",
        "scale_factor": "scale factor $a_t$",
        "update_norm_ratio": "update norm, relative to plain",
    }
    all_runs = pd.concat([runs for _, runs in groups])
    there = [name for name in names if by_epoch(all_runs, name).notna().any(axis=None)]
    figure.set_size_inches(1 + 3.2 * len(there), 0.6 + 2.4 * len(groups))
    grid = figure.subplots(len(groups), len(there), squeeze=False)
    for row, (title, runs) in zip(grid, groups, strict=True):
        for axes, name in zip(row, there, strict=True):
            for arm, each in runs.groupby("arm", sort=False):
                values = by_epoch(each, name).dropna(how="all")
                if len(values):
                    percent = 100 if name == "test_accuracy" else 1
                    band(axes, percent * values, each["look"].iloc[0], str(arm))
            finish(axes, "", yscale="log" if name == "global_std" else "linear")
            axes.set_ylabel(names[name])
        row[0].set_title(title, loc="left")
    common_legend(figure, list(grid.flat))


def varied(runs: Table, name: str) -> Groups:
    """The runs among which an option has several values, by title."""
    other = "weight_decay" if name == "learning_rate" else "learning_rate"
    found = []
    keys = ["dataset", "optimizer", "model", "epochs", other]
    for _, each in runs.groupby(keys, sort=False):
        if each[name].nunique() > 1:
            it = each["experiment"].iloc[0]
            words = ["model", "dataset", "optimizer", *[other] * (runs[other].nunique() > 1)]
            found.append((", ".join(describe(it, key) for key in words), each))
    return found


def against(figure: Figure, groups: Groups, name: str) -> None:
    """The accuracy, or the validation loss, against an option; dots are seeds, a line a method."""
    validated = groups[0][1]["validation_loss"].notna().any()
    column, label = "accuracy", "test accuracy, %"
    if validated:
        column, label = "validation_loss", "validation loss"
    for axes, title, runs in panels(figure, groups, label):
        for method, each in runs.groupby("method", sort=False):
            color = COLORS.get(str(method), OTHER)
            line = "--" if method == "autoscale_p1" else "-"
            means = each.groupby(name)[column].mean()
            axes.plot(
                means, line, marker="_", color=color, label=each["arm"].iloc[0], linewidth=1.5
            )
            axes.plot(each[name], each[column], "o", color=color, markersize=3, alpha=0.6)
        ticks = sorted(set(runs[name]))
        smallest = min(tick for tick in ticks if tick > 0)
        axes.set_xscale("symlog", linthresh=smallest) if ticks[0] == 0 else axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        if validated:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.set(title=textwrap.fill(title, 32), xlabel=name.replace("_", " "))


def affecting(runs: Table) -> list[str]:
    """The arms whose effect is drawn, with its first epoch recorded by step."""
    measured = [
        (EFFECTS.index(method), arm)
        for arm, method, records in zip(runs["arm"], runs["method"], runs["records"], strict=True)
        if method in EFFECTS and records[0]["update_norm_ratio_by_step"]
    ]
    return list(dict.fromkeys(arm for _, arm in sorted(measured)))[:4]


def effects(figure: Figure, groups: Groups) -> None:
    """The ratio of norms by step of the first epoch, and method."""
    for axes, title, runs in panels(figure, groups, "norm, relative to plain"):
        axes.axhline(1, color="black", linewidth=0.8)
        for arm in affecting(runs):
            there = runs[runs["arm"] == arm]
            ratios = [records[0]["update_norm_ratio_by_step"] for records in there["records"]]
            mean, (color, line) = np.mean(ratios, axis=0), there["look"].iloc[0]
            steps = np.arange(1, len(mean) + 1)
            axes.plot(steps, mean, linestyle=line, color=color, label=arm, linewidth=1.2)
        finish(axes, title, xlabel="step")


def forests(figure: Figure, groups: Groups, outcome: Outcome) -> None:
    """The differences of each group, one below the other."""
    heights = [len(rows) + 1.4 for _, rows in groups]
    figure.set_size_inches(7, 0.5 + 0.24 * sum(heights))
    grid = figure.subplots(
        len(groups), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    for axes, (title, rows) in zip(grid[:, 0], groups, strict=True):
        forest(axes, rows, list(rows["label"]), outcome.margin)
        axes.set_title(title, loc="right")  # it may be wider than the axes
    grid[-1, 0].set_xlabel(f"{outcome.unit}s of {outcome.label}")


def forest(axes: Axes, rows: Table, labels: Sequence[str], margin: float = ACCURACY.margin) -> None:
    """Differences with their intervals and seeds."""
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvspan(-margin, margin, color="black", alpha=0.07, linewidth=0)
    for place, (_, row) in enumerate(rows.iterrows()):
        ours = row["label"].startswith("Autoscale minus")
        color = COLORS["autoscale" if ours else "none"]
        seeds = row["by_seed"].round(6)  # as `differences` rounds
        axes.plot(seeds, [place] * len(seeds), "o", color=color, markersize=2.5, alpha=0.4)
        axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=1.5)
        axes.plot(row["value"], place, "o", color=color, markersize=5)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def draw_verdict(results: Path) -> None:
    """Draws `verdict.png`, if there are records: Autoscale on CIFAR-100, and below it on digits."""
    found = {}
    for name in ("cifar100", "cifar100-rates", "digits"):
        rows = differences(PRESETS[name], table(PRESETS[name], results / name))
        rows = rows[(rows["repeat"] == "") & rows["low"].notna()]
        rows = rows[rows["label"].str.startswith("Autoscale minus")]
        found[name] = rows[~rows["label"].str.contains("midpoint|Normalization|Centralization")]
    plain, tuned, digits = found.values()
    if plain.empty or digits.empty:
        return
    tuned = tuned[tuned["kind"] == "primary"]
    cifar100 = pd.concat([plain[:1], tuned, plain[1:]])
    rates = cifar100["group"].str.extract("fresh(.*)", expand=False).fillna("")
    names = cifar100["label"].str.removeprefix("Autoscale ") + rates
    ours = (cifar100, digits)
    with figure_of(results / "verdict", (6.9, 3.9)) as figure:
        above, below = figure.subplots(
            2, 1, sharex=True, gridspec_kw={"height_ratios": [len(rows) + 1 for rows in ours]}
        )
        forest(above, cifar100, list(names + [f" ({n} seeds)" for n in cifar100["n"]]))
        paper = PAPER_ACCURACY["resnet20"]
        claimed = paper["autoscale"] - paper["none"]
        above.plot(claimed, 0, "D", color="black", fillstyle="none")
        above.annotate("the paper,\n200 epochs", (claimed + 0.15, 0), va="center", fontsize=7)
        above.set_title("Autoscale on CIFAR-100, ResNet-20, 20 epochs", loc="left")
        networks = digits["group"].str.partition(" on ")[0]
        forest(below, digits, [f"{name}, minus AdamW" for name in networks])
        below.set_title("Autoscale on digits, 10 epochs", loc="left")
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


def band(axes: Axes, values: Table, look: Look, name: str = "") -> None:
    """Draws the mean over the rows by column, and the standard deviation around it."""
    (color, line), mean, std = look, values.mean(), values.std().fillna(0)
    marker = "o" if len(mean) == 1 else ""
    axes.plot(mean, linestyle=line, marker=marker, color=color, label=name, linewidth=1.5)
    axes.fill_between(mean.index, mean - std, mean + std, color=color, alpha=0.08, linewidth=0)


def finish(axes: Axes, title: str, *, yscale: Any = "linear", xlabel: str = "epoch") -> None:
    axes.set(title=textwrap.fill(title, 32), yscale=yscale, xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
