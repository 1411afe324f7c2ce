"""The report of a study: its tables, from the records alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower

from reproduction import figures
from reproduction.files import replacing
from reproduction.groups import Group, group
from reproduction.studies import PAPER_ACCURACY, STUDIES, Run, read
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS, method_label

LEVEL = 0.05  # of significance, over all comparisons of a study together
POWER = 0.8


class Comparison(NamedTuple):
    """The difference of a method's mean accuracy to that of the plain optimizer, in points."""

    group: Group
    method: str
    difference: float
    low: float  # of its 95 % confidence interval
    high: float
    p_value: float  # Welch's test
    corrected: float  # by Holm, over all comparisons of the study


def write_report(preset: str, folder: Path) -> None:
    """Writes `REPORT.md` and the figures of the finished runs in a study's folder.

    The result depends on the records alone, to the byte; that of the figures on the version of
    Matplotlib as well.

    Args:
      preset: the study's name.
      folder: where its records are, and the report goes.

    Raises:
      ValueError: if there is no record in the folder, or a file that is none.
    """
    runs = list(read(folder).values())
    if not runs:
        raise ValueError(
            f"{folder} holds no records; make them with reproduce.py --preset {preset}"
        )
    study, groups = STUDIES[preset], group(runs)
    pictures = figures.draw(groups, folder)
    comparisons = compare(groups)
    sections = [
        f"# {study.title}\n\n{summary(preset, runs)}",
        "## Test accuracy after the last epoch\n\n"
        + "\n\n".join(accuracy_table(each, comparisons) for each in groups),
        f"## What the records support\n\n{conclusions(groups, comparisons)}",
        f"## Time per step\n\n{time_table(groups)}",
    ]
    if exponents := exponent_rows(groups):
        header = ["runs", "method", "$p_t$ of each seed, in order"]
        sections.append(f"## Exponents\n\n{table(header, exponents)}")
    if pictures:
        shown = [
            f"![{caption}]({name}.png)\n\n*{caption} Scale: {study.scale}.*"
            for name, caption in pictures
        ]
        sections.append("\n\n".join(["## Figures", *shown]))
    with replacing(folder / "REPORT.md") as part:
        part.write_text("\n\n".join(sections) + "\n")


def compare(groups: Sequence[Group]) -> list[Comparison]:
    """Every method with the plain optimizer, where both have runs enough."""
    tested = []
    for each in groups:
        for method in each.runs:
            if method == "none" or "none" not in each.runs:
                continue
            ours, plain = accuracies(each, method), accuracies(each, "none")
            if min(len(ours), len(plain)) < 2 or ours.std() + plain.std() == 0:
                continue
            test: Any = stats.ttest_ind(ours, plain, equal_var=False)
            interval = test.confidence_interval(0.95)
            difference = ours.mean() - plain.mean()
            tested.append((each, method, difference, interval.low, interval.high, test.pvalue))
    corrected: Any = []
    if tested:
        _, corrected, *_ = multipletests([row[-1] for row in tested], method="holm")
    return [
        Comparison(*row, corrected=p_value) for row, p_value in zip(tested, corrected, strict=True)
    ]


def summary(preset: str, runs: Sequence[Run]) -> str:
    """What was run, how much of it, and on what."""
    study = STUDIES[preset]
    count = len(study.experiments())

    def every(key: str) -> str:
        return ", ".join(sorted({str(run.description[key]) for run in runs}))

    versions = sorted(
        {
            ", ".join(
                f"{package} {run.description['versions'][package]}"
                for package in ("python", "jax", "flax", "optax")
            )
            for run in runs
        }
    )
    hours = sum(record["seconds"] for run in runs for record in run.records) / 3600
    recipes = {
        (
            DATASETS[it.dataset].label,
            it.epochs,
            it.batch_size,
            it.learning_rate,
            OPTIMIZERS[it.optimizer].label,
            it.decay_epochs,
        )
        for it in (run.experiment for run in runs)
    }
    lines = [
        f"Scale: {study.scale}. {len(runs)} runs; the study has {count}.",
        "",
        *(
            f"- {dataset}: {epochs} epochs, batches of {size}, {optimizer} at a rate of "
            f"{rate:g}, times 0.75 every {decay:g} epochs."
            for dataset, epochs, size, rate, optimizer, decay in sorted(recipes)
        ),
        f"- Device: {every('device_count')} x {every('device')}; {hours:.1f} hours of training and "
        "evaluation in all.",
        *(f"- {text[0].upper()}{text[1:]}." for text in versions),
        f"- Commit: {every('commit')}.",
        "",
        "```sh",
        f"python reproduce.py --preset {preset}  # makes the runs that are missing",
        f"python reproduce.py --preset {preset} --report  # this page, from the records beside it",
        "python reproduce.py --preset paper  # the paper's own scale",
        "```",
    ]
    return "\n".join(lines)


def accuracy_table(each: Group, comparisons: Sequence[Comparison]) -> str:
    """The group's accuracies, beside the paper's where it has any."""
    papers = PAPER_ACCURACY.get(each.model, {}) if each.optimizer == "adamw" else {}
    papers = {method: papers.get(method) for method in each.runs}
    with_paper = each.dataset != "cifar10" and all(papers.values())
    plain = method_label("none", each.optimizer)
    header = [
        "method",
        *(["paper (CIFAR-100)"] if with_paper else []),
        "mean",
        "std",
        "n",
        "95 % interval",
    ]
    header += [f"difference to {plain}", "Welch p", "Holm p"]
    rows = []
    for method in each.runs:
        ours = accuracies(each, method)
        found = [c for c in comparisons if c.group is each and c.method == method]
        row = [method_label(method, each.optimizer)]
        row += [number(papers[method])] if with_paper else []
        row += [number(ours.mean() if len(ours) else None)]
        row += [number(ours.std(ddof=1) if len(ours) > 1 else None), str(len(ours))]
        row += [interval(*mean_interval(ours))]
        if found:
            (test,) = found
            row += [f"{test.difference:+.2f} ({interval(test.low, test.high, sign=True)})"]
            row += [p_text(test.p_value), p_text(test.corrected)]
        else:
            row += ["-"] * 3
        rows.append(row)
    text = f"**{each.title}**, top-1 test accuracy in %\n\n{table(header, rows)}"
    diverged = [
        f"{method_label(method, each.optimizer)}, seed {run.experiment.seed}: "
        f"{run.description['diverged'].partition(';')[0]}"
        for method, runs in each.runs.items()
        for run in runs
        if run.description["diverged"]
    ]
    return "\n\nDiverged, and not in the table: ".join(
        [text, *(["; ".join(diverged)] * bool(diverged))]
    )


def conclusions(groups: Sequence[Group], comparisons: Sequence[Comparison]) -> str:
    """Which differences hold after the correction, and how large one had to be to be seen."""
    lines = [
        "Welch's t-test of each method with the plain optimizer, two-sided; Holm's correction over "
        f"the {len(comparisons)} comparisons of this page; supported means corrected p < {LEVEL}."
        if comparisons
        else "One run each: nothing can be tested, and no difference is claimed."
    ]
    for each in groups:
        tests = [test for test in comparisons if test.group is each]
        if not tests:
            continue
        supported = [test for test in tests if test.corrected < LEVEL]
        plain = method_label("none", each.optimizer)
        if supported:
            found = "; ".join(
                f"{method_label(test.method, each.optimizer)} is "
                f"{'above' if test.difference > 0 else 'below'} {plain} by "
                f"{abs(test.difference):.2f} points"
                for test in supported
            )
            rest = "" if len(supported) == len(tests) else "; the other differences are not"
            text = f"supported: {found}{rest}."
        else:
            text = f"no difference to {plain} is supported."
        lines.append(f"- {each.title}: {text} {detectable(each, len(comparisons))}")
    return "\n".join([lines[0], "", *lines[1:]]).strip()


def detectable(each: Group, comparisons: int) -> str:
    """The smallest difference that would probably have been found, in words."""
    samples = [values for method in each.runs if len(values := accuracies(each, method)) > 1]
    count = min(map(len, samples))
    spread = math.sqrt(np.mean([values.var(ddof=1) for values in samples]))
    effect = TTestIndPower().solve_power(
        nobs1=count, alpha=LEVEL / comparisons, power=POWER, alternative="two-sided"
    )
    return (
        f"With {count} seeds and the spread seen here (standard deviation {spread:.2f}), a true "
        f"difference of {effect * spread:.1f} points would be found with a probability of "
        f"{POWER:.0%}, a smaller one less often."
    )


def exponent_rows(groups: Sequence[Group]) -> list[list[str]]:
    """The exponents that the first step of each run decided on."""
    return [
        [
            each.title,
            method_label(method, each.optimizer),
            " ".join(str(run.records[-1]["exponent"]) if run.records else "-" for run in runs),
        ]
        for each in groups
        for method, runs in each.runs.items()
        if any(run.records and run.records[-1]["exponent"] is not None for run in runs)
    ]


def time_table(groups: Sequence[Group]) -> str:
    """Milliseconds of a step by method: medians over the epochs of all seeds."""
    methods = [method for method in METHODS if any(method in g.runs for g in groups)]
    rows = []
    for method in methods:
        row = [METHODS[method].label]
        for each in groups:
            times = {
                name: np.median(
                    [
                        1000 * run.experiment.batch_size / record["images_per_second"]
                        for run in each.runs.get(name, ())
                        for record in run.records
                    ]
                    or [math.nan]
                )
                for name in (method, "none")
            }
            ratio = times[method] / times["none"]
            row.append("-" if math.isnan(ratio) else f"{times[method]:.0f} ms (x{ratio:.2f})")
        rows.append(row)
    return (
        "Medians over all epochs, with the ratio to the plain optimizer, as the machine gave them; "
        "other work may have run beside it. `benchmarks/overhead.py` compares the methods "
        "fairly.\n\n" + table(["method", *(each.title for each in groups)], rows)
    )


def accuracies(each: Group, method: str) -> np.ndarray:
    """Final test accuracies in percent, of shape `(seeds,)`; diverged runs are left out."""
    return np.array([100 * run.records[-1]["test_accuracy"] for run in each.finished(method)])


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % confidence interval of the mean, by Student's t."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return values.mean() - half, values.mean() + half


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def interval(low: float, high: float, *, sign: bool = False) -> str:
    form = "+.2f" if sign else ".2f"
    return "-" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
