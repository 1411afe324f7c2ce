"""The statistics: against SciPy, statsmodels and simulation, and the rules by hand-worked cases."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import ttost_paired

from reproduction.inference import (
    Comparison,
    compare,
    compare_stability,
    families,
    holm,
    in_words,
    linear_contrast,
    log_change,
    mean,
    noncentrality,
    roughness,
    sign_test,
    verdict_on_bound,
    verdict_on_difference,
    verdict_on_every_run,
    verdict_on_stability,
    verdict_on_trend,
    welch,
)

OURS = np.array([51.2, 52.9, 50.4, 53.1, 51.0, 52.2])
PLAIN = np.array([50.1, 52.6, 50.6, 52.0, 50.2, 51.3])
DIFFERENCE = {"autoscale": 1, "none": -1}


def arms(**values) -> dict[str, dict[int, float | None]]:
    return {method: dict(enumerate(runs)) for method, runs in values.items()}


def differing(*differences: float | None) -> Comparison:
    """Of a method that differs from its baseline by so much in each seed; None: it diverged."""
    plain = [50.0 + 2 * seed for seed in range(len(differences))]
    ours = [
        None if difference is None else base + difference
        for base, difference in zip(plain, differences, strict=True)
    ]
    return compare(arms(autoscale=ours, none=plain), "autoscale", "none")


# --- Estimates ------------------------------------------------------------------------------------


def test_two_arms_give_the_paired_t_test():
    runs = arms(autoscale=OURS, none=PLAIN)
    estimate = linear_contrast(runs, DIFFERENCE)
    expected = stats.ttest_rel(OURS, PLAIN)
    assert estimate.value == pytest.approx(0.666667, abs=1e-6)
    assert estimate.deviation == pytest.approx((OURS - PLAIN).std(ddof=1))
    assert (estimate.df, estimate.n) == (5, 6)
    assert estimate.p_value == pytest.approx(expected.pvalue)
    assert estimate.interval() == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert mean(OURS - PLAIN) == pytest.approx(estimate)


def test_several_arms_pool_the_residuals_of_all():
    """By hand: the residuals' variance gives that of a difference of two means of 3."""
    a, b, c = [1.0, 2.0, 3.0], [2.0, 2.0, 5.0], [3.0, 5.0, 4.0]
    # Means of methods 2, 3, 4, of seeds 2, 3, 4: residuals (0, 0, 0), (0, -1, 1), (0, 1, -1).
    residual_variance = 4 / 4
    estimate = linear_contrast(arms(a=a, b=b, c=c), {"b": 1, "a": -1})
    assert estimate.value == pytest.approx(1.0)
    assert estimate.df == 4
    assert estimate.standard_error == pytest.approx(math.sqrt(2 / 3 * residual_variance))
    assert estimate.deviation == pytest.approx(math.sqrt(2 * residual_variance))


@pytest.mark.parametrize("example", range(5))
def test_an_unbalanced_design_agrees_with_statsmodels(example):
    rng = np.random.default_rng(example)
    methods, seeds = ("none", "autoscale", "zscore", "scaling"), range(6)
    runs = {
        method: {
            seed: None if rng.random() < 0.1 else rng.normal(50, 2)
            for seed in seeds
            if seed == 0 or rng.random() < 0.7
        }
        for method in methods
    }
    finished = [
        (method, seed, value)
        for method in methods
        for seed, value in runs[method].items()
        if value is not None
    ]
    used = sorted({seed for _, seed, _ in finished})
    design = [
        [float(method == other) for other in methods[1:]] + [float(seed == row) for row in used]
        for method, seed, _ in finished
    ]
    contrast = [1.0, -1.0, 0.0] + [0.0] * len(used)
    test = OLS([value for *_, value in finished], design).fit().t_test(contrast)
    estimate = linear_contrast(runs, {"autoscale": 1, "zscore": -1})
    assert estimate.value == pytest.approx(test.effect[0])
    assert estimate.p_value == pytest.approx(float(test.pvalue))
    assert estimate.df == test.df_denom
    assert estimate.interval() == pytest.approx(tuple(test.conf_int(0.05)[0]))


accuracies = st.lists(
    st.integers(0, 10_000).map(lambda hundredths: hundredths / 100), min_size=3, max_size=3
)


@settings(max_examples=50, deadline=None)
@given(accuracies, accuracies, accuracies, st.lists(st.integers(-40, 40), min_size=3, max_size=3))
def test_what_a_seed_adds_to_all_of_its_runs_cancels(a, b, c, shifts):
    runs = arms(a=a, b=b, c=c)
    shifted = arms(**{key: np.add(list(value.values()), shifts) for key, value in runs.items()})
    one, other = (linear_contrast(each, {"a": 1, "b": -1}) for each in (runs, shifted))
    assert one == pytest.approx(other, abs=1e-6, nan_ok=True)
    swapped = linear_contrast(runs, {"b": 1, "a": -1})
    assert swapped.value == pytest.approx(-one.value, abs=1e-9)
    assert swapped.p_value == pytest.approx(one.p_value, nan_ok=True)


def test_seeds_of_a_single_run_and_runs_that_diverged_change_nothing():
    runs = arms(autoscale=OURS, none=PLAIN)
    more = {"autoscale": runs["autoscale"] | {7: 90.0, 8: None}, "none": runs["none"] | {8: 3.0}}
    more["none"][9] = math.nan
    assert linear_contrast(more, DIFFERENCE) == pytest.approx(linear_contrast(runs, DIFFERENCE))


def test_methods_are_compared_through_a_third_that_shares_seeds_with_both():
    """By hand: a - c is 2 and 4, b - c is 1 twice, so that a - b is 3 - 1."""
    runs = {"a": {0: 12.0, 1: 14.0}, "b": {2: 21.0, 3: 31.0}, "c": {0: 10, 1: 10, 2: 20, 3: 30}}
    estimate = linear_contrast(runs, {"a": 1, "b": -1})
    assert estimate.value == pytest.approx(2.0)
    assert (estimate.df, estimate.n) == (2, 0)
    # Differences of (2, 4) leave four residuals of 1 / 2, on 2 degrees of freedom: variance 1 / 2.
    # Each of the two means of 2 differences has a variance of 2 x 1 / 2 / 2.
    assert estimate.standard_error == pytest.approx(1.0)


@pytest.mark.parametrize(
    "runs",
    [
        {"autoscale": {0: 50.0, 1: 51.0}, "none": {2: 50.0, 3: 51.0}},
        {"autoscale": {0: 50.0, 1: None}, "none": {0: 50.0, 1: 51.0}},
        {"autoscale": {0: None}, "none": {0: None}},
        {"autoscale": {0: 50.2, 1: 51.2}, "none": {0: 50.1, 1: 51.1}},
        {"autoscale": {0: 50.2, 1: 51.2}},
        {
            **{"autoscale": {0: 50.0, 1: 51.0}, "none": {2: 50.0, 3: 51.0}},
            **{"zscore": {0: 52.0, 1: 50.0}, "scaling": {2: 52.0, 3: 50.0}},
        },
    ],
    ids=["no shared seed", "one shared seed", "no run", "no spread", "no baseline", "apart"],
)
def test_nothing_is_tested_where_there_is_nothing_to_test_with(runs):
    comparison = compare(runs, "autoscale", "none")
    estimate = comparison.estimate
    numbers = [
        estimate.p_value,
        *estimate.interval(),
        estimate.equivalence().p_value,
        estimate.detectable(),
    ]
    assert all(math.isnan(each) for each in numbers)
    assert not estimate.equivalence().shown
    assert verdict_on_difference(comparison, 2.0) == "not tested"
    assert in_words(comparison, "Autoscale", "AdamW")


def test_a_contrast_may_weigh_more_than_two_methods():
    runs = arms(autoscale=[3.0, 4.0, 5.5], none=[0.0, 1.0, 2.0], strong=[4.0, 5.5, 6.0])
    estimate = linear_contrast(runs, {"autoscale": 1, "none": -0.5, "strong": -0.5})
    assert estimate.value == pytest.approx(12.5 / 3 - 0.5 * 3 / 3 - 0.5 * 15.5 / 3)
    # Residuals of (-1, -4, 5), (2, -1, -1) and (-1, 5, -4) eighteenths; 1.5 variances of one run.
    assert estimate.deviation == pytest.approx(math.sqrt(1.5 * 90 / 18**2 / 4))
    with pytest.raises(ValueError, match="sum to 0"):
        linear_contrast(runs, {"autoscale": 1})


def test_welch_describes_all_runs_that_finished():
    base = np.array([48.0, 49.0, 50.0, 51.0, 52.0])
    found = welch(arms(a=[*(base + 2), None], b=base), "a", "b")
    # The mean difference has a standard error of 1 and 8 degrees of freedom: t = 2.306 at 0.975.
    assert found == pytest.approx((2.0, -0.306, 4.306, 0.0805), abs=1e-3)
    # Of 2 and 5 runs: variances of the means 1 and 0.5, and 1.5**2 / (1 + 0.5**2 / 4) = 2.118.
    low, high = 52 - 50 + np.array([-1, 1]) * math.sqrt(1.5) * stats.t.ppf(0.975, 2.25 / 1.0625)
    assert welch(arms(a=[51.0, 53.0], b=base), "a", "b")[1:3] == pytest.approx((low, high))
    assert math.isnan(welch(arms(a=[1.0], b=base), "a", "b").p_value)


# --- Families, equivalence, power -----------------------------------------------------------------


def test_holm_counts_a_test_that_could_not_be_made():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})
    # By hand: 4 x 0.01, 3 x 0.03, and no less than that for 2 x 0.04.
    expected = {"a": 0.04, "b": 0.09, "c": 0.09, "d": math.nan}
    assert found == pytest.approx(expected, nan_ok=True)
    assert holm({}) == {}


@settings(max_examples=10)  # statsmodels collects garbage each time
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_that_of_statsmodels(p_values):
    expected = multipletests(p_values, method="holm")[1]
    assert list(holm(dict(enumerate(p_values))).values()) == pytest.approx(list(expected))


def test_every_contrast_is_in_one_family():
    found = families(["none", "zscore", "gradient_centralization", "autoscale"])
    assert found["plain"] == [
        ("zscore", "none"),
        ("gradient_centralization", "none"),
        ("autoscale", "none"),
    ]
    assert found["ours"] == [("autoscale", "zscore"), ("autoscale", "gradient_centralization")]
    assert families(["zscore"]) == {"plain": [], "ours": []}


@pytest.mark.parametrize("margin", [0.8, 1.0, 1.5])
def test_equivalence_is_that_of_statsmodels(margin):
    test = mean(OURS - PLAIN).equivalence(margin)
    expected, *_ = ttost_paired(OURS, PLAIN, -margin, margin)
    assert test.p_value == pytest.approx(expected)
    assert test.shown == (-margin < test.low and test.high < margin)


def simulated(deviation, seeds, true=0.0, studies=3000):
    rng = np.random.default_rng(0)
    return [mean(each) for each in rng.normal(true, deviation, (studies, seeds))]


@pytest.mark.parametrize(("seeds", "probability"), [(4, 0.49), (6, 0.82)])
def test_the_planned_study_shows_equivalence_as_often_as_planned(seeds, probability):
    shown = [each.equivalence(1.0).shown for each in simulated(0.7, seeds)]
    assert np.mean(shown) == pytest.approx(probability, abs=0.025)


def test_a_difference_of_the_margin_is_seldom_called_equivalent():
    shown = [each.equivalence(1.0).shown for each in simulated(0.7, 6, true=1.0)]
    assert np.mean(shown) == pytest.approx(0.05, abs=0.012)


def test_the_power_is_right_where_a_search_fails():
    """Two samples of 2, 12 comparisons: the standard error is the deviation."""
    alpha = 0.05 / 12
    effect = noncentrality(2, alpha)
    assert effect == pytest.approx(19.65, abs=0.01)
    assert TTestIndPower().solve_power(nobs1=2, alpha=alpha, power=0.8) == 10.0
    rng = np.random.default_rng(0)
    ours, plain = rng.normal(effect, 1, (2, 20_000)), rng.normal(0, 1, (2, 20_000))
    assert np.mean(stats.ttest_ind(ours, plain).pvalue < alpha) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("n", [3, 5, 20])
@pytest.mark.parametrize("power", [0.3, 0.8, 0.99])
def test_the_power_is_that_of_statsmodels_where_it_works(n, power):
    expected = TTestPower().solve_power(nobs=n, alpha=0.05, power=power)
    assert noncentrality(n - 1, 0.05, power) / math.sqrt(n) == pytest.approx(expected, rel=1e-5)


def test_the_detectable_difference_is_found_as_often_as_it_says():
    """In paired samples, at a corrected level, by SciPy's own test."""
    alpha = 0.05 / 3
    pairs = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])  # standard deviation 0.79
    true = mean(pairs).detectable(alpha)
    noise = np.random.default_rng(0).normal(true, pairs.std(ddof=1), (5, 20_000))
    assert np.mean(stats.ttest_1samp(noise, 0).pvalue < alpha) == pytest.approx(0.8, abs=0.01)


def test_the_detectable_difference_of_pooled_arms_is_found_as_often_as_it_says():
    """The model's test in closed form for a balanced design, on 20,000 studies of 4 x 4 runs."""
    runs = np.random.default_rng(1).normal(50, 1, (4, 4))
    residuals = runs - runs.mean(0) - runs.mean(1, keepdims=True) + runs.mean()
    deviation = math.sqrt((residuals**2).sum() / 9)
    estimate = linear_contrast(arms(a=runs[0], b=runs[1], c=runs[2], d=runs[3]), {"a": 1, "b": -1})
    true = estimate.detectable(0.05 / 3)

    rng = np.random.default_rng(0)
    studies = rng.normal(0, deviation, (20_000, 4, 4)) + 5 * rng.normal(size=(20_000, 1, 4))
    studies[:, 0] += true
    methods, seeds = studies.mean(2, keepdims=True), studies.mean(1, keepdims=True)
    residuals = studies - methods - seeds + studies.mean((1, 2), keepdims=True)
    errors = np.sqrt((residuals**2).sum((1, 2)) / 9 * 2 / 4)
    found = np.abs((methods[:, 0] - methods[:, 1])[:, 0] / errors) > stats.t.ppf(1 - 0.05 / 6, 9)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


# --- Divergence -----------------------------------------------------------------------------------


def test_three_of_five_diverged_is_not_no_difference():
    """Even if the two remaining seeds would be equivalent, or significantly better."""
    for left, p_value in (((0.01, -0.01), 2 * 6 / 32), ((2.0, 2.001), 1.0)):
        comparison = differing(*left, None, None, None)
        assert comparison.diverged == (3, 0)
        assert comparison.p_value == pytest.approx(p_value)  # 1 or 2 of 5 seeds are above
        text = in_words(comparison, "Autoscale", "AdamW")
        assert text.startswith("Autoscale diverged in 3 of 5 runs, AdamW in 0 of 5, so their mean")
        assert "significant" not in text
        assert "quivalen" not in text
        for claimed in (2.0, 0.0, -2.0):
            assert verdict_on_difference(comparison, claimed) == "not tested"


def test_a_diverged_run_is_below_every_finished_one():
    plain = [50.0, 1.0, 50.0, None, math.nan, None]
    ours = [None, math.nan, 51.0, 1.0, None, 50.0]
    comparison = compare(arms(autoscale=ours, none=plain), "autoscale", "none")
    assert (comparison.above, comparison.below, comparison.ties) == (3, 2, 1)
    assert (comparison.diverged, comparison.runs) == ((3, 3), (6, 6))


def test_the_sign_test_decides_where_a_run_diverged():
    better, worse = differing(2, 2, 2, 1, 3, 1), differing(-1, -2, -1, -1, -2, None)
    assert worse.p_value == pytest.approx(2 / 64)  # all of 6 seeds agree
    assert verdict_on_difference(worse, 2.0) == "contradicted"
    assert verdict_on_difference(worse, -2.0) == "supported"
    assert verdict_on_difference(worse, 0.0) == "contradicted"
    assert verdict_on_difference(worse, 2.0, p_value=0.06) == "not tested"  # corrected
    assert better.p_value < 0.01  # by the t-test: none diverged
    five = differing(-1, -2, -1, -1, None)
    assert five.p_value == pytest.approx(2 / 32)
    assert verdict_on_difference(five, 2.0) == "not tested"


@pytest.mark.parametrize(("above", "below"), [(0, 5), (3, 3), (1, 7), (9, 0)])
def test_the_sign_test_of_discordant_pairs_is_mcnemars(above, below):
    expected = mcnemar([[4, above], [below, 4]], exact=True).pvalue
    assert sign_test(above, below) == pytest.approx(expected)
    assert sign_test(0, 0) == 1.0


def test_nothing_is_tested_before_all_planned_runs_are_in():
    runs = arms(autoscale=[*OURS[:3], None], none=PLAIN)
    comparison = compare(runs, "autoscale", "none", seeds=range(6))
    assert comparison.missing == 2
    assert math.isnan(comparison.p_value)
    assert math.isnan(comparison.estimate.value)
    assert verdict_on_difference(comparison, 2.0) == "not tested"
    assert in_words(comparison, "Autoscale", "AdamW").startswith(
        "2 of the planned runs are missing"
    )


# --- Verdicts -------------------------------------------------------------------------------------

SPREAD = np.array([-1.0, -0.5, 0.0, 0.0, 0.5, 1.0])  # its mean has a standard error of 0.289
# Half of the 95% interval: 2.571 x 0.289 = 0.742; one-sided, and half of the 90%: 0.582.


@pytest.mark.parametrize(
    ("found", "claimed", "expected"),
    [
        (2.0, 2.0, "supported"),
        (5.0, 2.0, "supported"),  # more than was claimed
        (0.75, 2.0, "supported"),  # above 0, and up to 1.33: within a point of 2
        (0.73, 2.0, "not distinguished"),  # neither 0 nor a point less than 2 is excluded
        (0.43, 2.0, "not distinguished"),
        (0.41, 2.0, "contradicted"),  # below 1, a point less than 2
        (0.0, 2.0, "contradicted"),
        (-2.0, 2.0, "contradicted"),
        (2.0, 4.0, "contradicted"),  # an improvement, but at most 2.58
        (-2.0, -2.0, "supported"),
        (0.73, -2.0, "contradicted"),
        (0.0, 0.3, "not distinguished"),  # less than the margin was claimed
        (-0.75, 0.3, "contradicted"),
        (0.41, 0.0, "supported"),  # within 1 point
        (0.43, 0.0, "not distinguished"),
        (0.75, 0.0, "contradicted"),
    ],
)
def test_the_verdict_on_a_difference(found, claimed, expected):
    assert verdict_on_difference(differing(*(SPREAD + found)), claimed) == expected


def test_the_verdict_on_a_difference_is_corrected_in_a_family():
    comparison = differing(*(SPREAD + 0.75))  # p = 0.049
    assert verdict_on_difference(comparison, 2.0, p_value=0.147, family=3) == "not distinguished"
    at_most_1 = differing(*(SPREAD + 0.41))
    assert verdict_on_difference(at_most_1, 2.0, family=3) == "not distinguished"
    assert verdict_on_difference(at_most_1, 0.0, family=3) == "not distinguished"


def test_claims_about_every_run():
    assert verdict_on_every_run([True, True]) == "supported"
    assert verdict_on_every_run([True, False, True]) == "contradicted"
    assert verdict_on_every_run([False]) == "contradicted"
    assert verdict_on_every_run([True]) == verdict_on_every_run([]) == "not tested"


def test_claims_about_a_bound():
    assert verdict_on_bound([[0.5, 1.0], [0.7, None, math.nan, 0.9]]) == "supported"
    assert verdict_on_bound([[0.5, 1.01], [0.7, 0.9]]) == "contradicted"
    assert verdict_on_bound([[0.5, math.inf], [0.7]]) == "contradicted"
    assert verdict_on_bound([[0.5, 1.0], [], [None]]) == "not tested"  # a single run


def test_the_change_of_a_curve_is_that_from_first_to_last():
    estimate, changes = log_change([[2.0, 9.0, 1.0], [None, 4.0, math.nan, 2.0, 0.0], [3.0]])
    assert changes == pytest.approx([-math.log(2)] * 2)
    assert math.exp(estimate.value) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((0.5, 0.6, 0.55), "supported"),
        ((1.5, 1.6, 1.4), "contradicted"),
        ((*[0.5] * 7, 1.01), "not distinguished"),  # not in every run, if significantly
        ((0.5, 0.99), "not distinguished"),  # in both, by chance for all that a t-test sees
        ((0.5,), "not tested"),
        ((), "not tested"),
    ],
)
def test_the_verdict_on_a_trend(factors, expected):
    series = [[0.002, 0.001, 0.002 * factor] for factor in factors]
    assert verdict_on_trend(series) == expected
    opposite = {"supported": "contradicted", "contradicted": "supported"}
    assert verdict_on_trend(series, falls=False) == opposite.get(expected, expected)


def test_roughness_sees_jumps_and_not_a_slope():
    assert roughness([1.0, 2.0, 3.0, 4.0]) == 0.0
    assert roughness([1.0, 3.0, 2.0]) == pytest.approx(3 / math.sqrt(2))
    assert roughness([90.0, 0.0, 1.0, 2.0], changes=2) == 0.0
    assert math.isnan(roughness([1.0, 2.0]))


def curves(*jumps):
    """Accuracy that jumps by so much up and down in each seed; None: the run diverged."""
    return {
        seed: None if jump is None else [50.0 + jump * (epoch % 2) for epoch in range(11)]
        for seed, jump in enumerate(jumps)
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (curves(1.0, 1.1, 0.9), curves(3.0, 3.3, 2.9), "supported"),
        (curves(3.0, 3.3, 2.9), curves(1.0, 1.1, 0.9), "contradicted"),
        (curves(1.0, 3.1, 0.9), curves(3.0, 1.3, 2.9), "not distinguished"),
        # Smoother where both finish, but it diverges where the baseline does not: no clear answer.
        (curves(1.0, 1.1, 0.9, None), curves(3.0, 3.3, 2.9, 3.0), "not distinguished"),
        (curves(*[1.0] * 7), curves(*[None] * 7), "supported"),
        (curves(*[None] * 7), curves(*[1.0] * 7), "contradicted"),
        (curves(*[1.0] * 5), curves(None, None, None, 1.0, 1.0), "not distinguished"),  # p = 0.25
        (curves(*[1.0] * 6), curves(*[None] * 6), "not distinguished"),  # p = 0.031, of two tests
        # One outcome for the method, the other against it: no clear answer either way.
        (
            curves(3.0, 3.3, 2.9, *[1.0] * 7),
            curves(1.0, 1.1, 0.9, *[None] * 7),
            "not distinguished",
        ),
        (
            curves(1.0, 1.1, 0.9, *[None] * 7),
            curves(3.0, 3.3, 2.9, *[1.0] * 7),
            "not distinguished",
        ),
        (curves(1.0), curves(3.0, 3.3), "not tested"),
    ],
)
def test_the_verdict_on_stability(ours, theirs, expected):
    stability = compare_stability({"autoscale": ours, "zscore": theirs}, "autoscale", "zscore")
    assert verdict_on_stability(stability) == expected


# --- Words ----------------------------------------------------------------------------------------


def test_a_significant_difference_in_words():
    text = in_words(differing(*(SPREAD - 2)), "Z-score", "AdamW")
    assert text == (
        "Z-score is 2.00 points below AdamW (95% interval -2.74 to -1.26, 6 seeds, p < 0.001). "
        "Equivalence within 1 point is not shown (TOST p = 0.991, 90% interval -2.58 to -1.42)."
    )


def test_what_cannot_be_told_apart_says_what_could_have_been():
    text = in_words(differing(*(SPREAD + 0.5)), "A", "B", corrected=0.288, family=2)
    assert text == (
        "No significant difference: A minus B is +0.50 points (95% interval -0.24 to +1.24, "
        "6 seeds, p = 0.144, corrected p = 0.288). Equivalence within 1 point is not shown "
        "(TOST p = 0.072, 95% interval -0.24 to +1.24). With this spread, a true difference of "
        "1.2 points would be detected with 80% probability."
    )


@pytest.mark.parametrize(
    ("found", "numbers"),
    [(2, "+2.00 points (95% interval +1.26 to +2.74"), (0, "+0.00 points (95% interval -0.74")],
)
def test_what_was_not_planned_is_called_exploratory_and_nothing_else(found, numbers):
    text = in_words(differing(*(SPREAD + found)), "A", "B", exploratory=True)
    assert text.startswith(f"Exploratory: A minus B is {numbers}")
    assert not any(word in text for word in ("ignificant", "quivalen", "detected"))


def test_runs_that_are_the_same_are_called_identical():
    assert in_words(differing(0, 0, 0), "A", "B") == "A and B are identical in 3 seeds."
    pooled = compare(arms(a=OURS, b=OURS, c=PLAIN), "a", "b")
    assert in_words(pooled, "A", "B") == "A and B are identical in 6 seeds."
    assert in_words(differing(0.5), "A", "B") == (
        "A minus B is +0.50 points (1 seed), which cannot be tested."
    )
