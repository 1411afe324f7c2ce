"""The statistics of a study: the differences of its arms, and when they are tested.

Seeds are blocks: runs of one seed share their initial parameters and their batches, so arms are
compared within seeds. What is fixed here, before the runs:

- *Tests.* A study's families of contrasts come from its plan (`Study.families`). A primary contrast
  is tested by itself at ``ALPHA``, a family with Holm's correction over all contrasts that were
  planned for it. Exploratory ones claim nothing.
- *A contrast* comes from a linear model with seed and arm as factors, over all arms of its family's
  pool. With two arms that is the paired t-test. With more, their residuals are pooled, which gives
  small arms enough degrees of freedom, and assumes that all arms have the same variance.
- *Three different questions.* The interval says which differences are compatible with the runs;
  equivalence (two one-sided tests, Schuirmann 1987) whether the difference has been shown to be
  smaller than the outcome's margin; the detectable difference how large a true one had to be for
  the test to find it. "Not significant" is neither "equal" nor "equivalent".
- *Divergence* is an outcome, and the worst. If a run of either arm diverged, its outcome does not
  exist, and a mean over the others would reward an arm for losing its hardest seeds. So the t-test
  and equivalence are not made, and an exact sign test over all shared seeds decides instead: a
  diverged run is worse than every finished one, and two of them are a tie. It needs at least 6
  seeds to reach 0.05.
- *A contrast is tested once*, when all planned runs of its pool are in.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import optimize, stats
from statsmodels.formula.api import ols
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW
from statsmodels.tools.sm_exceptions import SingularMatrixWarning

from reproduction.records import Table
from reproduction.studies import ACCURACY, Family, Study
from training.options import Experiment

ALPHA = 0.05
POWER = 0.8
RESOLUTION = 1e-9  # a spread below it is rounding: accuracies differ by whole images

TESTED = ("primary", "family")
INTERVALS = ("value", "low", "high", "inner_low", "inner_high", "welch_low", "welch_high")
Weights = Mapping[str, float]


def differences(study: Study, runs: Table) -> Table:
    """The contrasts of a study.

    Args:
      study: whose plan says which contrasts there are.
      runs: its table of runs, from `records.table`.

    Returns:
      A row for each contrast of each group, by family. In the units of the study's outcome, and of
      the runs at the learning rates that were chosen:

      - family, kind, group, repeat, label: which contrast it is, such as "Autoscale minus AdamW";
      - missing: the planned runs that its test waits for; while there are any, there is no number;
      - value, low, high: the difference, and its 95% interval;
      - error, df, n: standard error, degrees of freedom, and seeds in which all its arms finished;
      - by_seed: the difference in each of those, a Series;
      - p_value, corrected, size: of the test that decides, over its family, and the family's size;
      - equivalence, inner_low, inner_high: p of the two one-sided tests at ``ALPHA / size``, and
        the interval that lies within the margin if and only if they are significant;
      - detectable: the true difference that is found with a probability of ``POWER``;
      - welch_low, welch_high: Welch's interval, which ignores the pairing;
      - diverged, above, below, ties: runs of both arms that diverged, and the signs over all seeds.

      What does not exist is NaN: of one run, or where all differences are equal.
    """
    planned = runs[runs["planned"]]
    parts = [
        (study.families(arms_of(there)), there.assign(group=group, repeat=repeat))
        for (repeat, group), there in planned.groupby(["repeat", "group"], sort=False)
    ]
    rows: list[dict[str, Any]] = []
    for families, there in [*parts, *_over_devices(study, planned)]:
        models: dict[tuple[str, ...], Model] = {}
        for family in families:
            rows += _family(study, family, there, models)
    if not rows:
        return pd.DataFrame()
    by_family = pd.DataFrame(rows).groupby(["repeat", "family"], sort=False)
    corrected = [_corrected(family, study.outcome.margin) for _, family in by_family]
    # Without the last digits, which the version of NumPy or SciPy may change.
    return pd.concat(corrected, ignore_index=True).round(dict.fromkeys(INTERVALS, 6))


def arms_of(runs: Table) -> dict[str, Experiment]:
    """The first run of each arm, by label."""
    first = runs.drop_duplicates("arm")
    return dict(zip(first["arm"], first["experiment"], strict=True))


def _family(
    study: Study, family: Family, runs: Table, models: dict[tuple[str, ...], "Model"]
) -> list[dict[str, Any]]:
    """The contrasts of a family in one group; `models` are those that were fitted there."""
    arms = tuple(family.pool or runs["arm"].unique())
    pool, kind = runs[runs["arm"].isin(arms)], family.kind
    missing = int(pool["state"].isin(("missing", "unfinished")).sum())
    if missing and not study.preset:
        kind = "descriptive"  # a study of one's own shows what there is, and tests nothing
    waits = missing > 0 and kind in TESTED
    there = pool[pool["state"].isin(() if waits else ("finished", "diverged")) & pool["chosen"]]
    model = models[arms] = models.get(arms) or Model(there, study.outcome.diverged)
    where = {key: runs[key].iloc[0] for key in ("group", "repeat")}
    return [
        where
        | {"family": family.title, "kind": kind, "missing": missing, "label": label(weights)}
        | model.contrast(weights)
        for weights in family.contrasts
        if kind in TESTED or set(weights) <= set(there["arm"])
    ]


def _over_devices(study: Study, runs: Table) -> list[tuple[list[Family], pd.DataFrame]]:
    """The primary contrasts of the mean over a study's devices, once all runs of these are in."""
    found = []
    if runs["repeat"].nunique() > 1:
        for _, there in runs.groupby(list(study.groups), sort=False):
            for family in study.families(arms_of(there)):
                pool = there[there["arm"].isin(family.pool) & there["chosen"]]
                if family.kind == "primary" and pool["outcome"].notna().all():
                    title = study.group(pool["experiment"].iloc[0]) + ", mean over devices"
                    mean = pool.groupby(["arm", "seed"], as_index=False)["outcome"].mean()
                    mean = mean.assign(state="finished", chosen=True, group=title, repeat="all")
                    found.append(([family._replace(kind="descriptive")], mean))
    return found


def label(weights: Weights) -> str:
    """A contrast in words.

    >>> label({"A": 1, "B": -1}), label({"A": 1, "B": -0.5, "C": -0.5})
    ('A minus B', 'A minus the midpoint of B and C')
    """
    ours, *others = weights
    return f"{ours} minus {'the midpoint of ' * (len(others) > 1)}{' and '.join(others)}"


class Model:
    """The linear model: outcome = seed + arm + residual, by least squares.

    The design may be unbalanced. Runs that diverged are left out of it, and a seed with a single
    run carries no information about differences.

    Args:
      runs: rows with arm, seed, and outcome, NaN for a run that diverged. Each arm is an experiment
        of its own: one whose runs equal another's to the bit would count the same residuals twice.
      diverged: the outcome of a run that diverged, in the sign test.
    """

    def __init__(self, runs: Table, diverged: float = ACCURACY.diverged):
        self._runs, self._diverged = runs, diverged
        finished = runs.dropna(subset=["outcome"])
        self._by_seed = runs.pivot(index="seed", columns="arm", values="outcome")
        self._fit: Any = None
        with warnings.catch_warnings():
            # Some contrasts may be determined all the same: `_estimate` knows which.
            warnings.simplefilter("ignore", SingularMatrixWarning)
            if len(finished):
                self._fit = ols("outcome ~ 0 + C(arm) + C(seed)", finished).fit()

    def contrast(self, weights: Weights) -> dict[str, Any]:
        """A contrast of arms, with the columns of `differences` that concern it alone.

        Args:
          weights: of the arms, with a sum of 0: ``{"Autoscale": 1, "AdamW": -1}``.

        Raises:
          ValueError: if the weights do not sum to 0.

        Example:
          >>> arms, seeds = ["A"] * 3 + ["B"] * 3, [0, 1, 2] * 2
          >>> outcomes = [51.0, 54.0, 51.0, 50.0, 52.0, 51.0]
          >>> runs = pd.DataFrame({"arm": arms, "seed": seeds, "outcome": outcomes})
          >>> found = Model(runs).contrast({"A": 1, "B": -1})
          >>> round(found["value"], 3), round(found["p_value"], 3), found["n"]
          (1.0, 0.225, 3)
        """
        if abs(sum(weights.values())) > 1e-9:
            raise ValueError(f"the weights of a contrast sum to 0, these do not: {dict(weights)}")
        arms = self._by_seed.reindex(columns=list(weights))
        by_seed = (arms.dropna() * pd.Series(weights)).sum(axis=1)
        value, error, df = self._estimate(weights)
        half = stats.t.isf(ALPHA / 2, df) * error
        # A diverged run is worse than every finished one.
        there = {arm: self._runs[self._runs["arm"] == arm].set_index("seed") for arm in weights}
        diverged = tuple(int(runs["outcome"].isna().sum()) for runs in there.values())
        first, second, *_ = (runs["outcome"].fillna(self._diverged) for runs in there.values())
        signs = np.sign(first - second).dropna()  # of the seeds that both have
        above, below = int((signs > 0).sum()), int((signs < 0).sum())
        p_value = float(2 * stats.t.sf(abs(value / error), df))
        if any(diverged):
            p_value = sign_test(above, below)
        samples = [runs["outcome"].dropna() for runs in there.values()]
        welch_low, welch_high = welch(*samples) if len(samples) == 2 else (math.nan, math.nan)
        return {
            **{"value": value, "low": value - half, "high": value + half},
            **{"error": error, "df": df, "n": len(by_seed), "by_seed": by_seed},
            **{"p_value": p_value, "welch_low": welch_low, "welch_high": welch_high},
            **{"diverged": diverged, "above": above, "below": below},
            "ties": len(signs) - above - below,
        }

    def _estimate(self, weights: Weights) -> tuple[float, float, float]:
        """A contrast, its standard error, and its degrees of freedom."""
        names = [] if self._fit is None else self._fit.model.exog_names
        columns = {f"C(arm)[{arm}]": weight for arm, weight in weights.items()}
        if self._fit is None or not set(columns) <= set(names):
            return math.nan, math.nan, math.nan
        design, vector = self._fit.model.exog, np.array([columns.get(name, 0) for name in names])
        # Runs determine a contrast if some combination of them has its expectation.
        if not np.allclose(vector @ np.linalg.pinv(design) @ design, vector):
            return math.nan, math.nan, math.nan
        value, df = float(vector @ self._fit.params), float(self._fit.df_resid)
        error = self._fit.t_test(vector).sd.item() if df else math.nan
        if not error > RESOLUTION:  # NaN included
            return value, math.nan, math.nan
        return value, error, df


def _corrected(family: Table, margin: float) -> Table:
    """A family with what depends on its size."""
    tested = family["kind"].isin(TESTED).all()
    size = len(family) if tested else 1
    df, error, p_value = family["df"], family["error"], family["p_value"]
    sure = ~family["diverged"].map(any)  # a difference of means exists
    above = stats.t.sf((family["value"] + margin) / error, df)
    below = stats.t.cdf((family["value"] - margin) / error, df)
    half = stats.t.isf(ALPHA / size, df) * error
    detectable = [
        noncentrality(each, ALPHA / size) * scale for each, scale in zip(df, error, strict=True)
    ]
    return family.assign(
        p_value=p_value if tested else math.nan,
        corrected=holm(p_value) if tested else math.nan,
        size=size,
        equivalence=np.where(sure & tested, np.maximum(above, below), math.nan),
        inner_low=np.where(sure & tested, family["value"] - half, math.nan),
        inner_high=np.where(sure & tested, family["value"] + half, math.nan),
        detectable=np.where(sure & tested, detectable, math.nan),
    )


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's correction over a family, which is all of it: NaN for a test that could not be made.

    Such a test counts as one with p = 1, so that the family keeps its planned size.

    Example:
      >>> holm([0.01, 0.03, float("nan")])
      array([0.03, 0.06,  nan])
    """
    p_values = np.asarray(p_values, float)
    unknown = np.isnan(p_values)
    corrected: Any = multipletests(np.where(unknown, 1.0, p_values), method="holm")[1]
    return np.where(unknown, math.nan, corrected)


def noncentrality(df: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """The true value, in standard errors, at which a two-sided t-test has the given power.

    The square of a noncentral t is a noncentral F, whose distribution SciPy computes where that of
    t fails in the far tail (`TTestIndPower.solve_power` of statsmodels returns 10, where its search
    began, for 2 degrees of freedom at 0.05 / 12).

    Example:
      >>> round(noncentrality(df=2, alpha=0.05 / 12), 1)
      19.6
    """
    if math.isnan(df):
        return math.nan
    critical = float(stats.t.isf(alpha / 2, df))

    def missing(value: float) -> float:
        return power - float(stats.ncf.sf(critical**2, 1, df, value**2))

    high = critical
    while missing(high) > 0:
        high *= 2
    return float(np.asarray(optimize.brentq(missing, 0, high)))


def sign_test(above: int, below: int) -> float:
    """The exact two-sided sign test."""
    return float(stats.binomtest(above, above + below).pvalue) if above + below else 1.0


def welch(values: Sequence[float], others: Sequence[float]) -> Any:
    """Welch's 95% interval of a difference of means; NaN with fewer than two on a side."""
    if min(len(values), len(others)) < 2 or np.std(values) + np.std(others) < RESOLUTION:
        return math.nan, math.nan
    means = CompareMeans(DescrStatsW(values), DescrStatsW(others))
    return means.tconfint_diff(ALPHA, usevar="unequal")


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean; NaN where the spread cannot be estimated."""
    if len(values) < 2 or np.std(values) < RESOLUTION:
        return math.nan, math.nan
    return DescrStatsW(values).tconfint_mean(ALPHA)
