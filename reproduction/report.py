"""The report of a study: its tables and captions, from the records alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reproduction import figures, replacing
from reproduction.presets import PAPER_ACCURACY
from reproduction.records import Table, by_epoch, table
from reproduction.statistics import ALPHA, POWER, TESTED, differences, mean_interval
from reproduction.studies import ACCURACY, Outcome, Study
from training import UserError
from training.data import DATASETS
from training.optimizers import OPTIMIZERS

TEST_IMAGES = {"digits": 360, "cifar10": 10_000, "cifar100": 10_000}


def write_report(study: Study, folder: Path) -> tuple[Table, Table]:
    """Writes `REPORT.md` and the figures of the runs in a study's folder.

    The text depends only on the records, the figures also on the version of Matplotlib.

    Args:
      study: the study.
      folder: contains its records; the report is written there too.

    Returns:
      The tables of its runs, and of its differences.

    Raises:
      ValueError: if there is no record in the folder, or a file that is not a record.
    """
    runs = table(study, folder)
    shown, found = runs[runs["state"] != "missing"], differences(study, runs)
    if not len(shown):
        raise UserError(f"{folder} holds no records; make them without --report")
    sections = {
        f"# {study.title}": summary(study, runs, folder),
        "## The plan": study.plan,
        "## Runs": runs_section(shown) if study.runs else "",
        f"## {study.outcome.label.capitalize()} after the last epoch": accuracy_section(
            study, shown
        ),
        "## Differences": difference_section(study, found) if len(found) else "",
        "## What each method did to the plain optimizer's steps": effect_section(
            shown[shown["chosen"]]
        ),
        "## Figures": "\n\n".join(
            [f"All at the same scale: {study.scale}.", *figures.draw(study, shown, found, folder)]
        ),
    }
    text = "\n\n".join(f"{title}\n\n{section}" for title, section in sections.items() if section)
    with replacing(folder / "REPORT.md") as part:
        part.write_text(text + "\n")
    return runs, found


def summary(study: Study, runs: Table, folder: Path) -> str:
    """What was run, how much of it, and on which devices."""
    there = runs[runs["state"] != "missing"]
    rates: dict[tuple[str, str], set[float]] = {}
    for it in there["experiment"]:
        before = f"{DATASETS[it.dataset].label}: {count(it.epochs, 'epoch')}, batches of "
        before += f"{it.batch_size}, {OPTIMIZERS[it.optimizer].label}"
        after = f"multiplied by 0.75 every {it.decay_epochs:g} epochs"
        after += f", after {it.warmup_epochs:g} of warm-up" * (it.warmup_epochs > 0)
        rates.setdefault((before, after), set()).add(it.learning_rate)
    recipes = {
        f"{before} with learning rate {', '.join(f'{rate:g}' for rate in sorted(values))}, {after}."
        for (before, after), values in rates.items()
    }
    rows = []
    for _, each in runs.groupby("repeat"):
        made = each[each["state"] != "missing"]
        devices = zip(made["device_count"], made["device"], strict=True)
        hours = sum(record["seconds"] for records in made["records"] for record in records) / 3600
        packages = {"python": "Python", "jax": "jax", "flax": "flax", "optax": "optax"}
        rows.append(
            {
                "device": listed(f"{number:g} x {device}" for number, device in devices),
                "runs": f"{made['planned'].sum()}",
                "planned": f"{each['planned'].sum()}",
                "hours": f"{hours:.1f}",
                **{
                    title: listed(versions[package] for versions in made["versions"])
                    for package, title in packages.items()
                },
                "commit": listed(map(short, made["commit"])),
            }
        )
        if more := int((~made["planned"]).sum()):
            recipes.add(f"{count(more, 'run')} beyond the plan: shown, not compared.")
    options = f"--preset {study.name}" if study.preset else f"--name {study.name}"
    if study.preset and folder.parent.name == "results":
        options += " --results results"
    commands = [f"python reproduce.py {options} --report  # this page, from the records beside it"]
    if not study.runs:
        commands.insert(0, f"python reproduce.py {options}  # run what is missing")
    if study.preset and study.name != "paper":
        commands.append("python reproduce.py --preset paper  # the paper's own scale")
    lines = "\n".join(f"- {line}" for line in sorted(recipes))
    block = "\n".join(["```sh", *commands, "```"])
    return "\n\n".join([f"Scale: {study.scale}.", lines, markdown(rows), block])


def runs_section(runs: Table) -> str:
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
        row = {"run": run["arm"], "seed": f"{run['seed']}"}
        row["epoch"] = f"{last['epoch']} of {run['epochs']}"
        for title, (key, form) in columns.items():
            row[title] = "-" if last[key] is None else f"{last[key]:{form}}"
        rows.append(row)
    return markdown(rows)


def accuracy_section(study: Study, runs: Table) -> str:
    """The accuracies of each arm, beside the paper's where there are any."""
    images = {
        f"{DATASETS[name].label} has {TEST_IMAGES[name]:,} test images, "
        f"{100 / TEST_IMAGES[name]:.2f} points each."
        for name in runs["dataset"]
    }
    intro = (
        "In %: mean ± standard deviation over the runs that finished, their number, 95% interval "
        f"of the mean. Descriptive: {'the test loss, ' * (study.outcome == ACCURACY)}the mean "
        "accuracy of the last three epochs, the exponents $p_t$ of the seeds in order, and the "
        "median time of a step in milliseconds where no effect was measured, which takes time "
        "itself."
    )
    parts = [" ".join([intro, *sorted(images)])]
    if runs["validation_size"].any():
        parts.append(
            "Of each method's learning rates, the one with the lowest mean validation loss; test "
            "results are reported for this one only."
        )
    for title, each in runs[runs["chosen"]].groupby("group", sort=False):
        it = each["experiment"].iloc[0]
        papers = PAPER_ACCURACY.get(it.model, {}) if it.optimizer == "adamw" else {}
        if it.dataset == "cifar10" or set(each["method"]) - set(papers) or not study.preset:
            papers = {}
        rows = [
            arm_row(str(arm), there)
            | ({"paper, CIFAR-100": f"{papers[method]:.2f}"} if papers else {})
            for (arm, method), there in each.groupby(["arm", "method"], sort=False)
        ]
        parts.append(f"**{title}**\n\n{markdown(rows)}")
    if len(diverged := runs[runs["state"] == "diverged"]):
        parts.append("Diverged, and not in these means:")
        for _, run in diverged.iterrows():
            why = run["diverged"].partition(";")[0]
            where = [run["group"], run["arm"]]
            where += [f"learning rate {run['learning_rate']:g}"] * bool(run["validation_size"])
            parts.append(f"- {', '.join(where)}, seed {run['seed']}: {why}")
    return "\n\n".join(parts)


def arm_row(arm: str, runs: Table) -> dict[str, str]:
    """The outcomes of an arm."""
    done = runs[runs["state"] == "finished"]
    last = 100 * by_epoch(done, "test_accuracy").iloc[:, -3:].mean(axis=1)
    exponents = [records[-1]["exponent"] if records else None for records in runs["records"]]
    times = [
        1000 * run["batch_size"] / record["images_per_second"]
        for _, run in runs[~runs["effect"].astype(bool)].iterrows()
        for record in run["records"]
    ]
    rate = f"{runs['learning_rate'].iloc[0]:g}"
    rate += ", an end of the grid" * bool(runs["at_end"].any())
    return {
        "method": arm,
        "learning rate": rate if runs["validation_size"].any() else "-",
        "validation loss": spread(done["validation_loss"].dropna(), 4),
        "accuracy": spread(done["accuracy"]),
        "n": f"{len(done)}",
        "95% interval": between(*mean_interval(done["accuracy"])),
        "test loss": spread(done["test_loss"], 3),
        "last three epochs": spread(last),
        "$p_t$": "-"
        if exponents.count(None) == len(exponents)
        else " ".join("-" if exponent is None else f"{exponent}" for exponent in exponents),
        "ms": f"{np.median(times):.0f}" if times else "-",
    }


def difference_section(study: Study, found: Table) -> str:
    """The differences by family."""
    outcome = study.outcome
    parts = [
        f"In {outcome.units}. Differences are taken within seeds: methods share initial parameters "
        "and batches. A linear model of seed and method gives them, with one residual variance for "
        f"the methods of a table. *n* seeds have all of the methods. *TOST p* below {ALPHA:g}, in "
        "a family divided by its size, shows equivalence within "
        f"{outcome.within}, and the interval beside it then lies within that margin. *Detectable* "
        f"is the true difference that the test finds with a probability of {POWER:.0%}. Welch's "
        "interval ignores the pairing, and is descriptive."
    ]
    if not study.fixed_before:
        parts[0] += " This analysis was chosen after the study was first run."
    for (title, kind), family in found.groupby(["family", "kind"], sort=False):
        size = int(family["size"].iloc[0])
        parts.append(f"### {title}")
        words = {
            "primary": f"One test, at {ALPHA:g}.",
            "family": f"One family of {count(size, 'test')}, with Holm's correction; in bold where "
            f"p is below {ALPHA:g}.",
            "descriptive": "Descriptive, not tested.",
            "exploratory": "Exploratory: neither planned nor tested.",
        }
        parts.append(words[str(kind)])
        for group, rows in family.groupby("group", sort=False):
            parts.append(f"**{group}**")
            missing = int(rows["missing"].max())
            if kind in TESTED and missing:
                parts.append(f"Not tested yet; planned runs that are missing: {missing}.")
            else:
                parts.append(difference_table(rows, size, kind in TESTED, outcome))
    return "\n\n".join(parts)


def difference_table(rows: Table, size: int, tested: bool, outcome: Outcome) -> str:
    """The contrasts of a family in one group."""
    lines, form = [], f"+z.{outcome.digits}f"
    for _, row in rows.iterrows():
        line = {f"in {outcome.units}": row["label"]}
        line["difference (95% interval)"] = difference(row, outcome)
        line["n"] = f"{row['n']}"
        if tested:
            corrected = p_value(row["corrected"])
            line["p"] = p_value(row["p_value"])
            line["p" if size == 1 else "Holm"] = (
                f"**{corrected}**" if row["corrected"] < ALPHA else corrected
            )
            line["TOST p"] = p_value(row["equivalence"])
            level = f"{100 * (1 - 2 * ALPHA / size):.3g}% interval"
            line[level] = between(row["inner_low"], row["inner_high"], form)
            known = not math.isnan(row["detectable"])
            line["detectable"] = f"{row['detectable']:.{outcome.digits - 1}f}" if known else "-"
        line["Welch's 95% interval"] = between(row["welch_low"], row["welch_high"], form)
        lines.append(line)
    return markdown(lines)


def difference(row: Table, outcome: Outcome) -> str:
    """A difference with its interval; or, if runs diverged, how often each method is above."""
    form = f"+z.{outcome.digits}f"
    if any(row["diverged"]):
        seeds = row["above"] + row["below"] + row["ties"]
        return (
            f"diverged: {' and '.join(map(str, row['diverged']))}; above in {row['above']}, below "
            f"in {row['below']} of {count(seeds, 'seed')}"
        )
    if math.isnan(row["error"]):
        return "-" if math.isnan(row["value"]) else f"{row['value']:{form}}"
    return f"{row['value']:{form}} ({between(row['low'], row['high'], form)})"


def effect_section(runs: Table) -> str:
    """How the methods' updates differ from the plain optimizer's."""
    parts = []
    done = runs[(runs["method"] != "none") & (runs["state"] == "finished")]
    for title, each in done.groupby("group", sort=False):
        rows = []
        for arm, there in each.groupby("arm", sort=False):
            ratio, cosine = (by_epoch(there, f"update_{key}") for key in ("norm_ratio", "cosine"))
            if cosine.notna().all(axis=None):
                row = {"method": str(arm)}
                values = {"ratio of norms": ratio, "cosine": cosine, "1 - cosine²": 1 - cosine**2}
                for name, value in values.items():
                    mean = value.mean()
                    numbers = {"first": mean.iloc[0], "last": mean.iloc[-1], "mean": mean.mean()}
                    row |= {f"{name}, {when}": f"{x:.3f}" for when, x in numbers.items()}
                rows.append(row)
        if rows:
            parts.append(f"**{title}**\n\n{markdown(rows)}")
    intro = (
        "The actual update, compared with the plain optimizer's on the same gradients: in the "
        "first epoch, in the last, and the mean over epochs; means over seeds. 1 - cosine² is the "
        "share of the squared update that no learning rate explains. Both sides include the weight "
        "decay."
    )
    return "\n\n".join([intro, *parts]) if parts else ""


# --- Numbers and tables as Markdown ---------------------------------------------------------------


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table, without the columns in which nothing is.

    >>> print(markdown([{"a": "1", "b": "-"}, {"a": "2", "b": "-"}]))
    | a |
    | --- |
    | 1 |
    | 2 |
    """
    shown = [key for key in rows[0] if any(row[key] != "-" for row in rows)]
    lines = [shown, ["---"] * len(shown), *([row[key] for key in shown] for row in rows)]
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


def spread(values: Sequence[float], digits: int = 2) -> str:
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
