"""The verdict: the paper's claims one by one, judged by rules from the records alone.

The rules were written before the runs of the study on CIFAR-100 ended. Each study judges a claim
once all planned runs of the arms that it is about are in. The verdict is that of the study nearest
to the paper's scale that could judge it; a claim that a single counterexample refutes is
contradicted by one in any study.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from training.config import Experiment

from models import MODELS
from reproduction import figures, inference, markdown
from reproduction.contrasts import STRONGER, Contrast, families
from reproduction.files import replacing
from reproduction.groups import Arm, Group, group
from reproduction.inference import ALPHA, MARGIN, Verdict
from reproduction.report import difference, effect, measured, side
from reproduction.studies import (
    PAPER_ACCURACY,
    PAPER_METHODS,
    PAPER_MODELS,
    STUDIES,
    read,
    same_results,
)
from training.optimizers import METHODS, OPTIMIZERS, method_label

# The paper's own scale first. Of the two studies at one scale, that of the CPU was finished, and
# judged the primary claim, before the other was fixed.
BY_SCALE = ("paper", "cifar100", "cifar100-gpu", "cpu", "digits", "vit", "ablation")
ON_CIFAR100 = BY_SCALE[: BY_SCALE.index("digits")]
BEGIN, END = "<!-- verdict: begin; generated from results/ -->", "<!-- verdict: end -->"
SUMMARY_END = "<!-- end of the summary -->"  # for pages that include it

Groups = Mapping[str, Sequence[Group]]  # by study


class Finding(NamedTuple):
    """What some runs say of a claim."""

    text: str
    brief: str  # the same in a number or two, for the summary
    verdict: Verdict


class Evidence(NamedTuple):
    """What a study's runs of a network say of a claim."""

    study: str
    scale: str
    model: str
    optimizer: str
    n: int  # seeds
    planned: int
    finding: Finding

    @property
    def verdict(self) -> Verdict:
        """The finding's, when all planned runs are in."""
        return "not tested" if self.n < self.planned else self.finding.verdict

    @property
    def data(self) -> str:
        """The data set."""
        return self.scale.partition(",")[0]

    @property
    def seeds(self) -> str:
        """The number of seeds."""
        return f"{self.n} of {self.planned}" if self.n < self.planned else f"{self.n}"


def in_brief(evidence: Sequence[Evidence]) -> str:
    """What the runs of one study found."""
    parts = []
    for scale, same in itertools.groupby(evidence, lambda it: it.scale):
        there = list(same)
        seeds = "/".join(dict.fromkeys(it.seeds for it in there))
        found = ", ".join(dict.fromkeys(it.finding.brief for it in there))
        parts.append(f"{scale}, n = {seeds}: {found}")
    return "; ".join(parts)


class Claim(NamedTuple):
    """A claim of the paper, and how it is judged."""

    title: str
    short: str  # the title in the summary's table
    rule: str
    evidence: list[Evidence]
    anywhere: bool = False  # whether one counterexample contradicts it, in whatever study

    @property
    def judged(self) -> list[Evidence]:
        """The evidence of the study that decides."""
        tested = [
            [it for it in self.evidence if it.study == study and it.verdict != "not tested"]
            for study in BY_SCALE
        ]
        against = [
            evidence for evidence in tested if any(it.verdict == "contradicted" for it in evidence)
        ]
        return next(filter(None, [*(against if self.anywhere else []), *tested]), [])

    @property
    def verdict(self) -> Verdict:
        """Contradicted by one group of runs; supported by all."""
        verdicts = {it.verdict for it in self.judged}
        for verdict in ("contradicted", "not distinguished", "supported"):
            if verdict in verdicts:
                return verdict
        return "not tested"

    @property
    def conclusion(self) -> str:
        """The verdict, with the data set that it is from where that is not the paper's."""
        data = [it.data for it in self.judged] or ["CIFAR-100"]
        return f"*{self.verdict}*" + ("" if "CIFAR-100" in data else f" on {data[0]}")

    @property
    def undecided(self) -> list[Evidence]:
        """That of the study nearest to the paper's scale, if its runs are too few to decide."""
        judged = self.judged
        nearer = BY_SCALE[: BY_SCALE.index(judged[0].study)] if judged else BY_SCALE
        larger = [
            [
                it
                for it in self.evidence
                if it.study == study and it.verdict == "not tested" and it.finding.brief
            ]
            for study in nearer
        ]
        return next(filter(None, larger), [])

    @property
    def basis(self) -> str:
        """What the verdict is from, and in brackets what fewer runs at a larger scale show."""
        forms = ("{}", self.judged), ("({})", self.undecided)
        return " ".join(form.format(in_brief(it)) for form, it in forms if it) or "-"


def write_verdict(results: Path) -> None:
    """Writes `VERDICT.md` and its figure, and the block in the README beside the folder, if any.

    The texts depend on the records alone, to the byte.

    Args:
      results: the folder of all studies.

    Raises:
      ValueError: if a file there is not a record.
    """
    groups = read_all(results)
    draw(groups, results)
    with replacing(results / "VERDICT.md") as part:
        part.write_text(page(groups))
    readme = results.absolute().parent / "README.md"
    if readme.exists() and BEGIN in (text := readme.read_text()):
        new = with_block(text, block(groups, f"{results.name}/"))
        if new != text:
            with replacing(readme) as part:
                part.write_text(new)


def read_all(results: Path) -> dict[str, list[Group]]:
    """The runs of all studies; a study without records has groups without runs."""
    return {name: group(STUDIES[name], read(results / name).values()) for name in BY_SCALE}


def with_block(text: str, new: str) -> str:
    """A text with what is between the markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{new}\n{end}{after}"


NOTHING = Finding("-", "", "not tested")

# --- Claims about the dynamics --------------------------------------------------------------------


def claims(groups: Groups) -> list[Claim]:
    """The paper's claims other than those of its Table 1."""
    return [
        Claim(
            "The global standard deviation of the gradients falls",
            "The gradients' global std falls",
            "It is lower in the last epoch than in the first in every run, and the mean change is "
            "significant in a t-test; contradicted if the opposite holds.",
            list(evidence(groups, ("autoscale",), trend)),
        ),
        Claim(
            "The standard deviation falls in some layers and rises in others",
            "It falls in some layers, rises in others",
            "From the first epoch to the last, in every one of at least two runs; a single run in "
            "which all layers agree contradicts it.",
            list(evidence(groups, ("autoscale",), layers)),
        ),
        Claim(
            "The factor $a_t$ never exceeds 1",
            "$a_t$ never exceeds 1 (largest mean of an epoch)",
            "No epoch's mean is above 1 in any run. By the paper's equation it is above 1 for "
            "standard deviations between 0.018 and 55, whether or not these runs get there; "
            "`max_scale=1.0` enforces the claim.",
            list(evidence(groups, ("autoscale",), bound)),
            anywhere=True,
        ),
        Claim(
            "It converges",
            "It converges",
            "Every run finishes, with a lower training loss than in its first epoch. The theorem "
            "itself is about SGD on smooth losses.",
            list(evidence(groups, ("autoscale",), convergence)),
            anywhere=True,
        ),
        Claim(
            "It is more stable than Z-score normalization",
            "More stable than Z-score (scatter)",
            STABLER,
            list(evidence(groups, ("autoscale", "zscore"), stability)),
        ),
        Claim(
            "It converges more smoothly than the plain optimizer",
            "Smoother than plain (scatter)",
            STABLER,
            list(evidence(groups, ("autoscale", "none"), stability)),
        ),
        Claim(
            "It has no hyperparameters to tune",
            "Nothing to tune",
            "No study varies the learning rate and the weight decay with and without it, so none "
            "shows that the plain optimizer's settings suit it too.",
            [],
        ),
    ]


STABLER = (
    "It diverges less often (exact McNemar test), or the last ten changes of its test accuracy "
    "scatter less (paired t-test), each at half the level, and neither test favors the other. The "
    "number is the difference of the scatter, in points."
)


def evidence(
    groups: Groups,
    keys: tuple[str, ...],
    judge: Callable[[Sequence[Arm], float], Finding],
) -> Iterator[Evidence]:
    """What each group of runs says; the level is divided by the number of a study's groups."""
    seen = set()
    for study, all_groups in groups.items():
        there = [
            (each, [each.arms[key] for key in keys])
            for each in all_groups
            if all(key in each.shown for key in keys)
        ]
        for each, arms in there:
            if same_runs(arms[0]) in seen:  # a study may have runs of another one
                continue
            seen.add(same_runs(arms[0]))
            yield Evidence(
                study,
                each.scale,
                MODELS[each.model].label,
                OPTIMIZERS[each.optimizer].label,
                min(sum(seed in arm.runs for seed in arm.seeds) for arm in arms),
                min(len(arm.seeds) for arm in arms),
                judge(arms, ALPHA / len(there)),
            )


def same_runs(arm: Arm) -> tuple[Experiment, str]:
    """What is equal for the runs of two studies if these are the same: recipe and device."""
    first = next(iter(arm.runs.values()))
    return same_results(first.experiment), first.description["device"]


def trend(arms: Sequence[Arm], alpha: float) -> Finding:
    """Of the global standard deviation."""
    series = [[record["global_std"] for record in run.records] for run in arms[0].runs.values()]
    estimate, _ = inference.log_change(series)
    if math.isnan(estimate.value):
        return NOTHING
    brief = f"x{math.exp(estimate.value):.2f}"
    low, high = map(math.exp, estimate.interval())
    text = f"{'falls' if estimate.value < 0 else 'rises'} to {brief}"
    text += "" if math.isnan(low) else f" ({low:.2f} to {high:.2f})"
    whole = [curve for curve in series if len(curve) == max(map(len, series))]
    peak = int(np.argmax(np.mean(np.log(whole), axis=0))) + 1
    text += f", highest in epoch {peak}"
    return Finding(text, brief, inference.verdict_on_trend(series, alpha=alpha))


def layers(arms: Sequence[Arm], alpha: float) -> Finding:
    """Of each layer's standard deviation."""
    del alpha  # no test: a count
    falls, holds, total = [], [], 0
    for run in arms[0].runs.values():
        if len(run.records) > 1:
            first, last = run.records[0]["layer_std"], run.records[-1]["layer_std"]
            falls.append(sum(last[name] < first[name] for name in first))
            holds.append(falls[-1] > 0 and any(last[name] > first[name] for name in first))
            total = len(first)
    if not falls:
        return NOTHING
    some = " to ".join(map(str, sorted({min(falls), max(falls)})))
    text = f"falls in {some} of {total} layers"
    return Finding(text, f"{some}/{total} fall", inference.verdict_on_every_run(holds))


def bound(arms: Sequence[Arm], alpha: float) -> Finding:
    """Of the factor."""
    del alpha
    series = [[record["scale_factor"] for record in run.records] for run in arms[0].runs.values()]
    if not (recorded := [value for run in series for value in run if value is not None]):
        return NOTHING
    brief = f"{math.ceil(100 * max(recorded)) / 100:.2f}"  # rounded up: a bound
    return Finding(f"at most {brief}", brief, inference.verdict_on_bound(series))


def convergence(arms: Sequence[Arm], alpha: float) -> Finding:
    """Of the training loss."""
    del alpha
    holds = [
        not run.description["diverged"]
        and run.records[-1]["train_loss"] < run.records[0]["train_loss"]
        for run in arms[0].runs.values()
    ]
    brief = f"{sum(holds)} of {len(holds)}"
    text = f"{sum(holds)} of {markdown.count(len(holds), 'run')}"
    return Finding(text, brief, inference.verdict_on_every_run(holds))


def stability(arms: Sequence[Arm], alpha: float) -> Finding:
    """Of the first arm, beside the second."""
    curves = {
        name: {
            seed: None
            if run.description["diverged"]
            else [100 * record["test_accuracy"] for record in run.records]
            for seed, run in arm.runs.items()
            if seed in arm.seeds
        }
        for name, arm in zip(("ours", "other"), arms, strict=True)
    }
    found = inference.compare_stability(curves, "ours", "other")
    text = f"{found.diverged[0]} and {found.diverged[1]} diverged"
    brief = text if any(found.diverged) else ""
    if not math.isnan(found.roughness.standard_error):
        low, high = found.roughness.interval()
        text += f", scatter {found.roughness.value:+z.2f} ({low:+z.2f} to {high:+z.2f})"
        brief = brief or f"{found.roughness.value:+z.2f}"
    return Finding(text, brief, inference.verdict_on_stability(found, alpha))


# --- Table 1 --------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A cell of the paper's Table 1, beside what the runs found."""

    model: str
    method: str
    claimed: float  # points above the plain optimizer; for that itself its accuracy in %
    cifar100: str  # found there: difference, interval, n, epochs
    digits: str
    verdict: Verdict
    contrast: Contrast | None  # what the verdict is from

    @property
    def brief(self) -> str:
        """What the verdict is from, for the summary."""
        if not self.contrast:
            return "-"
        comparison = self.contrast.comparison
        if comparison.missing:
            return f"{markdown.count(comparison.missing, 'run')} missing"
        scale = self.contrast.group.scale
        return f"{scale}, n = {comparison.estimate.n}: {difference(comparison)}"


def cells(groups: Groups) -> list[Cell]:
    """Table 1, cell by cell; only runs on the paper's data set can judge one."""
    contrasts = {
        study: [
            each
            for family in families(study, groups[study])
            for each in family.contrasts
            if (each.group.optimizer, each.baseline) == ("adamw", "none")
        ]
        for study in (*ON_CIFAR100, "digits")
    }

    def find(study: str, dataset: str, model: str, method: str) -> Contrast | None:
        for each in contrasts[study]:
            if (each.group.dataset, each.group.model, each.method) == (dataset, model, method):
                return each
        return None

    found = []
    for model in PAPER_MODELS:
        plain = PAPER_ACCURACY[model]["none"]
        found.append(_absolute(groups["paper"], model, plain))
        for method in PAPER_METHODS[1:]:
            claimed = round(PAPER_ACCURACY[model][method] - plain, 2)
            tried = [find(study, "cifar100", model, method) for study in ON_CIFAR100]
            begun = [
                each for each in tried if each and (method in each.group.shown or each is tried[1])
            ]
            judged = [each for each in begun if each.verdict(claimed) != "not tested"]
            best = next(iter([*judged, *begun]), None)
            small = find("digits", "digits", model, method)
            found.append(
                Cell(
                    model,
                    method,
                    claimed,
                    "; ".join(map(in_short, judged or begun)) or "-",
                    in_short(small) if small else "-",
                    best.verdict(claimed) if best else "not tested",
                    best,
                )
            )
    return found


def _absolute(all_groups: Sequence[Group], model: str, claimed: float) -> Cell:
    """The plain optimizer's accuracy, which only the paper's own scale can judge."""
    (each,) = (it for it in all_groups if (it.dataset, it.model) == ("cifar100", model))
    arm = each.arms["none"]
    if arm.missing:
        return Cell(model, "none", claimed, "-", "-", "not tested", None)
    values = arm.accuracies()
    paper = dict.fromkeys(values, claimed)
    comparison = inference.compare({"ours": values, "paper": paper}, "ours", "paper")
    verdict = inference.verdict_on_difference(comparison, 0, family=len(PAPER_MODELS))
    text = f"{difference(comparison)} from the paper's, n = {len(values)}"
    return Cell(model, "none", claimed, text, "-", verdict, None)


def in_short(contrast: Contrast) -> str:
    """A difference with its interval, n, epochs and device; or what is missing."""
    comparison = contrast.comparison
    epochs = contrast.group.scale.partition(", ")[2]
    if comparison.missing:
        return f"{markdown.count(comparison.missing, 'planned run')} missing, {epochs}"
    text = difference(comparison)
    if math.isfinite(comparison.estimate.standard_error) and not any(comparison.diverged):
        text += f", n = {comparison.estimate.n}"
    return f"{text}, {epochs}"


# --- Texts ----------------------------------------------------------------------------------------


def page(groups: Groups) -> str:
    """`VERDICT.md`."""
    judged, table1 = claims(groups), cells(groups)
    labels = {"none": "AdamW"} | {method: METHODS[method].label for method in PAPER_METHODS[1:]}
    rows = [
        [
            f"{MODELS[cell.model].label}, {labels[cell.method]}",
            f"{cell.claimed:.2f} %" if cell.method == "none" else f"{cell.claimed:+.2f}",
            cell.cifar100,
            cell.digits,
            f"*{cell.verdict}*",
        ]
        for cell in table1
    ]
    header = ["cell", "paper", "CIFAR-100 here", "digits here", "verdict"]
    parts = [
        "# The verdict",
        block(groups, ""),
        SUMMARY_END,
        "This page is generated from the records in this folder, by rules in "
        "`reproduction/verdict.py` and `reproduction/inference.py` that were written before the "
        "runs on CIFAR-100 ended. A claim is *supported*, *contradicted*, *not distinguished* "
        "(tested without a clear answer) or *not tested*. Each study judges it once all planned "
        "runs that it needs are in, and its verdict is that of the study nearest to the paper's "
        "scale, CIFAR-100 for 200 epochs; of two at one scale, the CPU's. Intervals are 95% "
        "intervals; tests are at "
        f"{ALPHA:g}, corrected within a study.",
        "## Table 1, cell by cell",
        "Accuracy in points above AdamW; for AdamW itself in %. Only runs on CIFAR-100 judge a "
        "cell: its direction is tested against 0, its size against the paper's minus "
        f"{markdown.count(int(MARGIN), 'point')}. AdamW's own accuracy can be judged only at the "
        "paper's scale, `python reproduce.py --preset paper`. The results on digits are shown for "
        "comparison.",
        markdown.table(header, rows),
        "## The other claims, one by one",
    ]
    for claim in judged:
        parts.append(f"### {claim.title}: *{claim.verdict}*\n\n{claim.rule}")
        if claim.evidence:
            lines = [
                [
                    it.scale,
                    f"{it.model}, {it.optimizer}",
                    it.seeds,
                    it.finding.text,
                    f"*{it.verdict}*",
                ]
                for it in claim.evidence
            ]
            parts.append(
                markdown.table(["scale", "network, optimizer", "n", "found", "verdict"], lines)
            )
    reports = [
        f"[{STUDIES[name].title}]({name}/REPORT.md)"
        for name in BY_SCALE
        if any(each.shown for each in groups[name])
    ]
    parts += ["## The reports", "\n".join(f"- {each}" for each in reports)]
    return "\n\n".join(parts) + "\n"


def block(groups: Groups, prefix: str) -> str:
    """The summary: a table, a figure, three lines.

    Args:
      groups: the runs of all studies.
      prefix: leads to the folder of the results.
    """
    rows = [
        [
            f"{MODELS[cell.model].label} gains {cell.claimed:.2f} points on CIFAR-100",
            f"*{cell.verdict}*",
            cell.brief,
        ]
        for cell in cells(groups)
        if cell.method == "autoscale"
    ]
    others = claims(groups)
    rows += [[claim.short, claim.conclusion, claim.basis] for claim in others]
    lines = [
        f"**Does it help?** {helps(groups)}",
        f"**What does it do to the steps?** {acts(groups)}",
        f"**Should you add it?** {advice(groups)}",
    ]
    caption = "Autoscale's test accuracy minus the plain optimizer's, with 95% intervals."
    return "\n\n".join(
        [
            *lines,
            markdown.table(["the paper's claim", "verdict", "measured"], rows),
            reading(others),
            f"![{caption}]({prefix}verdict.png)",
            *([f"[The verdict in full]({prefix}VERDICT.md)"] if prefix else []),
        ]
    )


def reading(shown: Sequence[Claim]) -> str:
    """How to read the numbers in the summary's table."""
    several: dict[str, dict[str, None]] = {}  # by data set, in the order of the numbers
    for claim in shown:
        for evidence in (claim.judged, claim.undecided):
            for data, there in itertools.groupby(evidence, lambda it: it.data):
                names = [f"{it.model} with {it.optimizer}" for it in there]
                if len(names) > 1:
                    several.setdefault(data, {}).update(dict.fromkeys(names))
    parts = [f"on {data}, those of {markdown.listed([*names])}" for data, names in several.items()]
    text = f"Several numbers side by side are, {'; '.join(parts)}. " if parts else ""
    text += (
        "Scatter is that of the last changes of the test accuracy, in points, minus the other's: "
        "below 0 it is smoother."
    )
    if any(claim.undecided for claim in shown):
        text += " What fewer runs at a larger scale show is in brackets; it is not judged."
    return text


def helps(groups: Groups) -> str:
    """Whether accuracies are better, by the nearest to the paper's scale that can say so."""
    cell = next(it for it in cells(groups) if (it.model, it.method) == ("resnet20", "autoscale"))
    diverged = cell.contrast and any(cell.contrast.comparison.diverged)
    if cell.contrast and (cell.verdict != "not tested" or diverged):
        tested = inference.in_words(cell.contrast.comparison, *cell.contrast.labels)
        return f"ResNet-20 on {cell.contrast.group.scale}: {tested}{again(groups)}{penalty(groups)}"
    small = [
        each
        for family in families("digits", groups["digits"])
        for each in family.contrasts
        if (each.method, each.baseline) == ("autoscale", "none") and not each.comparison.missing
    ]
    missing = cell.contrast.comparison.missing if cell.contrast else 0
    text = (
        f"Not known yet: {missing} of the runs on CIFAR-100 that decide it are missing."
        if missing
        else f"Not known yet; on CIFAR-100: {cell.cifar100}."
    )
    if small:
        clear = sum(each.significant for each in small)
        text += (
            f" On digits, a far smaller problem, {clear or 'none'} of {len(small)} differences "
            f"from {small[0].labels[1]} {'are' if clear > 1 else 'is'} significant: "
        )
        text += ", ".join(
            f"{MODELS[each.group.model].label} {difference(each.comparison)}" for each in small
        )
        text += (
            " points, each with its 95% interval; significance is after Holm's correction for "
            f"{small[0].family} tests."
        )
    return text


def again(groups: Groups) -> str:
    """What the runs of the primary test found on a second device; empty if it is not known."""
    first, second = (
        families(study, groups[study])[0].contrasts[0] for study in ("cifar100", "cifar100-gpu")
    )
    for each in (first.comparison, second.comparison):
        if each.missing or any(each.diverged):
            return ""
    means = {
        key: {
            seed: 100
            * fmean(
                each.group.arms[key].runs[seed].records[-1]["test_accuracy"]
                for each in (first, second)
            )
            for seed in first.group.arms[key].seeds
        }
        for key in (first.method, first.baseline)
    }
    both = inference.compare(means, first.method, first.baseline)
    device = second.group.scale.rpartition(", ")[2]
    return (
        f" The same runs on one {device}: {difference(second.comparison)}; the mean of both "
        f"devices: {difference(both)}."
    )


def penalty(groups: Groups) -> str:
    """What `autoscale` did before Adam with an L2 penalty; empty while planned runs are missing."""
    for study in ("cifar100", "cifar100-gpu"):
        each = next(it for it in groups[study] if it.optimizer == "adam")
        if any(arm.missing for arm in each.arms.values()):
            continue
        found = {
            contrast.baseline: difference(contrast.comparison)
            for family in families(study, groups[study])
            for contrast in family.contrasts
            if contrast.group is each and contrast.method == "autoscale"
        }
        plain, stronger = each.arms["none"], each.arms[STRONGER]
        return (
            f" Before {plain.label}, which may be what the paper calls AdamW, Autoscale in effect "
            f"also multiplies the penalty, by about {STRONGER.rpartition('x')[2]}. There, over "
            f"{markdown.count(len(plain.seeds), 'seed')}, described and not tested, Autoscale "
            f"minus {plain.label} is {found['none']}, and Autoscale minus {stronger.label} is "
            f"{found[STRONGER]}: compare it there with a stronger penalty, too."
        )
    return ""


def acts(groups: Groups) -> str:
    """What happens to the optimizer's steps, measured if it was."""
    text = (
        "AdamW cancels constant factors, so only the centering and the change of the factor over "
        "time affect its steps."
    )
    for study in BY_SCALE:
        for each in groups[study]:
            arms = [arm for arm in measured(each) if arm.method == "autoscale"]
            if each.optimizer == "adamw" and arms:
                ratio, _, unexplained = effect(arms[0])
                return (
                    f"{text} {MODELS[each.model].label}, {each.scale}: the updates are "
                    f"{ratio[0]:.2f} times as long as AdamW's in the first epoch and "
                    f"{ratio[-1]:.2f} times in the last, and apart from {unexplained.mean():.0%} "
                    "of their squared norm they are AdamW's with another learning rate."
                )
    return f"{text} These runs did not measure by how much; `measure_effect` does so in yours."


def advice(groups: Groups) -> str:
    """What to do, by what is known of ResNet-20 on CIFAR-100."""
    cell = next(it for it in cells(groups) if (it.model, it.method) == ("resnet20", "autoscale"))
    contrast, own = cell.contrast, "compare it with your plain optimizer over several seeds"
    if cell.verdict == "not tested" or contrast is None:
        return f"No gain has been shown yet. If you try it, {own}."
    if contrast.equivalent:
        return (
            "It makes no difference that matters here: the change was shown to be less than "
            f"{markdown.count(int(MARGIN), 'point')}."
        )
    if cell.verdict == "supported":
        return f"It is worth a try on a network like this one; {own}."
    if contrast.significant and side(contrast) == "below":
        return "No: it cost accuracy here."
    if contrast.significant:
        return f"Expect a smaller gain than the paper's; {own}."
    if cell.verdict == "contradicted":
        return "Do not expect the paper's gain: one of its size is ruled out at this scale."
    near = f"one within {markdown.count(int(MARGIN), 'point')} of the paper's is not ruled out"
    return f"Before AdamW no gain was shown, and {near}; {own}."


def draw(groups: Groups, folder: Path) -> None:
    """Draws `autoscale` minus the plain optimizer in each study, beside the paper's numbers."""
    rows: list[tuple[str, Contrast]] = []
    seen = set()
    for study in BY_SCALE:
        for family in families(study, groups[study]):
            for each in family.contrasts:
                estimate = each.comparison.estimate
                if (each.method, each.baseline) != ("autoscale", "none"):
                    continue
                if math.isnan(estimate.standard_error) or any(each.comparison.diverged):
                    continue
                runs = same_runs(each.group.arms["autoscale"])
                if runs not in seen:
                    plain = method_label("none", each.group.optimizer)
                    label = f"{MODELS[each.group.model].label}, {plain}\n"
                    label += f"{each.group.scale}, n = {estimate.n}"
                    rows.append((label, each))
                seen.add(runs)
    with figures.figure_of(folder / "verdict", (5, 1.2 + 0.4 * max(len(rows), 1))) as figure:
        forest(figure, rows)


def forest(figure: Figure, rows: Sequence[tuple[str, Contrast]]) -> None:
    """Intervals of differences, one below the other."""
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    paper: list[tuple[float, int]] = []
    for place, (_, each) in enumerate(rows):
        estimate, spec = each.comparison.estimate, METHODS["autoscale"]
        # Without the last digits, which the version of NumPy or SciPy may change.
        value, low, high = (round(number, 6) for number in (estimate.value, *estimate.interval()))
        axes.plot([low, high], [place, place], color=spec.color, linewidth=1.5)
        axes.plot(
            value,
            place,
            "o",
            color=spec.color,
            label="" if place else "here, 95% interval",
        )
        if each.group.optimizer == "adamw" and each.group.model in PAPER_ACCURACY:
            claimed = PAPER_ACCURACY[each.group.model]
            paper.append((claimed["autoscale"] - claimed["none"], place))
    if paper:
        x, y = zip(*paper, strict=True)
        axes.plot(x, y, "D", color="black", fillstyle="none", label="the paper, CIFAR-100")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test accuracy, Autoscale minus plain, points")
    if rows:
        figure.legend(loc="outside upper center", ncols=2)
