"""The statistics of a study: which conclusions about a difference are drawn, and when.

Seeds are blocks: two runs of one seed share their initial parameters and their batches, so methods
are compared within seeds. Everything here is fixed before the runs and takes only numbers: final
test accuracies in percent, by method and seed, None or NaN for a run that diverged.

- *Tests.* A study has one primary contrast, tested by itself at ``ALPHA``, and families of further
  contrasts (:func:`families`), each with Holm's correction over all contrasts that were planned for
  it. Later analyses are called exploratory, and claim nothing.
- *A contrast* (:func:`compare`) comes from a linear model with seed and method as factors, over all
  arms that it is given. With two arms that is the paired t-test; the primary contrast is given its
  own two arms only. With more, the residuals of all arms are pooled, which gives small arms enough
  degrees of freedom but assumes that all arms have the same variance.
- *Three different questions.* The interval says which differences are compatible with
  the runs; equivalence (TOST) says whether the difference has been shown to be smaller than a
  margin; the detectable difference says how large a true one had to be for the test to find it.
  "Not significant" is neither "equal" nor "equivalent".
- *Divergence* is an outcome, and the worst. If a run of either arm diverged, its final accuracy
  does not exist, and a mean over the others would reward a method for losing its hardest seeds. The
  t-test then only describes the seeds in which both runs finished, and equivalence is not tested.
  An exact sign test over all shared seeds decides instead: a diverged run is below every finished
  one, and two diverged runs are a tie. It needs at least 6 seeds to reach 0.05; where it is not
  significant, the verdict is *not tested*, never *not distinguished*.
- *A contrast is tested once*, when all of its planned runs are in.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

ALPHA = 0.05
POWER = 0.8
MARGIN = 1.0  # points of accuracy; a smaller difference would not decide which method to use
RESOLUTION = 1e-9  # a spread below it is rounding: accuracies differ by whole images

Accuracies = Mapping[str, Mapping[int, float | None]]  # percent, by method and seed
Verdict = Literal["supported", "contradicted", "not distinguished", "not tested"]
Key = TypeVar("Key", bound=Hashable)


class Equivalence(NamedTuple):
    """Whether a difference was shown to be smaller than a margin: two one-sided t-tests."""

    p_value: float  # the larger of the two
    low: float  # of the interval that lies within the margin if and only if p_value < alpha
    high: float
    shown: bool


class Estimate(NamedTuple):
    """A mean or a difference of means, with Student's t.

    All of it is NaN where the spread cannot be estimated: with fewer than two values, or values
    that are all equal.
    """

    value: float
    standard_error: float
    df: float
    deviation: float  # standard deviation of one value: of one seed's difference, if it is one
    n: int  # values: seeds in which both runs finished

    @property
    def p_value(self) -> float:
        """Of the two-sided test that the true value is 0."""
        return float(2 * stats.t.sf(abs(self.value / self.standard_error), self.df))

    def interval(self, level: float = 1 - ALPHA) -> tuple[float, float]:
        """The confidence interval."""
        half = float(stats.t.isf((1 - level) / 2, self.df)) * self.standard_error
        return self.value - half, self.value + half

    def equivalence(self, margin: float = MARGIN, alpha: float = ALPHA) -> Equivalence:
        """Whether the true value lies within ``-margin`` to ``margin``, by TOST.

        Args:
          margin: the largest difference that would not matter.
          alpha: the level of each of the two one-sided tests, hence of both together; the interval
            is that of level ``1 - 2 * alpha``.

        References:
          Schuirmann, `A comparison of the two one-sided tests procedure and the power approach
          <https://doi.org/10.1007/BF01068419>`_, 1987
        """
        above = stats.t.sf((self.value + margin) / self.standard_error, self.df)
        below = stats.t.cdf((self.value - margin) / self.standard_error, self.df)
        p_value = float(max(above, below))
        return Equivalence(p_value, *self.interval(1 - 2 * alpha), p_value < alpha)

    def detectable(self, alpha: float = ALPHA, power: float = POWER) -> float:
        """The smallest true value that the test would find with a probability of ``power``.

        It assumes that the observed spread is the true one, which is rough with few seeds.

        Args:
          alpha: the level of the test that was made; for one of a family, ``ALPHA`` over the
            family's size, which is where Holm's correction begins.
          power: more than ``alpha``.
        """
        if math.isnan(self.standard_error):
            return math.nan
        return noncentrality(self.df, alpha, power) * self.standard_error


def noncentrality(df: float, alpha: float = ALPHA, power: float = POWER) -> float:
    """The true value, in standard errors, at which a two-sided t-test has the given power.

    The square of a noncentral t is a noncentral F, whose distribution SciPy computes where that of
    t fails in the far tail (`TTestIndPower.solve_power` returns 10, where its search began, for 2
    degrees of freedom at 0.05 / 12).

    Example:
      >>> round(noncentrality(df=2, alpha=0.05 / 12), 1)
      19.6
    """
    critical = float(stats.t.isf(alpha / 2, df))

    def missing(value: float) -> float:
        return power - float(stats.ncf.sf(critical**2, 1, df, value**2))

    high = critical
    while missing(high) > 0:
        high *= 2
    return float(np.asarray(optimize.brentq(missing, 0, high)))


def mean(values: ArrayLike) -> Estimate:
    """The mean of independent values: of seeds, or of paired differences."""
    values = np.asarray(values, np.float64)
    n = len(values)
    deviation = values.std(ddof=1) if n > 1 else math.nan
    value = values.mean() if n else math.nan
    return _estimate(value, deviation / math.sqrt(n or 1), n - 1, deviation, n)


def linear_contrast(accuracies: Accuracies, weights: Mapping[str, float]) -> Estimate:
    """A contrast of methods in the model: accuracy = seed + method + residual, by least squares.

    The design may be unbalanced: methods with different seeds or numbers of seeds, and diverged
    runs, which are left out. A seed with a single run carries no information about differences, and
    changes nothing. For two methods alone this is their paired t-test.

    Args:
      accuracies: all arms whose residuals are pooled, each an experiment of its own: one whose
        runs equal another's to the bit would count the same residuals twice.
      weights: of the methods, with a sum of 0: ``{"autoscale": 1, "none": -1}`` is a difference;
        ``{"autoscale": 1, "none": -0.5, "strong": -0.5}`` compares it with the midpoint of two.

    Returns:
      The estimate, with n the seeds in which all weighted methods finished, and the deviation that
      of this contrast in one seed. NaN where the runs do not determine it, and where no degrees of
      freedom or no residuals are left.

    Raises:
      ValueError: if the weights do not sum to 0.

    Example:
      >>> runs = {"none": {0: 50.0, 1: 52.0, 2: 51.0}, "autoscale": {0: 51.0, 1: 54.0, 2: 51.0}}
      >>> estimate = linear_contrast(runs, {"autoscale": 1, "none": -1})
      >>> float(round(estimate.value, 3)), float(round(estimate.deviation, 3)), estimate.n
      (1.0, 1.0, 3)
    """
    if abs(sum(weights.values())) > 1e-9:
        raise ValueError(f"the weights of a contrast sum to 0, these do not: {dict(weights)}")
    finished = _finished(accuracies)
    seeds = sorted({seed for _, seed in finished})
    shared = [seed for seed in seeds if all((method, seed) in finished for method in weights)]
    columns = [*accuracies, *seeds]
    design = np.array([[column in run for column in columns] for run in finished], np.float64)
    design = design.reshape(-1, len(columns))  # of no runs, too
    contrast = np.array(
        [*(weights.get(method, 0.0) for method in accuracies), *(0.0 for _ in seeds)]
    )
    values = np.array(list(finished.values()))
    solve = np.linalg.pinv(design)
    estimator = contrast @ solve  # of the contrast: a weight for each run
    # Runs determine a contrast if some combination of them has its expectation.
    if not np.allclose(estimator @ design, contrast):
        return _estimate(math.nan, math.nan, 0, math.nan, len(shared))
    df = len(values) - int(np.linalg.matrix_rank(design))
    residuals = values - design @ (solve @ values)
    residual = math.sqrt(residuals @ residuals / df) if df else math.nan
    value, error = float(estimator @ values), residual * float(np.linalg.norm(estimator))
    deviation = residual * math.hypot(*weights.values())
    return _estimate(value, error, df, deviation, len(shared))


class Welch(NamedTuple):
    """The difference of two means without the pairing, as a description."""

    difference: float
    low: float  # of the 95% interval
    high: float
    p_value: float


def welch(accuracies: Accuracies, method: str, baseline: str) -> Welch:
    """Welch's test over all runs that finished; NaN with fewer than two on a side."""
    finished = _finished(accuracies)
    samples = [
        np.array([value for (arm, _), value in finished.items() if arm == name])
        for name in (method, baseline)
    ]
    if min(map(len, samples)) < 2 or sum(values.std() for values in samples) < RESOLUTION:
        return Welch(math.nan, math.nan, math.nan, math.nan)
    # By hand, as SciPy warns of a sample whose values are all the same.
    squares = [values.var(ddof=1) / len(values) for values in samples]
    df = sum(squares) ** 2 / sum(
        square**2 / (len(values) - 1) for square, values in zip(squares, samples, strict=True)
    )
    difference, error = float(samples[0].mean() - samples[1].mean()), math.sqrt(sum(squares))
    estimate = Estimate(difference, error, float(df), math.nan, sum(map(len, samples)))
    return Welch(difference, *estimate.interval(), estimate.p_value)


class Comparison(NamedTuple):
    """A method compared with a baseline, by their final accuracies."""

    estimate: Estimate  # over the runs that finished; of none, if planned runs are missing
    above: int  # shared seeds in which the method is above the baseline,
    below: int  # below it; the others are ties. A diverged run is below every finished one.
    ties: int
    diverged: tuple[int, int]  # runs of the method, and of the baseline, that diverged,
    runs: tuple[int, int]  # of so many
    missing: int  # planned runs without a record

    @property
    def p_value(self) -> float:
        """Of the test that decides: the t-test, or the exact sign test if any run diverged."""
        if self.missing:
            return math.nan
        return sign_test(self.above, self.below) if any(self.diverged) else self.estimate.p_value


def compare(
    accuracies: Accuracies, method: str, baseline: str, *, seeds: Sequence[int] = ()
) -> Comparison:
    """Compares two methods over their seeds.

    Args:
      accuracies: all arms whose residuals are pooled: for the primary contrast its own two, for a
        family all arms of one recipe.
      method: what is compared.
      baseline: what it is compared with.
      seeds: those that were planned; before all are in, nothing is tested.

    Example:
      >>> plain = {0: 50.0, 1: 51.0, 2: 52.0, 3: 50.0, 4: 51.0}
      >>> ours = {0: 51.0, 1: 52.1, 2: None, 3: None, 4: None}
      >>> comparison = compare({"none": plain, "autoscale": ours}, "autoscale", "none")
      >>> comparison.diverged, comparison.above, comparison.below, comparison.p_value
      ((3, 0), 2, 3, 1.0)
    """
    arms = [accuracies.get(name, {}) for name in (method, baseline)]
    finished = _finished(accuracies)
    signs = [
        np.sign(_rank(finished, method, seed) - _rank(finished, baseline, seed))
        for seed in arms[0]
        if seed in arms[1]
    ]
    missing = sum(seed not in arm for arm in arms for seed in seeds)
    if missing or not all(arms):
        estimate = _estimate(math.nan, math.nan, 0, math.nan, 0)
    else:
        estimate = linear_contrast(accuracies, {method: 1, baseline: -1})
    diverged = [
        sum((name, seed) not in finished for seed in arm)
        for name, arm in zip((method, baseline), arms, strict=True)
    ]
    return Comparison(
        estimate,
        *(signs.count(sign) for sign in (1, -1, 0)),
        diverged=(diverged[0], diverged[1]),
        runs=(len(arms[0]), len(arms[1])),
        missing=missing,
    )


def sign_test(above: int, below: int) -> float:
    """The exact two-sided sign test; of two kinds of discordant pairs, McNemar's exact test."""
    return float(stats.binomtest(above, above + below).pvalue) if above + below else 1.0


def families(
    methods: Sequence[str], ours: str = "autoscale", plain: str = "none"
) -> dict[str, list[tuple[str, str]]]:
    """The two families of a study, as pairs of a method and its baseline; no pair is in both.

    Example:
      >>> families(["none", "zscore", "autoscale"])
      {'plain': [('zscore', 'none'), ('autoscale', 'none')], 'ours': [('autoscale', 'zscore')]}
    """
    others = [method for method in methods if method != plain]
    return {
        "plain": [(method, plain) for method in others] if plain in methods else [],
        "ours": [(ours, method) for method in others if method != ours] if ours in methods else [],
    }


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's correction over a family, which is all of it: NaN for a test that could not be made.

    Such a test counts as one with p = 1, so that the family keeps its planned size.

    Example:
      >>> holm({"a": 0.01, "b": 0.03, "c": float("nan")})
      {'a': 0.03, 'b': 0.06, 'c': nan}
    """
    known = {key: 1.0 if math.isnan(value) else value for key, value in p_values.items()}
    corrected, largest = {}, 0.0
    for tests_before, key in enumerate(sorted(known, key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - tests_before) * known[key]))
        corrected[key] = largest
    return {key: math.nan if math.isnan(p_values[key]) else corrected[key] for key in p_values}


def verdict_on_difference(
    comparison: Comparison,
    claimed: float,
    *,
    p_value: float | None = None,
    family: int = 1,
    margin: float = MARGIN,
    alpha: float = ALPHA,
) -> Verdict:
    """Judges a claim such as "2.0 points above the baseline".

    The claim has a direction and a size. The direction is tested against 0. The size is taken with
    the margin as its tolerance, since the claimed number has an error of its own:

    - *contradicted*: there is a significant difference in the other direction; or the difference is
      significantly below the claimed one less the margin (one-sided), be it 0 or only smaller.
    - *supported*: otherwise, if there is a significant difference in the claimed direction.
    - *not distinguished*: otherwise. Neither 0 nor the claimed size can be excluded.
    - *not tested*: planned runs are missing, or there is no spread to test with.

    A claim of 0, "the same accuracy", is supported by equivalence, and contradicted by a
    significant difference without it. If a run diverged, only the exact sign test decides:
    *supported* or *contradicted* where it is significant, *not tested* where it is not, since a
    difference of means does not exist.

    Args:
      comparison: from :func:`compare`.
      claimed: the claimed difference in points, with its sign.
      p_value: the corrected one, for a contrast of a family. Default: the comparison's own.
      family: the number of contrasts in the family; the bound on the size and the equivalence are
        tested at ``alpha / family``.
      margin: points of accuracy that do not matter.
      alpha: the level, over the family.
    """
    p_value = comparison.p_value if p_value is None else p_value
    if math.isnan(p_value):
        return "not tested"
    significant = p_value < alpha
    direction = math.copysign(1, claimed)
    if any(comparison.diverged):
        if not significant:
            return "not tested"
        agrees = claimed != 0 and (comparison.above > comparison.below) == (direction > 0)
        return "supported" if agrees else "contradicted"
    estimate = comparison.estimate
    if claimed == 0:
        if estimate.equivalence(margin, alpha / family).shown:
            return "supported"
        return "contradicted" if significant else "not distinguished"
    found = direction * estimate.value
    largest = found + stats.t.isf(alpha / family, estimate.df) * estimate.standard_error
    if (significant and found < 0) or largest < abs(claimed) - margin:
        return "contradicted"
    return "supported" if significant else "not distinguished"


def verdict_on_every_run(holds: Sequence[bool]) -> Verdict:
    """Judges a claim about every run: one counterexample contradicts it, one run proves nothing.

    For "converges" (the run finished, with its training loss below the first epoch's) and "the
    standard deviation falls in some layers and rises in others".

    Args:
      holds: whether it holds in each of the runs.
    """
    if not all(holds):
        return "contradicted"
    return "supported" if len(holds) > 1 else "not tested"


def verdict_on_bound(series: Sequence[Sequence[float | None]], upper: float = 1.0) -> Verdict:
    """Judges "never above `upper`", such as a_t <= 1, over all recorded epochs of every run.

    It sees what was recorded: an excursion between two records is not ruled out.

    Args:
      series: one for each run; entries that are None or NaN were not recorded. Infinity is above.
      upper: the claimed bound.
    """
    recorded = [
        [value for value in run if value is not None and not math.isnan(value)] for run in series
    ]
    return verdict_on_every_run([max(run) <= upper for run in recorded if run])


def log_change(series: Sequence[Sequence[float | None]]) -> tuple[Estimate, list[float]]:
    """The change of a positive quantity over a run: ln(last / first), by run.

    Args:
      series: one for each run, by epoch, such as the global standard deviation. Entries that are
        None, not finite or not positive are skipped, and so is a run with fewer than two others.

    Returns:
      The mean over the runs, whose exponential is a geometric mean of the factors, and the changes.
    """
    recorded = [
        [value for value in run if value is not None and math.isfinite(value) and value > 0]
        for run in series
    ]
    changes = [math.log(run[-1] / run[0]) for run in recorded if len(run) > 1]
    return mean(changes), changes


def verdict_on_trend(
    series: Sequence[Sequence[float | None]], *, falls: bool = True, alpha: float = ALPHA
) -> Verdict:
    """Judges "falls" or "rises" from the first epoch to the last.

    *Supported* if it does in every run, *contradicted* if it does the opposite in every run, and in
    either case only if the mean change also differs from 0 by a t-test over the runs; a few runs
    may agree by chance. Otherwise *not distinguished*; *not tested* with fewer than
    two runs. The epochs in between are not judged.

    Args:
      series: as in :func:`log_change`.
      falls: the claimed direction.
      alpha: the level of the test.
    """
    estimate, changes = log_change(series)
    if math.isnan(estimate.p_value):
        return "not tested"
    down, up = (all(sign * change > 0 for change in changes) for sign in (-1, 1))
    if estimate.p_value >= alpha or not (down or up):
        return "not distinguished"
    return "supported" if down == falls else "contradicted"


def roughness(curve: Sequence[float], changes: int = 10) -> float:
    """How far a curve jumps late in a run: the standard deviation of its last changes by epoch.

    Unlike the standard deviation of the values, it does not see a steady rise.

    Args:
      curve: test accuracy in percent, by epoch.
      changes: how many of the last changes; all, if there are fewer. NaN with less than two.

    Example:
      >>> roughness([10.0, 20.0, 30.0, 40.0]), roughness([30.0, 31.0, 30.0])
      (0.0, 1.4142135623730951)
    """
    last = np.diff(curve)[-changes:]
    return float(last.std(ddof=1)) if len(last) > 1 else math.nan


class Stability(NamedTuple):
    """A method's stability beside a baseline's, on shared seeds."""

    diverged: tuple[int, int]  # runs of the method, and of the baseline
    seeds: int
    only: tuple[int, int]  # seeds in which the method alone diverged, and the baseline alone
    roughness: Estimate  # its difference, over the seeds in which both finished; in points

    @property
    def divergence_p_value(self) -> float:
        """McNemar's exact test."""
        return sign_test(*self.only)


def compare_stability(
    curves: Mapping[str, Mapping[int, Sequence[float] | None]],
    method: str,
    baseline: str,
    *,
    changes: int = 10,
) -> Stability:
    """Compares divergences, and the roughness of the curves that finished.

    Args:
      curves: test accuracy in percent by epoch, by method and seed; None for a run that diverged.
      method: what is compared.
      baseline: what it is compared with.
      changes: as in :func:`roughness`.
    """
    pairs = [
        (ours, curves[baseline][seed])
        for seed, ours in curves[method].items()
        if seed in curves[baseline]
    ]
    return Stability(
        (sum(ours is None for ours, _ in pairs), sum(theirs is None for _, theirs in pairs)),
        len(pairs),
        (
            sum(ours is None and theirs is not None for ours, theirs in pairs),
            sum(ours is not None and theirs is None for ours, theirs in pairs),
        ),
        mean(
            [
                roughness(ours, changes) - roughness(theirs, changes)
                for ours, theirs in pairs
                if ours is not None and theirs is not None
            ]
        ),
    )


def verdict_on_stability(stability: Stability, alpha: float = ALPHA) -> Verdict:
    """Judges "more stable than the baseline".

    Two outcomes, each at ``alpha / 2``: which diverges more often, and whose late epochs are
    rougher. *Supported* if at least one is significantly in favor of the method, none significantly
    against it, and it did not diverge in more seeds; *contradicted* the other way round. Otherwise
    *not distinguished*; *not tested* with fewer than two shared seeds.
    """
    if stability.seeds < 2:
        return "not tested"
    alone, baseline_alone = stability.only
    outcomes = [
        np.sign(alone - baseline_alone) * (stability.divergence_p_value < alpha / 2),
        np.sign(stability.roughness.value) * (stability.roughness.p_value < alpha / 2),
    ]
    outcomes = [int(outcome) if math.isfinite(outcome) else 0 for outcome in outcomes]
    if -1 in outcomes and 1 not in outcomes and alone <= baseline_alone:
        return "supported"
    if 1 in outcomes and -1 not in outcomes and baseline_alone <= alone:
        return "contradicted"
    return "not distinguished"


def in_words(
    comparison: Comparison,
    method: str,
    baseline: str,
    *,
    corrected: float | None = None,
    family: int = 1,
    margin: float | None = MARGIN,
    exploratory: bool = False,
) -> str:
    """The conclusions from a comparison, in sentences.

    Args:
      comparison: from :func:`compare`.
      method: its name in the sentences.
      baseline: the name of the baseline.
      corrected: p after Holm's correction, for a contrast of a family.
      family: the number of contrasts in it; equivalence is tested, and the detectable difference
        computed, at ``ALPHA / family``.
      margin: of equivalence in points, or None to leave it out.
      exploratory: whether it was not planned; then this is said first, and nothing is called
        significant or equivalent.

    Example:
      >>> plain = {0: 50.0, 1: 51.0, 2: 52.0, 3: 50.0}
      >>> ours = {0: 50.1, 1: 50.9, 2: 52.3, 3: 50.1}
      >>> print(in_words(compare({"a": ours, "b": plain}, "a", "b"), "Autoscale", "AdamW"))
      No significant difference: Autoscale minus AdamW is +0.10 points (95% interval -0.16 to +0.36,
      4 seeds, p = 0.308). Equivalent within 1 point (TOST p < 0.001, 90% interval -0.09 to +0.29).
      With this spread, a true difference of 0.3 points would be detected with 80% probability.
    """
    estimate = comparison.estimate
    start = "Exploratory: " if exploratory else ""
    if comparison.missing:
        return (
            f"{start}{comparison.missing} of the planned runs are missing; the test waits for "
            "all of them."
        )
    if any(comparison.diverged):
        return start + _diverged_in_words(comparison, method, baseline, corrected)
    if comparison.ties and not comparison.above + comparison.below:
        return f"{start}{method} and {baseline} are identical in {_count(comparison.ties)}."
    difference = f"{method} minus {baseline} is {estimate.value:+z.2f} points"
    if math.isnan(estimate.standard_error):
        return f"{start}{difference} ({_count(estimate.n)}), which cannot be tested."
    p_value = estimate.p_value if corrected is None else corrected
    low, high = estimate.interval()
    numbers = f"95% interval {low:+z.2f} to {high:+z.2f}, {_count(estimate.n)}, "
    numbers += _p_text(estimate.p_value)
    numbers += f", corrected {_p_text(corrected)}" if corrected is not None else ""
    significant = p_value < ALPHA
    if exploratory:
        return f"{start}{difference} ({numbers})."
    if significant:
        side = "above" if estimate.value > 0 else "below"
        sentences = [f"{method} is {abs(estimate.value):.2f} points {side} {baseline} ({numbers})."]
    else:
        sentences = [f"No significant difference: {difference} ({numbers})."]
    if margin is not None:
        test = estimate.equivalence(margin, ALPHA / family)
        level = f"{100 * (1 - 2 * ALPHA / family):.3g}%"
        points = f"{margin:g} point" + "s" * (margin != 1)
        shown = f"Equivalent within {points}"
        shown = shown if test.shown else f"Equivalence within {points} is not shown"
        sentences.append(
            f"{shown} (TOST {_p_text(test.p_value)}, {level} interval {test.low:+z.2f} to "
            f"{test.high:+z.2f})."
        )
    if not significant:
        sentences.append(
            f"With this spread, a true difference of {estimate.detectable(ALPHA / family):.1f} "
            f"points would be detected with {POWER:.0%} probability."
        )
    return " ".join(sentences)


def _diverged_in_words(
    comparison: Comparison, method: str, baseline: str, corrected: float | None
) -> str:
    ours, others = comparison.diverged
    estimate, pairs = comparison.estimate, comparison.above + comparison.below + comparison.ties
    p_text = _p_text(comparison.p_value)
    p_text += f", corrected {_p_text(corrected)}" if corrected is not None else ""
    text = (
        f"{method} diverged in {ours} of {comparison.runs[0]} runs, {baseline} in {others} of "
        f"{comparison.runs[1]}, so their mean final accuracies cannot be compared. With a diverged "
        f"run below every finished one, {method} is above {baseline} in {comparison.above} of "
        f"{_count(pairs)} and below it in {comparison.below} (exact sign test, {p_text})."
    )
    if estimate.n:
        text += (
            f" In the {_count(estimate.n)} in which both finished, the difference is "
            f"{estimate.value:+z.2f} points; that describes these seeds only."
        )
    return text


def _count(seeds: int) -> str:
    return f"{seeds} seed" + "s" * (seeds != 1)


def _p_text(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _estimate(value: float, standard_error: float, df: float, deviation: float, n: int) -> Estimate:
    if df < 1 or not standard_error > RESOLUTION:  # NaN included
        return Estimate(float(value), math.nan, math.nan, math.nan, n)
    return Estimate(float(value), float(standard_error), df, float(deviation), n)


def _finished(accuracies: Accuracies) -> dict[tuple[str, int], float]:
    """The accuracies of the runs that finished, by method and seed."""
    return {
        (method, seed): float(value)
        for method, runs in accuracies.items()
        for seed, value in runs.items()
        if value is not None and math.isfinite(value)
    }


def _rank(finished: Mapping[tuple[str, int], float], method: str, seed: int) -> float:
    """An accuracy to rank by, at which a diverged run is below every finished one."""
    return finished.get((method, seed), -1.0)
