"""The report of a study: its tables, from the records alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reproduction import figures, inference, markdown
from reproduction.contrasts import STRONGER, Contrast, Family, Kind, families
from reproduction.files import replacing
from reproduction.groups import Arm, Group, group
from reproduction.inference import ALPHA, MARGIN, POWER, Comparison
from reproduction.studies import PAPER_ACCURACY, STUDIES, Run, read
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS

# Studies whose tests were chosen before their first run.
FIXED_BEFORE = ("cifar100", "cifar100-gpu", "paper")
TEST_IMAGES = {"digits": 360, "cifar10": 10_000, "cifar100": 10_000}


def write_report(preset: str, folder: Path) -> None:
    """Writes `REPORT.md` and the figures of the finished runs in a study's folder.

    The text depends only on the records, the figures also on the version of Matplotlib.

    Args:
      preset: the study's name.
      folder: contains its records; the report is written there too.

    Raises:
      ValueError: if there is no record in the folder, or a file that is not a record.
    """
    runs = list(read(folder).values())
    if not runs:
        raise ValueError(
            f"{folder} holds no records; make them with reproduce.py --preset {preset}"
        )
    study, groups = STUDIES[preset], group(STUDIES[preset], runs)
    compared = families(preset, groups)
    groups = [each for each in groups if each.shown]
    sections = {
        f"# {study.title}": summary(preset, runs),
        "## The plan": study.plan,
        "## Test accuracy after the last epoch": accuracy_section(groups),
        "## Differences": difference_section(compared, preset in FIXED_BEFORE),
        "## What each method did to the plain optimizer's steps": effect_section(groups),
        "## Secondary outcomes": secondary_section(groups) if study.plan else "",
        "## Time per step": time_section(groups),
        "## Exponents": exponent_section(groups),
        "## Figures": figure_section(groups, folder, study.scale),
    }
    text = "\n\n".join(f"{title}\n\n{section}" for title, section in sections.items() if section)
    with replacing(folder / "REPORT.md") as part:
        part.write_text(text + "\n")


def summary(preset: str, runs: Sequence[Run]) -> str:
    """What was run, how much of it, and on which devices."""
    study, planned = STUDIES[preset], STUDIES[preset].experiments()
    names = {run.experiment.name for run in runs}
    there = sum(experiment.name in names for experiment in planned)
    state = f"All {len(planned)} planned runs are in."
    if there < len(planned):
        state = (
            f"{there} of the {len(planned)} planned runs are in. A difference is tested once all "
            "runs that its test needs are in."
        )
    if more := len(runs) - there:
        state += f" {markdown.count(more, 'run')} beyond the plan are shown but not compared."
    versions = {
        ", ".join(
            f"{package} {run.description['versions'][package]}"
            for package in ("python", "jax", "flax", "optax")
        )
        for run in runs
    }
    recipes = {
        f"{DATASETS[it.dataset].label}: {markdown.count(it.epochs, 'epoch')}, batches of "
        f"{it.batch_size}, {OPTIMIZERS[it.optimizer].label} with learning rate "
        f"{it.learning_rate:g}, multiplied by 0.75 every {it.decay_epochs:g} epochs."
        for it in (run.experiment for run in runs)
    }
    devices = {f"{run.description['device_count']} x {run.description['device']}" for run in runs}
    hours = sum(record["seconds"] for run in runs for record in run.records) / 3600
    commits = {short(run.description["commit"]) for run in runs}
    lines = [
        *sorted(recipes),
        f"Devices: {', '.join(sorted(devices))}; {hours:.1f} hours of training and evaluation.",
        *(f"{each.capitalize()}." for each in sorted(versions)),
        f"Commit: {', '.join(sorted(commits))}.",
    ]
    commands = [
        f"python reproduce.py --preset {preset}  # run what is missing",
        f"python reproduce.py --preset {preset} --report  # this page, from the records beside it",
    ]
    if preset != "paper":
        commands.append("python reproduce.py --preset paper  # the paper's own scale")
    return "\n\n".join(
        [
            f"Scale: {study.scale}. {state}",
            "\n".join(f"- {line}" for line in lines),
            "\n".join(["```sh", *commands, "```"]),
        ]
    )


def short(commit: str | None) -> str:
    """An abbreviated commit id.

    >>> short("f2f4ca1a5ec737719d3260e2e7f02ed80c563a95-dirty")
    'f2f4ca1-dirty'
    """
    name, mark, dirty = str(commit).partition("-")
    return name[:7] + mark + dirty


def accuracy_section(groups: Sequence[Group]) -> str:
    """The accuracies of each method, beside the paper's where there are any."""
    images = {
        f"{DATASETS[each.dataset].label} has {TEST_IMAGES[each.dataset]:,} test images, "
        f"{100 / TEST_IMAGES[each.dataset]:.2f} points each."
        for each in groups
    }
    intro = "In %: mean ± standard deviation, number of runs, 95% interval of the mean."
    parts = [" ".join([intro, *sorted(images)])]
    for each in groups:
        papers = PAPER_ACCURACY.get(each.model, {}) if each.optimizer == "adamw" else {}
        if each.dataset == "cifar10" or {arm.method for arm in each.shown.values()} - set(papers):
            papers = {}
        rows = []
        for arm in each.shown.values():
            values = [100 * run.records[-1]["test_accuracy"] for run in arm.finished]
            row = [arm.label, markdown.spread(values), str(len(values))]
            row.append(markdown.between(*inference.mean(values).interval()))
            rows.append([*row, f"{papers[arm.method]:.2f}"] if papers else row)
        header = ["method", "accuracy", "n", "95% interval"]
        header += ["paper, CIFAR-100"] if papers else []
        parts.append(f"**{each.title}**\n\n{markdown.table(header, rows)}")
    diverged = [
        f"- {each.title}, {arm.label}, seed {seed}: {run.description['diverged'].partition(';')[0]}"
        for each in groups
        for arm in each.shown.values()
        for seed, run in arm.runs.items()
        if run.description["diverged"]
    ]
    if diverged:
        parts.append("\n".join(["Diverged, and not in these means:", "", *diverged]))
    return "\n\n".join(parts)


def difference_section(compared: Sequence[Family], fixed_before: bool) -> str:
    """The differences by family, and the conclusions from them."""
    parts = [
        "Differences are taken within seeds: methods share initial parameters and batches. A "
        "linear model of seed and method gives them, with one residual variance for the methods "
        "of a table. *Detectable* is the true difference that the test finds with a probability "
        f"of {POWER:.0%}. Welch's interval ignores the pairing, and is descriptive."
    ]
    if not fixed_before:
        parts[0] += " This analysis was chosen after the study was first run."
    for family in compared:
        text = {
            "primary": f"One test, at {ALPHA:g}.",
            "family": f"One family of {markdown.count(len(family.contrasts), 'test')}, with Holm's "
            f"correction at {ALPHA:g}.",
            "descriptive": "Descriptive, not tested.",
            "exploratory": "Exploratory: neither planned nor tested.",
        }[family.kind]
        parts.append(f"### {family.title}\n\n{text}")
        groups = {each.group.title: each.group for each in family.contrasts}
        for title, each in groups.items():
            contrasts = [contrast for contrast in family.contrasts if contrast.group is each]
            parts += [f"**{title}**", *difference_table(contrasts)]
            if words := conclusion(family.kind, contrasts):
                parts.append(words)
    return "\n\n".join(parts)


def difference_table(contrasts: Sequence[Contrast]) -> list[str]:
    """The contrasts of a family in one group; nothing while their runs are missing."""
    contrasts = [each for each in contrasts if not each.comparison.missing]
    tested = any(np.isfinite(each.corrected) for each in contrasts)
    several = any(each.family > 1 for each in contrasts)
    rows = []
    for each in contrasts:
        row = [" minus ".join(each.labels), difference(each.comparison)]
        if tested:
            p_values = (each.comparison.p_value, each.corrected)[: 1 + several]
            row.append(", ".join(map(markdown.p_value, p_values)))
            detectable = each.comparison.estimate.detectable(ALPHA / each.family)
            known = not any(each.comparison.diverged) and np.isfinite(detectable)
            row.append(f"{detectable:.1f}" if known else "-")
        arms = each.group.accuracies((each.method, each.baseline))
        welch = inference.welch(arms, each.method, each.baseline)
        rows.append([*row, markdown.between(welch.low, welch.high, "+z.2f")])
    header = ["in points", "difference (95% interval)"]
    header += ["p, Holm" if several else "p", "detectable"] if tested else []
    return [markdown.table([*header, "Welch's 95% interval"], rows)] if rows else []


def difference(comparison: Comparison) -> str:
    """A difference with its interval; or, if runs diverged, how often each method is above."""
    estimate = comparison.estimate
    if any(comparison.diverged):
        return (
            f"diverged: {comparison.diverged[0]} and {comparison.diverged[1]}; above in "
            f"{comparison.above}, below in {comparison.below} of "
            f"{markdown.count(comparison.above + comparison.below + comparison.ties, 'seed')}"
        )
    if np.isnan(estimate.standard_error):
        known = np.isfinite(estimate.value)
        return f"{estimate.value:+z.2f} ({markdown.count(estimate.n, 'seed')})" if known else "-"
    return f"{estimate.value:+z.2f} ({markdown.between(*estimate.interval(), '+z.2f')})"


def conclusion(kind: Kind, contrasts: Sequence[Contrast]) -> str:
    """The conclusions from the contrasts of a family in one group, in words."""
    first = contrasts[0]
    if kind == "primary":
        return inference.in_words(first.comparison, *first.labels)
    if not first.family:
        sentences = [nearer(first.group)] if STRONGER in first.group.arms else []
        sentences += [more(each) for each in contrasts if each.method == "none x4"]
        return " ".join(filter(None, sentences))
    if missing := first.comparison.missing:
        return f"{markdown.count(missing, 'planned run')} missing; the tests wait for them."
    tested = [each for each in contrasts if np.isfinite(each.corrected)]
    if not tested:
        return "Nothing can be tested, and no difference is claimed."
    claimed = [
        f"{each.labels[0]} {side(each)} {each.labels[1]}" for each in tested if each.significant
    ]
    diverged = [each for each in tested if any(each.comparison.diverged)]
    sentences = ["No significant difference" + (" where all runs finished." if diverged else ".")]
    if claimed:
        sentences = [f"**Significant: {'; '.join(claimed)}.**"]
    if close := [" and ".join(each.labels) for each in tested if each.equivalent]:
        margin = markdown.count(int(MARGIN), "point")
        sentences.append(f"Equivalent within {margin}: {'; '.join(close)}.")
    sentences += [
        inference.in_words(each.comparison, *each.labels, corrected=each.corrected)
        for each in diverged
    ]
    return " ".join(sentences)


def side(contrast: Contrast) -> str:
    """On which side of the baseline a method is."""
    comparison = contrast.comparison
    if any(comparison.diverged):
        return "above" if comparison.above > comparison.below else "below"
    return "above" if comparison.estimate.value > 0 else "below"


def nearer(each: Group) -> str:
    """Whether `autoscale` is nearer to the plain or to the stronger penalty.

    It is nearer to the stronger one if it lies on that one's side of their midpoint: both the side
    and which of the two penalties lies there must be known.
    """
    arms = each.accuracies(each.arms)
    middle = {"autoscale": 1.0, "none": -0.5, STRONGER: -0.5}
    estimate = inference.linear_contrast(arms, middle)
    apart = inference.linear_contrast(arms, {STRONGER: 1, "none": -1})
    low, high = estimate.interval()
    if np.isnan(low):
        return ""
    plain, stronger = each.arms["none"].label, each.arms[STRONGER].label
    text = (
        f"Autoscale minus the midpoint of {plain} and {stronger} is {estimate.value:+z.2f} points "
        f"(95% interval {markdown.between(low, high, '+z.2f')}, "
        f"{markdown.count(estimate.n, 'seed')}): "
    )
    if low < 0 < high:
        return f"{text}these runs do not show which of the two it is nearer to."
    if apart.interval()[0] <= 0 <= apart.interval()[1]:
        place = "above" if estimate.value > 0 else "below"
        return (
            f"{text}it is {place} the midpoint, but these runs do not show which of the two "
            "penalties gives more, and so not which of them it is nearer to."
        )
    close = "stronger" if estimate.value * apart.value > 0 else "plain"
    return f"{text}it is nearer to the {close} penalty."


def more(contrast: Contrast) -> str:
    """Whether a still stronger penalty gives more; empty if runs are missing or diverged."""
    low, high = contrast.comparison.estimate.interval()
    if np.isnan(low) or any(contrast.comparison.diverged):
        return ""
    further, stronger = contrast.labels
    if low <= 0 <= high:
        return f"Whether {further} gives more than {stronger} is not shown."
    return f"{further} gives {'more' if low > 0 else 'less'} than {stronger}."


def effect_section(groups: Sequence[Group]) -> str:
    """How the methods' updates differ from the plain optimizer's."""
    parts = []
    for each in groups:
        rows = [
            [
                arm.label,
                *(
                    f"{values[0]:.3f}, {values[-1]:.3f}, {values.mean():.3f}"
                    for values in effect(arm)
                ),
            ]
            for arm in measured(each)
        ]
        if rows:
            header = ["method", "ratio of norms", "cosine", "1 - cosine²"]
            parts.append(f"**{each.title}**\n\n{markdown.table(header, rows)}")
    if not parts:
        return ""
    intro = (
        "The actual update, compared with the plain optimizer's on the same gradients: in the "
        "first epoch, in the last, and the mean over epochs; means over seeds. 1 - cosine² is the "
        "share of the squared update that no learning rate explains. Both sides include the weight "
        "decay."
    )
    return "\n\n".join([intro, *parts])


def effect(arm: Arm) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By epoch, means over seeds: ratio of norms, cosine, and 1 - cosine²."""
    ratios = figures.values(arm.finished, "update_norm_ratio")
    cosines = figures.values(arm.finished, "update_cosine")
    return ratios.mean(0), cosines.mean(0), (1 - cosines**2).mean(0)


def measured(each: Group) -> list[Arm]:
    """The arms whose effect was recorded; the plain optimizer has none."""
    return [
        arm
        for arm in each.shown.values()
        if arm.method != "none" and arm.finished
        if all(run.records[-1]["update_norm_ratio"] is not None for run in arm.finished)
    ]


def secondary_section(groups: Sequence[Group]) -> str:
    """Descriptive outcomes."""
    parts = ["Descriptive, not tested: mean ± standard deviation over the runs that finished."]
    for each in groups:
        rows = [
            [
                arm.label,
                markdown.spread([run.records[-1]["test_loss"] for run in arm.finished], 3),
                markdown.spread(
                    [
                        100
                        * float(np.mean([record["test_accuracy"] for record in run.records[-3:]]))
                        for run in arm.finished
                    ]
                ),
            ]
            for arm in each.shown.values()
        ]
        header = ["method", "test loss", "accuracy, last three epochs"]
        parts.append(f"**{each.title}**\n\n{markdown.table(header, rows)}")
    return "\n\n".join(parts)


def time_section(groups: Sequence[Group]) -> str:
    """Milliseconds of a step by method: medians over the epochs of all seeds."""

    def median(each: Group, key: str) -> float:
        times = [
            1000 * run.experiment.batch_size / record["images_per_second"]
            for run in (each.arms[key].runs.values() if key in each.arms else ())
            if not run.experiment.effect  # measuring it takes time of its own
            for record in run.records
        ]
        return float(np.median(times)) if times else np.nan

    keys = {key: arm for each in groups for key, arm in each.shown.items()}
    rows = []
    for method, spec in METHODS.items():
        if method in keys:
            row = ["the plain optimizer" if method == "none" else spec.label]
            for each in groups:
                time = median(each, method)
                ratio = f" (x{time / median(each, 'none'):.2f})" if "none" in each.arms else ""
                row.append("-" if np.isnan(time) else f"{time:.0f} ms{ratio}")
            rows.append(row)
    if all(cell == "-" for row in rows for cell in row[1:]):
        return ""
    return (
        "Medians over all epochs, with the ratio to the plain optimizer, as recorded; other "
        "programs may have run at the same time. `benchmarks/overhead.py` compares the methods "
        "fairly. Runs with a measured effect are left out.\n\n"
        + markdown.table(["method", *(each.title for each in groups)], rows)
    )


def exponent_section(groups: Sequence[Group]) -> str:
    """The exponents that the first step of each run decided."""
    rows = [
        [
            each.title,
            arm.label,
            " ".join(
                str(run.records[-1]["exponent"]) if run.records else "-"
                for run in arm.runs.values()
            ),
        ]
        for each in groups
        for arm in each.shown.values()
        if any(run.records and run.records[-1]["exponent"] is not None for run in arm.runs.values())
    ]
    return markdown.table(["runs", "method", "$p_t$ of each seed, in order"], rows) if rows else ""


def figure_section(groups: Sequence[Group], folder: Path, scale: str) -> str:
    """Draws the figures, and shows them."""
    shown = [
        f"![{title}]({name}.png)\n\n*{title}{rest}*"
        for name, title, rest in figures.draw(groups, folder)
    ]
    return "\n\n".join([f"All at the same scale: {scale}.", *shown]) if shown else ""
