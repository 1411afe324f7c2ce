"""The statistics: against SciPy, statsmodels and simulation, and the rules by hand-worked cases."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired
from synthetic import short, write

from reproduction.presets import PAPER_METHODS, PRESETS
from reproduction.records import table
from reproduction.statistics import (
    Model,
    differences,
    holm,
    mean_interval,
    noncentrality,
    sign_test,
    welch,
)
from reproduction.studies import Family, Study

OURS = np.array([51.2, 52.9, 50.4, 53.1, 51.0, 52.2])
PLAIN = np.array([50.1, 52.6, 50.6, 52.0, 50.2, 51.3])
DIFFERENCE = {"autoscale": 1, "none": -1}


def arms(**values) -> pd.DataFrame:
    """A table of runs by arm and seed; None for a run that diverged."""
    rows = [
        {"arm": arm, "seed": seed, "outcome": math.nan if value is None else value}
        for arm, runs in values.items()
        for seed, value in (runs.items() if isinstance(runs, dict) else enumerate(runs))
    ]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "outcome"])
    state = np.where(frame["outcome"].isna(), "diverged", "finished")
    return frame.assign(
        state=state, planned=True, chosen=True, group="G", repeat="", experiment=None
    )


def contrast(weights=DIFFERENCE, **values) -> dict:
    return Model(arms(**values)).contrast(weights)


def family_of(kind="primary", pairs=(("autoscale", "none"),), **values) -> pd.DataFrame:
    """The family of a study with these runs."""
    contrasts = [{a: 1.0, b: -1.0} for a, b in pairs]
    family = Family("F", kind, contrasts)
    study = Study("S", "S", (), families=lambda arms: [family], preset=True)
    return differences(study, arms(**values))


# --- Estimates ------------------------------------------------------------------------------------


def test_two_arms_give_the_paired_t_test():
    found = contrast(autoscale=OURS, none=PLAIN)
    expected = stats.ttest_rel(OURS, PLAIN)
    assert found["value"] == pytest.approx(0.666667, abs=1e-6)
    assert (found["df"], found["n"]) == (5, 6)
    assert found["p_value"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(interval))
    assert found["by_seed"].tolist() == pytest.approx(list(OURS - PLAIN))


def test_several_arms_pool_the_residuals_of_all():
    """By hand: the residuals' variance gives that of a difference of two means of 3."""
    a, b, c = [1.0, 2.0, 3.0], [2.0, 2.0, 5.0], [3.0, 5.0, 4.0]
    # Means of arms 2, 3, 4, of seeds 2, 3, 4: residuals (0, 0, 0), (0, -1, 1), (0, 1, -1).
    found = contrast({"b": 1, "a": -1}, a=a, b=b, c=c)
    assert (found["value"], found["df"]) == (pytest.approx(1.0), 4)
    assert found["error"] == pytest.approx(math.sqrt(2 / 3 * 4 / 4))
    middle = contrast({"c": 1, "a": -0.5, "b": -0.5}, a=a, b=b, c=c)
    assert middle["value"] == pytest.approx(1.5)
    assert middle["error"] == pytest.approx(math.sqrt(1.5 / 3 * 4 / 4))
    assert middle["by_seed"].tolist() == pytest.approx([1.5, 3.0, 0.0])


def test_seeds_of_a_single_run_and_runs_that_diverged_change_no_estimate():
    plain = dict(enumerate(PLAIN)) | {8: 3.0, 9: None}
    more = contrast(autoscale=dict(enumerate(OURS)) | {7: 90.0, 8: None}, none=plain)
    alone = contrast(autoscale=OURS, none=PLAIN)
    for key in ("value", "error", "df", "n", "low"):
        assert more[key] == pytest.approx(alone[key])


def test_what_the_runs_do_not_determine_is_nan():
    for found in (
        contrast(autoscale=[50.0], none=[51.0]),  # no spread
        contrast(autoscale=[50.0, 51.0], none=[49.0, 50.0]),  # all differences equal
    ):
        assert abs(found["value"]) == pytest.approx(1.0)
        assert all(math.isnan(found[key]) for key in ("error", "low", "p_value"))
    for found in (
        contrast(autoscale={0: 50.0, 1: 51.0}, none={2: 50.0, 3: 51.0}),  # no shared seed
        contrast(autoscale=OURS, none=[None] * 6),
    ):
        assert math.isnan(found["value"])
    # Through a third arm the difference is determined all the same.
    found = contrast(autoscale={0: 50.0}, none={1: 50.0}, third={0: 52.0, 1: 49.0})
    assert found["value"] == pytest.approx(-3.0)
    with pytest.raises(ValueError, match="sum to 0"):
        contrast({"autoscale": 1}, autoscale=OURS)


def test_welchs_interval_is_scipys_and_ignores_the_pairing():
    expected = stats.ttest_ind(OURS, PLAIN, equal_var=False).confidence_interval(0.95)
    found = contrast(autoscale=OURS, none=PLAIN)
    assert (found["welch_low"], found["welch_high"]) == pytest.approx(tuple(expected))
    assert all(map(math.isnan, welch([1.0], [1.0, 2.0])))
    assert all(map(math.isnan, welch([1.0, 1.0], [2.0, 2.0])))


def test_the_interval_of_a_mean_is_students():
    expected = stats.t.interval(0.95, 5, OURS.mean(), stats.sem(OURS))
    assert mean_interval(OURS) == pytest.approx(expected)
    assert all(map(math.isnan, mean_interval([50.0])))
    assert all(map(math.isnan, mean_interval([50.0, 50.0])))


# --- Families, equivalence, power -----------------------------------------------------------------


def test_holm_counts_a_test_that_could_not_be_made():
    # By hand: 4 x 0.01, 3 x 0.03, and no less than that for 2 x 0.04.
    expected = [0.04, 0.09, 0.09, math.nan]
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("shift", [0, 0.2, -1.0])
def test_equivalence_is_that_of_statsmodels(shift):
    row = family_of(autoscale=OURS + shift, none=PLAIN).iloc[0]
    expected, *_ = ttost_paired(OURS + shift, PLAIN, -1.0, 1.0)
    assert row["equivalence"] == pytest.approx(expected)
    inside = row["inner_low"] > -1 and row["inner_high"] < 1
    assert inside == (row["equivalence"] < 0.05)


def test_a_family_corrects_p_values_equivalence_and_power():
    runs = {"none": PLAIN, "autoscale": OURS, "zscore": OURS[::-1]}
    pairs = [("autoscale", "none"), ("zscore", "none")]
    alone, both = family_of("primary", pairs[:1], **runs), family_of("family", pairs, **runs)
    one, two = alone.iloc[0], both.iloc[0]
    assert one["corrected"] == one["p_value"] == pytest.approx(two["p_value"])
    raw = sorted(both["p_value"])
    assert sorted(both["corrected"]) == pytest.approx([2 * raw[0], max(2 * raw[0], raw[1])])
    assert two["inner_low"] == pytest.approx(two["low"])  # 1 - 2 * 0.05 / 2
    assert two["detectable"] == pytest.approx(noncentrality(two["df"], 0.025) * two["error"])
    described = family_of("descriptive", pairs, **runs)
    assert described[["p_value", "corrected", "equivalence", "detectable"]].isna().all(axis=None)


def test_the_power_is_right_in_the_far_tail():
    """Two samples of 2, 12 comparisons: the standard error is the deviation."""
    alpha = 0.05 / 12
    effect = noncentrality(2, alpha)
    assert effect == pytest.approx(19.65, abs=0.01)
    rng = np.random.default_rng(0)
    ours, plain = rng.normal(effect, 1, (2, 20_000)), rng.normal(0, 1, (2, 20_000))
    assert np.mean(stats.ttest_ind(ours, plain).pvalue < alpha) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("n", [3, 5, 20])
@pytest.mark.parametrize("power", [0.3, 0.8, 0.99])
def test_the_power_is_that_of_statsmodels_where_it_works(n, power):
    expected = TTestPower().solve_power(nobs=n, alpha=0.05, power=power)
    assert noncentrality(n - 1, 0.05, power) / math.sqrt(n) == pytest.approx(expected, rel=1e-5)


# --- Divergence, and runs that are missing --------------------------------------------------------


def test_a_diverged_run_is_below_every_finished_one():
    found = contrast(
        autoscale=[None, None, 51.0, 1.0, None, 50.0], none=[50.0, 1.0, 50.0, None, None, None]
    )
    assert (found["above"], found["below"], found["ties"]) == (3, 2, 1)
    assert found["diverged"] == (3, 3)


@pytest.mark.parametrize("left", [(0.01, -0.01), (2.0, 2.001)])
def test_where_a_run_diverged_the_sign_test_decides_and_nothing_else(left):
    """Even if the two remaining seeds would be equivalent, or significantly better."""
    plain = [50.0, 52.0, 54.0, 56.0, 58.0]
    ours = [50.0 + left[0], 52.0 + left[1], None, None, None]
    row = family_of(autoscale=ours, none=plain).iloc[0]
    above = sum(each > 0 for each in left)
    assert row["p_value"] == pytest.approx(stats.binomtest(above, 5).pvalue)
    assert row["p_value"] > 0.05
    assert np.isnan([row["equivalence"], row["detectable"]]).all()


def test_six_seeds_that_agree_are_significant_and_five_are_not():
    for seeds, p_value in ((6, 2 / 64), (5, 2 / 32)):
        plain = [50.0 + seed for seed in range(seeds)]
        row = family_of(autoscale=[*(each - 1 - each / 60 for each in plain[1:]), None], none=plain)
        assert row["p_value"].item() == pytest.approx(p_value)


@pytest.mark.parametrize(("above", "below"), [(0, 5), (3, 3), (1, 7), (9, 0)])
def test_the_sign_test_of_discordant_pairs_is_mcnemars(above, below):
    expected = mcnemar([[4, above], [below, 4]], exact=True).pvalue
    assert sign_test(above, below) == pytest.approx(expected)
    assert sign_test(0, 0) == 1.0


def outcomes(bump: float = 0.0) -> dict:
    rng = np.random.default_rng(3)
    return {
        (model, method, "adamw"): 0.5 + bump * (method == "autoscale") + rng.normal(0, 0.01, 5)
        for model in ("resnet20", "resnet56")
        for method in PAPER_METHODS
    }


@pytest.mark.parametrize("missing", ["none", "zscore"])
def test_nothing_is_tested_before_all_runs_of_a_network_are_in(missing, tmp_path):
    """And the family keeps its planned size."""
    study, found = short(PRESETS["digits"]), outcomes(0.3)
    found["resnet20", missing, "adamw"] = [0.5] * 4
    write(study, tmp_path, found)
    rows = differences(study, table(study, tmp_path))
    waiting = rows[rows["group"].str.startswith("ResNet-20")]
    assert set(waiting["missing"]) == {1}
    assert waiting[["value", "low", "p_value", "corrected"]].isna().all(axis=None)
    others = rows[rows["label"] == "Autoscale minus AdamW"][1:]
    assert (others["corrected"] < 0.05).all()
    assert set(others["size"]) == {8}
    smallest = rows[rows["size"] == 8].nsmallest(1, "p_value").iloc[0]
    assert smallest["corrected"] == pytest.approx(8 * smallest["p_value"])


def test_a_study_of_ones_own_shows_what_there_is_and_tests_nothing(tmp_path):
    found = outcomes(0.3)
    found["resnet20", "zscore", "adamw"] = [0.5] * 4
    study = short(PRESETS["digits"])._replace(preset=False)
    write(study, tmp_path, found)
    rows = differences(study, table(study, tmp_path))
    first = rows[rows["group"].str.startswith("ResNet-20")]
    assert set(first["kind"]) == {"descriptive"}
    assert first["low"].notna().all()
    assert first["p_value"].isna().all()


def test_the_mean_over_devices_is_described_once_all_runs_are_in(tmp_path):
    study = short(PRESETS["cifar100"])
    plain, ours = ("resnet20", "none", "adamw"), ("resnet20", "autoscale", "adamw")
    cpu, gpu = np.array([0.41, 0.42, 0.43, 0.4, 0.41, 0.42]), np.array([0.42, 0.42, 0.41] * 2)
    write(study, tmp_path, {plain: [0.4] * 6, ours: cpu})
    for count in (5, 6):
        write(study, tmp_path / "GPU", {plain: [0.4] * 6, ours: gpu[:count]}, device="GPU")
        rows = differences(study, table(study, tmp_path))
        both = rows[rows["repeat"] == "all"]
        assert len(both) == (count == 6)
    expected = stats.ttest_1samp(100 * ((cpu + gpu) / 2 - 0.4), 0)
    assert both["value"].item() == pytest.approx(100 * (cpu + gpu).mean() / 2 - 40)
    assert both["low"].item() == pytest.approx(expected.confidence_interval(0.95).low)
    assert both["p_value"].isna().item()
