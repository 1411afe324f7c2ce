"""The report of a study: its tables and captions, from the records alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reproduction import figures
from reproduction.presets import PAPER_ACCURACY
from reproduction.records import by_epoch, replacing, table
from reproduction.statistics import ALPHA, MARGIN, POWER, TESTED, differences, mean_interval
from reproduction.studies import Study
from training.data import DATASETS
from training.optimizers import OPTIMIZERS

TEST_IMAGES = {"digits": 360, "cifar10": 10_000, "cifar100": 10_000}


def write_report(study: Study, folder: Path) -> tuple[str, pd.DataFrame]:
    """Writes `REPORT.md` and the figures of the runs in a study's folder.

    The text depends only on the records, the figures also on the version of Matplotlib.

    Args:
      study: the study.
      folder: contains its records; the report is written there too.

    Returns:
      The text without its figures, and the table of runs.

    Raises:
      ValueError: if there is no record in the folder, or a file that is not a record.
    """
    runs = table(study, folder)
    if (runs["state"] == "missing").all():
        raise ValueError(f"{folder} holds no records; make them without --report")
    found = differences(study, runs)
    shown = runs[runs["state"] != "missing"]
    sections = {
        f"# {study.title}": summary(study, runs, folder),
        "## The plan": study.plan,
        "## Runs": runs_section(shown) if study.runs else "",
        "## Test accuracy after the last epoch": accuracy_section(shown),
        "## Differences": difference_section(study, found),
        "## What each method did to the plain optimizer's steps": effect_section(shown),
        "## Time per step": time_section(shown),
        "## Exponents": exponent_section(shown),
    }
    text = together(sections)
    pictures = figures.draw(study, runs, found, folder)
    scale = f"All at the same scale: {study.scale}."
    drawn = together({"## Figures": "\n\n".join([scale, *map(str, pictures)]) if pictures else ""})
    with replacing(folder / "REPORT.md") as part:
        part.write_text("\n\n".join(filter(None, [text, drawn])) + "\n")
    return text, runs


def together(sections: dict[str, str]) -> str:
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items() if text)


def summary(study: Study, runs: pd.DataFrame, folder: Path) -> str:
    """What was run, how much of it, and on which devices."""
    there = runs[runs["state"] != "missing"]
    recipes = {
        f"{DATASETS[it.dataset].label}: {count(it.epochs, 'epoch')}, batches of "
        f"{it.batch_size}, {OPTIMIZERS[it.optimizer].label} with learning rate "
        f"{it.learning_rate:g}, multiplied by 0.75 every {it.decay_epochs:g} epochs."
        for it in there["experiment"]
    }
    rows = []
    for _, each in runs.groupby("repeat"):
        made = each[each["state"] != "missing"]
        devices = zip(made["device_count"], made["device"], strict=True)
        hours = sum(record["seconds"] for records in made["records"] for record in records) / 3600
        row = [listed(f"{number:g} x {device}" for number, device in devices)]
        row += [str(int(made["planned"].sum())), str(int(each["planned"].sum())), f"{hours:.1f}"]
        for package in ("python", "jax", "flax", "optax"):
            row.append(listed(versions[package] for versions in made["versions"]))
        rows.append([*row, listed(map(short, made["commit"]))])
        if more := int((~made["planned"]).sum()):
            recipes.add(f"{count(more, 'run')} beyond the plan: shown, not compared.")
    header = ["device", "runs", "planned", "hours", "Python", "jax", "flax", "optax", "commit"]
    options = f"--preset {study.name}" if study.preset else f"--name {study.name}"
    if study.preset and folder.parent.name == "results":
        options += " --results results"
    commands = [f"python reproduce.py {options} --report  # this page, from the records beside it"]
    if not study.runs:
        commands.insert(0, f"python reproduce.py {options}  # run what is missing")
    if study.preset and study.name != "paper":
        commands.append("python reproduce.py --preset paper  # the paper's own scale")
    return "\n\n".join(
        [
            f"Scale: {study.scale}.",
            "\n".join(f"- {line}" for line in sorted(recipes)),
            markdown(header, rows),
            "\n".join(["```sh", *commands, "```"]),
        ]
    )


def runs_section(runs: pd.DataFrame) -> str:
    """Where each run is after its last epoch."""
    columns = {
        "train loss": ("train_loss", ".4f"),
        "test loss": ("test_loss", ".4f"),
        "accuracy": ("test_accuracy", ".2%"),
        "gradient std": ("global_std", ".2e"),
        "scale factor": ("scale_factor", ".4f"),
        "norm ratio": ("update_norm_ratio", ".3f"),
        "cosine": ("update_cosine", ".3f"),
    }
    rows = []
    for _, run in runs.iterrows():
        last = run["records"][-1]
        numbers = ["-" if last[key] is None else f"{last[key]:{form}}" for key, form in columns.values()]
        rows.append([run["arm"], f"{run['seed']}", f"{last['epoch']} of {run['epochs']}", *numbers])
    return markdown(["run", "seed", "epoch", *columns], rows)


def accuracy_section(runs: pd.DataFrame) -> str:
    """The accuracies of each arm, beside the paper's where there are any."""
    images = {
        f"{DATASETS[name].label} has {TEST_IMAGES[name]:,} test images, "
        f"{100 / TEST_IMAGES[name]:.2f} points each."
        for name in runs["dataset"]
    }
    intro = (
        "In %: mean ± standard deviation over the runs that finished, their number, 95% interval "
        "of the mean. Descriptive: the test loss, and the mean accuracy of the last three epochs."
    )
    parts = [" ".join([intro, *sorted(images)])]
    for title, each in runs.groupby("group", sort=False):
        it = each["experiment"].iloc[0]
        papers = PAPER_ACCURACY.get(it.model, {}) if it.optimizer == "adamw" else {}
        if it.dataset == "cifar10" or set(each["method"]) - set(papers):
            papers = {}
        rows = []
        for arm, there in each.groupby("arm", sort=False):
            done = there[there["state"] == "finished"]
            accuracy, loss = done["accuracy"], by_epoch(done, "test_loss")
            last = 100 * by_epoch(done, "test_accuracy").iloc[:, -3:].mean(axis=1)
            row = [str(arm), spread(accuracy), f"{len(done)}", between(*mean_interval(accuracy))]
            row += [spread(loss.iloc[:, -1] if len(done) else [], 3), spread(last)]
            rows.append(row + ([f"{papers[there['method'].iloc[0]]:.2f}"] if papers else []))
        header = ["method", "accuracy", "n", "95% interval", "test loss", "last three epochs"]
        header += ["paper, CIFAR-100"] if papers else []
        parts.append(f"**{title}**\n\n{markdown(header, rows)}")
    if len(diverged := runs[runs["state"] == "diverged"]):
        parts += ["Diverged, and not in these means:"]
        parts += [
            f"- {run['group']}, {run['arm']}, seed {run['seed']}: {run['diverged'].partition(';')[0]}"
            for _, run in diverged.iterrows()
        ]
    return "\n\n".join(parts)


def difference_section(study: Study, found: pd.DataFrame) -> str:
    """The differences by family."""
    if not len(found):
        return ""
    parts = [
        "In points. Differences are taken within seeds: methods share initial parameters and "
        "batches. A linear model of seed and method gives them, with one residual variance for the "
        f"methods of a table. *n* seeds have all of the methods. *TOST p* below {ALPHA:g}, in a "
        "family divided by its size, shows equivalence within "
        f"{MARGIN:g} point, and the interval beside it then lies within that margin. *Detectable* "
        f"is the true difference that the test finds with a probability of {POWER:.0%}. Welch's "
        "interval ignores the pairing, and is descriptive."
    ]
    if not study.fixed_before:
        parts[0] += " This analysis was chosen after the study was first run."
    for (title, kind), family in found.groupby(["family", "kind"], sort=False):
        size = int(family["size"].iloc[0])
        parts.append(f"### {title}")
        parts.append(
            {
                "primary": f"One test, at {ALPHA:g}.",
                "family": f"One family of {count(size, 'test')}, with Holm's correction; in bold "
                f"where p is below {ALPHA:g}.",
                "descriptive": "Descriptive, not tested.",
                "exploratory": "Exploratory: neither planned nor tested.",
            }[str(kind)]
        )
        for group, rows in family.groupby("group", sort=False):
            parts.append(f"**{group}**")
            missing = int(rows["missing"].max())
            if kind in TESTED and missing:
                parts.append(f"Not tested yet; planned runs that are missing: {missing}.")
            else:
                parts.append(difference_table(rows, size, kind in TESTED))
    return "\n\n".join(parts)


def difference_table(rows: pd.DataFrame, size: int, tested: bool) -> str:
    """The contrasts of a family in one group."""
    header = ["", "difference (95% interval)", "n"]
    if tested:
        level = f"{100 * (1 - 2 * ALPHA / size):.3g}% interval"
        header += ["p", *["Holm"] * (size > 1), "TOST p", level, "detectable"]
    lines = []
    for _, row in rows.iterrows():
        line = [row["label"], difference(row), f"{row['n']}"]
        if tested:
            corrected = p_value(row["corrected"])
            shown = f"**{corrected}**" if row["corrected"] < ALPHA else corrected
            line += [p_value(row["p_value"]), shown] if size > 1 else [shown]
            line += [p_value(row["equivalence"])]
            line += [between(row["inner_low"], row["inner_high"], "+z.2f")]
            line += ["-" if math.isnan(row["detectable"]) else f"{row['detectable']:.1f}"]
        lines.append([*line, between(row["welch_low"], row["welch_high"], "+z.2f")])
    return markdown([*header, "Welch's 95% interval"], lines)


def difference(row: pd.Series) -> str:
    """A difference with its interval; or, if runs diverged, how often each method is above."""
    if any(row["diverged"]):
        seeds = row["above"] + row["below"] + row["ties"]
        return (
            f"diverged: {' and '.join(map(str, row['diverged']))}; above in {row['above']}, below "
            f"in {row['below']} of {count(seeds, 'seed')}"
        )
    if math.isnan(row["error"]):
        return "-" if math.isnan(row["value"]) else f"{row['value']:+z.2f}"
    return f"{row['value']:+z.2f} ({between(row['low'], row['high'], '+z.2f')})"


def effect_section(runs: pd.DataFrame) -> str:
    """How the methods' updates differ from the plain optimizer's."""
    parts = []
    for title, each in runs[runs["method"] != "none"].groupby("group", sort=False):
        rows = []
        for arm, there in each[each["state"] == "finished"].groupby("arm", sort=False):
            ratio, cosine = (
                by_epoch(there, name) for name in ("update_norm_ratio", "update_cosine")
            )
            if cosine.notna().all(axis=None):
                means = [values.mean() for values in (ratio, cosine, 1 - cosine**2)]
                rows.append([str(arm)])
                for mean in means:
                    rows[-1] += [f"{x:.3f}" for x in (mean.iloc[0], mean.iloc[-1], mean.mean())]
        if rows:
            names = ("ratio of norms", "cosine", "1 - cosine²")
            header = [f"{name}: first" for name in names]
            header = ["method", *(x for name in header for x in (name, "last", "mean"))]
            parts.append(f"**{title}**\n\n{markdown(header, rows)}")
    intro = (
        "The actual update, compared with the plain optimizer's on the same gradients: in the "
        "first epoch, in the last, and the mean over epochs; means over seeds. 1 - cosine² is the "
        "share of the squared update that no learning rate explains. Both sides include the weight "
        "decay."
    )
    return "\n\n".join([intro, *parts]) if parts else ""


def time_section(runs: pd.DataFrame) -> str:
    """Milliseconds of a step by arm: medians over the epochs of all seeds."""
    timed = runs[~runs["effect"].astype(bool) & (runs["records"].map(len) > 0)]
    rows = []
    for title, each in timed.groupby("group", sort=False):
        speeds = {
            arm: np.concatenate([[r["images_per_second"] for r in x] for x in there["records"]])
            for arm, there in each.groupby("arm", sort=False)
        }
        steps = {arm: 1000 * each["batch_size"].iloc[0] / np.median(x) for arm, x in speeds.items()}
        first = steps[figures.plain_arm(each)]
        rows += [[str(title), str(arm), f"{ms:.0f}", f"{ms / first:.2f}"] for arm, ms in steps.items()]
    if not rows:
        return ""
    return (
        "Medians over all epochs, in milliseconds and relative to the plain optimizer, as "
        "recorded; other programs may have run at the same time. `benchmarks/overhead.py` compares "
        "the methods fairly. Runs with a measured effect are left out.\n\n"
        + markdown(["runs", "method", "ms", "ratio"], rows)
    )


def exponent_section(runs: pd.DataFrame) -> str:
    """The exponents that the first step of each run decided."""
    rows = []
    for (title, arm), each in runs.groupby(["group", "arm"], sort=False):
        last = [records[-1]["exponent"] if records else None for records in each["records"]]
        if any(exponent is not None for exponent in last):
            found = " ".join("-" if exponent is None else str(exponent) for exponent in last)
            rows.append([title, arm, found])
    return markdown(["runs", "method", "$p_t$ of each seed, in order"], rows) if rows else ""


# --- Numbers and tables as Markdown ---------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(words: Any) -> str:
    """What differs among words, in order."""
    return ", ".join(sorted(set(words)))


def short(commit: str | None) -> str:
    """An abbreviated commit id.

    >>> short("f2f4ca1a5ec737719d3260e2e7f02ed80c563a95-dirty")
    'f2f4ca1-dirty'
    """
    name, mark, dirty = str(commit).partition("-")
    return name[:7] + mark + dirty


def count(number: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "run"), count(2, "run")
    ('1 run', '2 runs')
    """
    return f"{number} {noun}" + "s" * (number != 1)


def spread(values: Sequence[float] | pd.Series, digits: int = 2) -> str:
    """Mean and standard deviation.

    >>> spread([1.0, 3.0]), spread([1.0]), spread([])
    ('2.00 ± 1.41', '1.00', '-')
    """
    if not len(values):
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def between(low: float, high: float, form: str = ".2f") -> str:
    """An interval."""
    return "-" if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def p_value(value: float) -> str:
    """A p-value.

    >>> p_value(0.03), p_value(0.0003), p_value(float("nan"))
    ('0.030', '< 0.001', '-')
    """
    if math.isnan(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
