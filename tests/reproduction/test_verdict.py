"""The verdict: its rules on synthetic records, and the committed page and block."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from synthetic import write

from reproduction import verdict
from reproduction.studies import PAPER_METHODS, PAPER_MODELS
from reproduction.verdict import BEGIN, END, block, cells, claims, page, read_all, write_verdict

ROOT = Path(__file__).parents[2]
PLAIN = np.array([0.40, 0.42, 0.41, 0.43, 0.40, 0.42])
# By seed: with a mean of 0 and a standard deviation of 0.17 points.
NOISE = np.array([0.002, -0.001, 0.001, -0.002, 0.0015, -0.0015])
GLOBAL, LAYERS, FACTOR, CONVERGES, STABLER, SMOOTHER, TUNING = range(7)


def primary(
    folder: Path, points: float, seeds: int = 6, study: str = "cifar100", **changes
) -> None:
    """The study's primary contrast, with so large a difference."""
    ours = PLAIN + NOISE + points / 100
    outcomes = {
        ("resnet20", "none", "adamw"): PLAIN,
        ("resnet20", "autoscale", "adamw"): ours[:seeds],
    }
    write(folder / study, study, outcomes, **changes)


def cell(folder: Path, model: str = "resnet20", method: str = "autoscale") -> verdict.Cell:
    (found,) = (it for it in cells(read_all(folder)) if (it.model, it.method) == (model, method))
    return found


def line(folder: Path, start: str) -> str:
    (found,) = (it for it in block(read_all(folder), "").splitlines() if it.startswith(start))
    return found


@pytest.mark.parametrize(
    ("points", "expected", "advice"),
    [
        (2.0, "supported", "worth a try"),  # the paper's: 2.02
        (1.3, "supported", "worth a try"),  # within 1 point of it
        (0.6, "contradicted", "no difference that matters"),  # above 0, but far from 2
        (0.0, "contradicted", "no difference that matters"),
        (-3.0, "contradicted", "it cost accuracy"),
    ],
)
def test_the_paper_s_difference_is_judged_when_all_runs_are_in(points, expected, advice, tmp_path):
    primary(tmp_path, points)
    found = cell(tmp_path)
    assert found.verdict == expected
    assert found.cifar100.startswith(f"{points:+.2f} (")
    assert "n = 6" in found.cifar100
    assert advice in line(tmp_path, "**Should you add it?**")
    assert "ResNet-20 on CIFAR-100, 20 epochs: " in line(tmp_path, "**Does it help?**")


def test_a_repetition_on_a_gpu_is_shown_beside_the_test_that_it_repeats(tmp_path):
    primary(tmp_path, 2.0)
    before = line(tmp_path, "**Does it help?**")
    gpu = {"study": "cifar100-gpu", "device": "NVIDIA A100"}
    primary(tmp_path, -3.0, seeds=5, **gpu)
    assert line(tmp_path, "**Does it help?**") == before
    primary(tmp_path, -3.0, **gpu)
    # The mean of both is PLAIN + NOISE - 0.5 points.
    spread = stats.t.ppf(0.975, 5) * 100 * NOISE.std(ddof=1) / np.sqrt(6)
    assert line(tmp_path, "**Does it help?**") == (
        f"{before} The same runs on one NVIDIA A100: -3.00 ({-3 - spread:+.2f} to "
        f"{-3 + spread:+.2f}); the mean of both devices: -0.50 ({-0.5 - spread:+.2f} to "
        f"{-0.5 + spread:+.2f})."
    )
    found = cell(tmp_path)
    assert found.verdict == "supported"
    assert found.cifar100.endswith("), n = 6, 20 epochs, NVIDIA A100")
    both = [it.scale for it in claims(read_all(tmp_path))[GLOBAL].evidence]
    assert both == ["CIFAR-100, 20 epochs", "CIFAR-100, 20 epochs, NVIDIA A100"]


def test_a_gpu_judges_what_the_cpu_has_not_finished(tmp_path):
    primary(tmp_path, 2.0, seeds=5)
    primary(tmp_path, -3.0, study="cifar100-gpu", device="NVIDIA A100")
    assert cell(tmp_path).verdict == "contradicted"
    assert "on CIFAR-100, 20 epochs, NVIDIA A100: " in line(tmp_path, "**Does it help?**")


def test_an_l2_penalty_is_named_once_all_of_its_runs_are_in(tmp_path):
    primary(tmp_path, 2.0)
    before = line(tmp_path, "**Does it help?**")
    arms = {
        ("none", 5e-4): PLAIN[:4],
        ("autoscale", 5e-4): PLAIN[:4] + 0.03,
        ("none", 1.05e-3): PLAIN[:4] + 0.02,
        ("none", 2e-3): PLAIN[:3],
    }
    outcomes = {("resnet20", name, "adam", decay): them for (name, decay), them in arms.items()}
    write(tmp_path / "cifar100", "cifar100", outcomes)
    assert line(tmp_path, "**Does it help?**") == before
    outcomes["resnet20", "none", "adam", 2e-3] = PLAIN[:4] + NOISE[:4]
    write(tmp_path / "cifar100", "cifar100", outcomes)
    after = line(tmp_path, "**Does it help?**").removeprefix(before)
    assert after.startswith(" Before Adam + L2, ")
    assert "Autoscale minus Adam + L2 is +3.00 (" in after
    assert "and Autoscale minus Adam + L2, penalty x2.1 is +1.00 (" in after
    assert "over 4 seeds, described and not tested" in after


def test_a_large_spread_distinguishes_nothing(tmp_path):
    ours = PLAIN + 10 * NOISE + 0.01
    outcomes = {("resnet20", "none", "adamw"): PLAIN, ("resnet20", "autoscale", "adamw"): ours}
    write(tmp_path / "cifar100", "cifar100", outcomes)
    assert cell(tmp_path).verdict == "not distinguished"
    assert "not ruled out" in line(tmp_path, "**Should you add it?**")


def test_nothing_is_judged_while_one_run_is_missing(tmp_path):
    primary(tmp_path, 2.0, seeds=5)
    found = cell(tmp_path)
    assert (found.verdict, found.cifar100) == ("not tested", "1 planned run missing, 20 epochs")
    judged = claims(read_all(tmp_path))
    assert {claim.verdict for claim in judged} == {"not tested"}
    assert judged[GLOBAL].basis.startswith("(CIFAR-100, 20 epochs, n = 5 of 6: x")
    assert found.brief == "1 run missing"


def test_diverged_runs_are_never_no_difference(tmp_path):
    primary(tmp_path, 0.0)
    outcomes = {("resnet20", "autoscale", "adamw"): [None, None, None, 0.4, 0.4, 0.4]}
    write(tmp_path / "cifar100", "cifar100", outcomes)
    found = cell(tmp_path)
    assert found.verdict == "not tested"
    assert "diverged: 3 and 0" in found.cifar100
    convergence = claims(read_all(tmp_path))[CONVERGES]
    assert (convergence.verdict, convergence.evidence[0].finding.text) == (
        *("contradicted", "3 of 6 runs"),
    )
    assert "Autoscale diverged in 3 of 6 runs" in line(tmp_path, "**Does it help?**")


def test_digits_judge_the_dynamics_but_no_cell_of_table_1(tmp_path):
    outcomes = {
        (model, method, "adamw"): PLAIN[:5] + 0.1 * (method == "autoscale") + NOISE[:5]
        for model in PAPER_MODELS
        for method in PAPER_METHODS
    }
    write(tmp_path / "digits", "digits", outcomes)
    assert {it.verdict for it in cells(read_all(tmp_path))} == {"not tested"}
    assert cell(tmp_path).digits.startswith("+10.00 (")
    assert claims(read_all(tmp_path))[GLOBAL].verdict == "supported"
    # Runs at a larger scale in which it rises decide instead, once they are in.
    rising = {"global_std": lambda epoch: 0.01 * epoch}
    outcomes = {("resnet20", "autoscale", "adamw"): PLAIN[:5]}
    write(tmp_path / "cifar100", "cifar100", outcomes, record=rising)
    claim = claims(read_all(tmp_path))[GLOBAL]
    assert claim.verdict == "supported"
    assert claim.basis.endswith(" (CIFAR-100, 20 epochs, n = 5 of 6: x3.00)")


def test_the_trend_is_judged_by_all_runs_and_says_where_it_is_highest(tmp_path):
    outcomes = {("resnet20", "autoscale", "adamw"): PLAIN}
    write(tmp_path / "cifar100", "cifar100", outcomes)
    # exp(-(1 + seed / 10) / 5) on average over seeds 0 to 5: exp(-0.25).
    (found,) = claims(read_all(tmp_path))[GLOBAL].evidence
    assert (found.verdict, found.finding.brief) == ("supported", "x0.78")
    assert found.finding.text.endswith("highest in epoch 1")
    series = {"global_std": lambda epoch: 0.001 * [1.0, 3.0, 2.0][epoch - 1]}
    write(tmp_path / "cifar100", "cifar100", outcomes, record=series)
    (found,) = claims(read_all(tmp_path))[GLOBAL].evidence
    # No spread at all between the runs, so no test.
    assert (found.verdict, found.finding.text) == (
        "not tested",
        "rises to x2.00, highest in epoch 2",
    )


def test_two_data_sets_of_one_study_are_told_apart(tmp_path):
    outcomes = {(model, "autoscale", "adamw"): PLAIN[:5] for model in PAPER_MODELS}
    write(tmp_path / "paper", "paper", outcomes, record={"scale_factor": 1.5})
    claim = claims(read_all(tmp_path))[FACTOR]
    assert claim.basis == "CIFAR-10, 300 epochs, n = 1: 1.50; CIFAR-100, 200 epochs, n = 5: 1.50"
    assert claim.conclusion == "*contradicted*"  # on the paper's data set, too
    text = line(tmp_path, "Several numbers")
    networks = "ResNet-20 with AdamW, ResNet-56 with AdamW and VGG-16-BN with AdamW"
    assert f"on CIFAR-10, those of {networks}" in text
    assert f"on CIFAR-100, those of {networks}" in text


def test_the_table_s_numbers_are_explained_by_the_runs_that_there_are(tmp_path):
    assert line(tmp_path, "Scatter is that of")  # no runs: nothing stands side by side
    primary(tmp_path, 0.0)
    assert line(tmp_path, "Scatter is that of")  # one network and optimizer
    penalized = {("resnet20", "autoscale", "adam"): PLAIN[:4]}
    write(tmp_path / "cifar100", "cifar100", penalized)
    expected = "on CIFAR-100, those of ResNet-20 with AdamW and ResNet-20 with Adam + L2. "
    assert expected in line(tmp_path, "Several numbers")
    assert "in brackets" not in line(tmp_path, "Several numbers")
    write(tmp_path / "paper", "paper", {("resnet20", "autoscale", "adamw"): [0.5]})
    assert "in brackets" in line(tmp_path, "Several numbers")


def test_one_counterexample_in_any_study_contradicts_the_bound(tmp_path):
    primary(tmp_path, 0.0)
    assert claims(read_all(tmp_path))[FACTOR].conclusion == "*supported*"
    outcomes = {("vit", method, "adamw"): [0.5, 0.5, 0.5] for method in ("none", "autoscale")}
    write(tmp_path / "vit", "vit", outcomes, record={"scale_factor": 1.001})
    claim = claims(read_all(tmp_path))[FACTOR]
    assert claim.verdict == "contradicted"
    assert claim.basis == "digits, 40 epochs, n = 3: 1.01"
    assert claim.conclusion == "*contradicted* on digits"


def test_layers_that_all_agree_contradict_that_they_differ(tmp_path):
    primary(tmp_path, 0.0)
    assert claims(read_all(tmp_path))[LAYERS].verdict == "supported"
    falling = {"layer_std": lambda epoch: {"stem": 0.1 / epoch, "classifier": 0.2 / epoch}}
    primary(tmp_path, 0.0, record=falling)
    claim = claims(read_all(tmp_path))[LAYERS]
    assert claim.verdict == "contradicted"
    assert claim.evidence[0].finding.text == "falls in 2 of 2 layers"
    for last in (0.1, 0.3):  # one layer stays as it is, and the other does so too or rises
        rising = {
            "layer_std": lambda epoch, last=last: {
                "stem": 0.1,
                "classifier": [0.1, last][epoch > 1],
            }
        }
        primary(tmp_path, 0.0, record=rising)
        claim = claims(read_all(tmp_path))[LAYERS]
        assert claim.verdict == "contradicted"
        assert claim.evidence[0].finding.text == "falls in 0 of 2 layers"
    primary(
        tmp_path, 0.0, record={"layer_std": lambda epoch: {"stem": 0.1 / epoch, "classifier": 0.1}}
    )
    assert claims(read_all(tmp_path))[LAYERS].verdict == "contradicted"


def test_a_baseline_that_diverges_more_often_is_less_stable(tmp_path):
    outcomes = {
        (model, method, "adamw"): [*PLAIN[:5]] for model in PAPER_MODELS for method in PAPER_METHODS
    }
    write(tmp_path / "digits", "digits", outcomes)
    assert claims(read_all(tmp_path))[STABLER].verdict == "not distinguished"
    # McNemar's exact test needs more than 5 seeds for 0.025: 2 ** -4 at best.
    for model in PAPER_MODELS:
        outcomes[model, "zscore", "adamw"] = [None] * 5
    write(tmp_path / "digits", "digits", outcomes)
    claim = claims(read_all(tmp_path))[STABLER]
    assert claim.verdict == "not distinguished"
    assert claim.evidence[0].finding.text == "0 and 5 diverged"


def test_the_plain_optimizer_is_judged_at_the_paper_s_scale_only(tmp_path):
    near = [0.592, 0.594, 0.593, 0.595, 0.591]
    write(tmp_path / "paper", "paper", {("resnet20", "none", "adamw"): near})
    assert cell(tmp_path, method="none").verdict == "supported"
    write(tmp_path / "paper", "paper", {("resnet20", "none", "adamw"): np.subtract(near, 0.05)})
    assert cell(tmp_path, method="none").verdict == "contradicted"


def test_what_was_measured_of_the_steps_is_said(tmp_path):
    effect = {
        "update_norm_ratio": lambda epoch: [0.85, 0.9, 1.02][epoch - 1],
        "update_cosine": 0.99,
        "update_norm_ratio_by_step": lambda epoch: [1.0, 0.9] if epoch == 1 else None,
    }
    primary(tmp_path, 0.0, record=effect)
    text = line(tmp_path, "**What does it do to the steps?**")
    assert "0.85 times as long as AdamW's in the first epoch and 1.02 times in the last" in text
    assert "apart from 2% of their squared norm they are AdamW's with another learning rate" in text


def test_no_claim_is_tested_without_records(tmp_path):
    judged = claims(read_all(tmp_path))
    assert {claim.verdict for claim in judged} == {"not tested"}
    assert {it.verdict for it in cells(read_all(tmp_path))} == {"not tested"}
    assert judged[TUNING].title == "It has no hyperparameters to tune"
    assert "No study varies the learning rate" in judged[TUNING].rule


def test_the_block_is_replaced_in_the_readme_beside_the_results_and_the_rest_stays(tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    primary(results, 2.0)
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_verdict(results)
    first = readme.read_text()
    assert first == f"before\n{BEGIN}\n{block(read_all(results), 'results/')}\n{END}\nafter\n"
    with Image.open(results / "verdict.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10
    kept = [path.read_bytes() for path in sorted(results.iterdir()) if path.is_file()]
    write_verdict(results)
    assert readme.read_text() == first
    assert kept == [path.read_bytes() for path in sorted(results.iterdir()) if path.is_file()]
    primary(results, -3.0)
    write_verdict(results)
    assert readme.read_text() != first  # new records change it
    readme.write_text("a README of one's own\n")
    write_verdict(results)
    assert readme.read_text() == "a README of one's own\n"


def test_the_committed_verdict_is_that_of_the_committed_records(tmp_path):
    groups = read_all(ROOT / "results")
    assert (ROOT / "results/VERDICT.md").read_text() == page(groups)
    assert f"{BEGIN}\n{block(groups, 'results/')}\n{END}" in (ROOT / "README.md").read_text()
    committed = (ROOT / "results/verdict.svg").read_text()
    if f"Matplotlib v{mpl.__version__}" in committed:
        verdict.draw(groups, tmp_path)
        assert (tmp_path / "verdict.svg").read_text() == committed
