"""The differences that a study tests or describes, fixed before its runs, and their results."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from reproduction import inference
from reproduction.groups import Group
from reproduction.inference import ALPHA, Comparison, Verdict

# Added after the ablation was planned.
EXPLORATORY = ("autoscale_direction", "autoscale_norm")
STRONGER = "none x2.1"  # the penalty that `autoscale` may amount to: STUDIES["cifar100"].plan

Kind = Literal["primary", "family", "descriptive", "exploratory"]


class Contrast(NamedTuple):
    """A difference of two arms of a group: method minus baseline."""

    group: Group
    method: str  # a key of the group's arms
    baseline: str
    comparison: Comparison
    corrected: float = math.nan  # p-value over its family, by Holm
    family: int = 0  # contrasts that are tested together; 0 if it is only described

    @property
    def labels(self) -> tuple[str, str]:
        """The two arms' names."""
        return self.group.arms[self.method].label, self.group.arms[self.baseline].label

    @property
    def significant(self) -> bool:
        """Whether a difference is claimed."""
        return self.family > 0 and self.corrected < ALPHA

    @property
    def equivalent(self) -> bool:
        """Whether it was shown to be within the margin, corrected for the family's size."""
        if not self.family or any(self.comparison.diverged):
            return False
        return self.comparison.estimate.equivalence(alpha=ALPHA / self.family).shown

    def verdict(self, claimed: float) -> Verdict:
        """Judges the claim of a difference of so many points."""
        if not self.family:
            return "not tested"
        return inference.verdict_on_difference(
            self.comparison, claimed, p_value=self.corrected, family=self.family
        )


class Family(NamedTuple):
    """Contrasts that are corrected together, or that are only described."""

    title: str
    kind: Kind
    contrasts: list[Contrast]

    @property
    def missing(self) -> int:
        """How many planned runs its tests wait for."""
        by_group = {each.group.title: each.comparison.missing for each in self.contrasts}
        return sum(by_group.values())


def families(preset: str, groups: Sequence[Group]) -> list[Family]:
    """The contrasts of a study.

    Those of the studies on CIFAR-100 are in their plan. Every other study has two families over all
    of its groups: every method against the plain optimizer, and `autoscale` against every other
    method. The residuals of a group's planned arms are pooled, so a group is tested once all of
    their runs are in.
    """
    found = _cifar100(groups) if preset in ("cifar100", "cifar100-gpu") else _other(groups)
    return [family for family in found if family.contrasts]


def _cifar100(groups: Sequence[Group]) -> list[Family]:
    adamw, adam = (
        next(each for each in groups if each.optimizer == name) for name in ("adamw", "adam")
    )
    halves, parts = ("scaling", "centering"), ("none", "autoscale", "scaling", "centering")
    baselines = ("gradient_normalization", "gradient_centralization", "zscore")
    pairs = [(method, "none") for method in baselines]
    pairs += [("autoscale", method) for method in baselines]
    return [
        _family(
            "A, primary: Autoscale before AdamW",
            "primary",
            _tests(adamw, [("autoscale", "none")], ("none", "autoscale")),
        ),
        _family(
            "B: which half acts, before AdamW",
            "family",
            _tests(adamw, [(method, "none") for method in halves], parts),
        ),
        _family(
            "C, the mechanism: Adam with an L2 penalty",
            "descriptive",
            _descriptions(
                adam,
                [
                    ("autoscale", "none"),
                    ("autoscale", STRONGER),
                    (STRONGER, "none"),
                    ("none x4", STRONGER),
                ],
            ),
        ),
        _family("The baselines, before AdamW", "descriptive", _descriptions(adamw, pairs)),
    ]


def _other(groups: Sequence[Group]) -> list[Family]:
    pairs: dict[str, list[Contrast]] = {"plain": [], "ours": [], "exploratory": []}
    for group in groups:
        planned = [key for key, arm in group.arms.items() if arm.seeds and key not in EXPLORATORY]
        for name, found in inference.families(planned).items():
            pairs[name] += _tests(group, found, planned)
        later = [key for key in EXPLORATORY if key in group.arms]
        compared = [(key, other) for key in later for other in ("none", "autoscale")]
        pairs["exploratory"] += _descriptions(group, compared)
    return [
        _family("Every method against the plain optimizer", "family", pairs["plain"]),
        _family("Autoscale against every other method", "family", pairs["ours"]),
        _family(
            "Grafting: the norm of one, the direction of another",
            "exploratory",
            pairs["exploratory"],
        ),
    ]


def _family(title: str, kind: Kind, contrasts: list[Contrast]) -> Family:
    if kind in ("primary", "family"):
        size = len(contrasts)
        p_values = inference.holm(
            {number: each.comparison.p_value for number, each in enumerate(contrasts)}
        )
        contrasts = [
            each._replace(corrected=p_values[number], family=size)
            for number, each in enumerate(contrasts)
        ]
    return Family(title, kind, contrasts)


def _tests(group: Group, pairs: Iterable[tuple[str, str]], pool: Sequence[str]) -> list[Contrast]:
    """Contrasts that wait for all planned runs of the arms whose residuals are pooled."""
    missing = sum(group.arms[key].missing for key in pool)
    accuracies = {} if missing else group.accuracies(pool)
    return [
        Contrast(group, *pair, inference.compare(accuracies, *pair)._replace(missing=missing))
        for pair in pairs
    ]


def _descriptions(group: Group, pairs: Iterable[tuple[str, str]]) -> list[Contrast]:
    """Contrasts over the available runs."""
    accuracies = group.accuracies(group.arms)
    return [
        Contrast(group, *pair, inference.compare(accuracies, *pair))
        for pair in pairs
        if group.arms[pair[0]].runs and group.arms[pair[1]].runs
    ]
