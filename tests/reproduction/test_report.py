"""The report: numbers worked out by hand, what is claimed and what is not, reproducible bytes."""

import contextlib
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits
from synthetic import write

from reproduction import figures
from reproduction.groups import group
from reproduction.report import TEST_IMAGES, write_report
from reproduction.studies import PAPER_METHODS, PAPER_MODELS, STUDIES, read
from training import data

ROOT = Path(__file__).parents[2]
PLAIN = np.array([0.48, 0.49, 0.50, 0.51, 0.52])


def written(study: str, folder: Path) -> str:
    """The report without its figures, which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda groups, folder: [])
        write_report(study, folder)
    return (folder / "REPORT.md").read_text()


def section(report: str, title: str) -> str:
    """The text below a heading, up to the next heading of any level."""
    (text,) = (part for part in report.split("\n#") if part.lstrip("#").startswith(f" {title}"))
    return text


def row(text: str, first: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} | "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_two_arms_are_compared_by_the_paired_test(tmp_path):
    """Worked out by hand, from tables of t."""
    # Differences -1, 0, 4 points: mean 1, deviation sqrt(7), standard error sqrt(7 / 3) = 1.528.
    # t(0.975, 2) = 4.303: 1 -+ 6.57. P(|t_2| > 0.6547) = 0.580.
    plain = np.array([0.80, 0.82, 0.84])
    ours = plain + np.array([-0.01, 0, 0.04])
    write(tmp_path, "vit", {("vit", "none", "adamw"): plain, ("vit", "autoscale", "adamw"): ours})
    report = written("vit", tmp_path)
    means = section(report, "Test accuracy")
    # t(0.975, 2) * 2 / sqrt(3) = 4.97.
    assert row(means, "AdamW") == ["82.00 ± 2.00", "3", "77.03 to 86.97"]
    differences = section(report, "Every method against")
    difference, p_values, detectable, _ = row(differences, "Autoscale minus AdamW")
    assert (difference, p_values) == ("+1.00 (-5.57 to +7.57)", "0.580")
    # The power of the paired test at that difference, by simulation.
    rng = np.random.default_rng(0)
    simulated = rng.normal(float(detectable), 7**0.5, (3, 20_000))
    assert (stats.ttest_1samp(simulated, 0).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    assert "No significant difference." in differences
    assert "Autoscale against every other method" not in report  # there is no other one
    assert "| ViT on digits, AdamW | Autoscale | 2 1 2 |" in report
    assert "Commit: f2f4ca1." in report


def test_residuals_are_pooled_and_p_values_corrected_within_each_family(tmp_path):
    bumps = {"autoscale": 0.02, "scaling": 0.005, "centering": 0, "constant": 0, "autoscale_p1": 0}
    rng = np.random.default_rng(1)
    accuracies = {
        ("resnet20", method, optimizer): PLAIN + bumps.get(method, 0) + rng.normal(0, 0.003, 5)
        for method in ("none", *bumps)
        for optimizer in ("adamw", "sgd")
    }
    write(tmp_path, "ablation", accuracies)
    report = written("ablation", tmp_path)
    # By hand: a two-way layout without repetition, 6 methods and 5 seeds.
    table = 100 * np.array([accuracies["resnet20", name, "sgd"] for name in ("none", *bumps)])
    residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    error = np.sqrt((residuals**2).sum() / (5 * 4) * 2 / 5)
    difference = table[1].mean() - table[0].mean()
    half = stats.t.isf(0.025, 20) * error
    p_value = 2 * stats.t.sf(difference / error, 20)
    plain = section(report, "Every method against").partition("SGD**")[2]
    assert "One family of 10 tests" in report  # 5 methods, 2 optimizers
    assert "One family of 8 tests" in report
    cells = row(plain, "Autoscale minus SGD")
    low, high = difference - half, difference + half
    assert cells[0] == f"{difference:+.2f} ({low:+.2f} to {high:+.2f})"
    assert p_value < 1e-3
    assert cells[1] == "< 0.001, < 0.001"
    assert "**Significant: Autoscale above SGD" in plain


def test_holms_correction_is_over_all_models_of_a_study(tmp_path):
    rng = np.random.default_rng(2)
    accuracies = {
        (model, method, "adamw"): PLAIN + rng.normal(0, 0.01, 5)
        for model in PAPER_MODELS
        for method in PAPER_METHODS
    }
    write(tmp_path, "digits", accuracies)
    report = written("digits", tmp_path)
    text = section(report, "Every method against")
    assert "One family of 12 tests" in text
    pairs = [line.split("|")[3].split(",") for line in text.splitlines() if " minus AdamW" in line]
    raw = [float(first) for first, _ in pairs]
    smallest = int(np.argmin(raw))
    assert float(pairs[smallest][1]) == pytest.approx(min(1, 12 * raw[smallest]), abs=0.01)
    assert "61.34" in section(report, "Test accuracy")  # the paper's beside it


@pytest.mark.parametrize("missing", ["none", "zscore"])
def test_nothing_is_tested_before_all_runs_of_a_network_are_in(missing, tmp_path):
    rng = np.random.default_rng(3)
    accuracies = {
        (model, method, "adamw"): PLAIN + 0.3 * (method == "autoscale") + rng.normal(0, 1e-3, 5)
        for model in PAPER_MODELS
        for method in PAPER_METHODS
    }
    accuracies["resnet20", missing, "adamw"] = PLAIN[:4]
    write(tmp_path, "digits", accuracies)
    report = written("digits", tmp_path)
    assert "74 of the 75 planned runs are in." in report
    resnet20, resnet56 = section(report, "Every method against").split("**ResNet-56 on digits")
    assert "1 planned run missing; the tests wait for them." in resnet20
    assert "minus" not in resnet20
    assert "Autoscale above AdamW" in resnet56


def test_what_was_not_planned_is_called_exploratory_and_not_tested(tmp_path):
    methods = ("none", "autoscale", "autoscale_direction")
    write(tmp_path, "ablation", {("resnet20", method, "sgd"): PLAIN for method in methods})
    text = section(written("ablation", tmp_path), "Grafting")
    assert "Exploratory: neither planned nor tested." in text
    assert len(row(text, "Autoscale's direction, plain norm minus SGD")) == 2  # no p


def test_a_run_that_diverged_is_named_and_no_difference_is_denied(tmp_path):
    accuracies = {
        (model, method, "adamw"): [*PLAIN] for model in PAPER_MODELS for method in PAPER_METHODS
    }
    accuracies["resnet20", "zscore", "adamw"] = [0.5, 0.5, None, None, None]
    write(tmp_path, "digits", accuracies)
    report = written("digits", tmp_path)
    means = section(report, "Test accuracy")
    assert (
        "ResNet-20 on digits, AdamW, Z-Score Normalization, seed 3: step 7: the training" in means
    )
    assert row(means.partition("**ResNet-56")[0], "Z-Score Normalization")[1] == "2"
    text = section(report, "Every method against").partition("**ResNet-56")[0]
    assert row(text, "Z-Score Normalization minus AdamW")[0] == (
        "diverged: 3 and 0; above in 2, below in 3 of 5 seeds"
    )
    assert "No significant difference." not in text
    assert "Z-Score Normalization diverged in 3 of 5 runs" in text


def test_one_seed_supports_nothing(tmp_path):
    write(tmp_path, "cpu", {("resnet20", method, "adamw"): [0.1] for method in PAPER_METHODS})
    report = written("cpu", tmp_path)
    assert "Nothing can be tested, and no difference is claimed." in report
    assert row(section(report, "Test accuracy"), "Autoscale") == ["10.00", "1", "-", "61.34"]


# --- The study on CIFAR-100 -----------------------------------------------------------------------


def cifar100(ours: list[float]) -> dict:
    """All of its runs; `ours` is `autoscale` before AdamW minus `none`, by seed, in points."""
    plain = [0.40, 0.42, 0.41, 0.43, 0.40, 0.42]
    better = [value + more / 100 for value, more in zip(plain, ours, strict=True)]
    rest = ("scaling", "centering", "gradient_normalization", "gradient_centralization", "zscore")
    noise = [0.001, -0.001, 0.0005, 0, 0, 0]
    return {
        ("resnet20", "none", "adamw"): plain,
        ("resnet20", "autoscale", "adamw"): better,
        **{
            ("resnet20", method, "adamw"): [a + b for a, b in zip(plain, noise, strict=True)]
            for method in rest
        },
        ("resnet20", "none", "adam", 5e-4): plain[:4],
        ("resnet20", "autoscale", "adam", 5e-4): [0.4200, 0.4395, 0.4305, 0.4500],
        ("resnet20", "none", "adam", 1.05e-3): [0.4200, 0.4405, 0.4295, 0.4500],
        ("resnet20", "none", "adam", 2e-3): [0.4205, 0.4400, 0.4300, 0.4500],
    }


def test_the_study_on_cifar100_reports_what_its_plan_says(tmp_path):
    effect = {
        "update_norm_ratio": lambda epoch: 0.8 + epoch / 10,  # 0.9, 1.0, 1.1
        "update_cosine": 0.6,
        "update_norm_ratio_by_step": lambda epoch: [1.0, 0.9, 0.8] if epoch == 1 else None,
    }
    outcomes = cifar100([0.2, 0.4, 0.3, 0.1, 0.3, 0.2])
    write(tmp_path, "cifar100", outcomes, record=effect)
    report = written("cifar100", tmp_path)
    assert "All 40 planned runs are in." in report
    assert "equivalence within 1 point" in section(report, "The plan")

    primary = section(report, "A, primary")
    # Mean 0.25 and deviation 0.105 of the six differences: 0.25 -+ 2.571 * 0.105 / sqrt(6).
    assert row(primary, "Autoscale minus AdamW")[0] == "+0.25 (+0.14 to +0.36)"
    assert "Autoscale is 0.25 points above AdamW" in primary
    assert "Equivalent within 1 point" in primary

    assert "One family of 2 tests" in section(report, "B: which half")
    mechanism = section(report, "C, the mechanism")
    assert "Adam + L2, penalty x2.1 minus Adam + L2 | +2.00" in mechanism
    assert "it is nearer to the stronger penalty" in mechanism
    assert "p, Holm" not in mechanism
    assert "p, Holm" not in section(report, "The baselines")

    steps = section(report, "What each method did").partition("Adam + L2**")[0]
    assert row(steps, "Autoscale") == [
        *("0.900, 1.100, 1.000", "0.600, 0.600, 0.600", "0.640, 0.640, 0.640")
    ]
    assert "| AdamW |" not in steps
    # Accuracy a third, two thirds, and all of 40 to 43 %: the last three are all epochs.
    assert row(section(report, "Secondary").partition("Adam + L2**")[2], "Adam + L2") == [
        *("1.000 ± 0.000", "27.67 ± 0.86")
    ]
    assert "## Time per step" not in report  # every run was metered


@pytest.mark.parametrize(
    ("ours", "stronger", "conclusion"),
    [
        ([0.44, 0.46, 0.45, 0.47], 2.0, "it is nearer to the stronger penalty."),
        ([0.44, 0.46, 0.45, 0.47], -2.0, "it is nearer to the plain penalty."),
        # Above both, and either may be the better one.
        ([0.44, 0.46, 0.45, 0.47], 0.0, "which of the two penalties gives more"),
        # Halfway between them.
        ([0.41, 0.43, 0.42, 0.44], 2.0, "do not show which of the two it is nearer to."),
    ],
)
def test_autoscale_is_nearer_to_a_penalty_only_if_it_is_known_which_side_that_is_on(
    ours, stronger, conclusion, tmp_path
):
    plain = [0.40, 0.42, 0.41, 0.43]
    noise = [0.002, -0.002, 0.001, -0.001]
    arms = {
        ("resnet20", "none", "adam", 5e-4): plain,
        ("resnet20", "autoscale", "adam", 5e-4): ours,
        ("resnet20", "none", "adam", 1.05e-3): [
            a + b + stronger / 100 for a, b in zip(plain, noise, strict=True)
        ],
    }
    write(tmp_path, "cifar100", arms)
    assert conclusion in section(written("cifar100", tmp_path), "C, the mechanism")


@pytest.mark.parametrize(
    ("further", "conclusion"),
    [(2.0, "penalty x4 gives more than"), (-2.0, "gives less than"), (0.0, "is not shown.")],
)
def test_a_still_stronger_penalty_gives_more_only_if_that_is_known(further, conclusion, tmp_path):
    outcomes = cifar100([2.0] * 6)
    stronger = outcomes["resnet20", "none", "adam", 1.05e-3]
    noise = [0.002, -0.002, 0.001, -0.001]
    outcomes["resnet20", "none", "adam", 2e-3] = [
        a + b + further / 100 for a, b in zip(stronger, noise, strict=True)
    ]
    write(tmp_path, "cifar100", outcomes)
    assert conclusion in section(written("cifar100", tmp_path), "C, the mechanism")


def test_the_primary_test_waits_for_all_of_its_runs(tmp_path):
    outcomes = cifar100([2.0] * 6)
    outcomes["resnet20", "autoscale", "adamw"] = outcomes["resnet20", "autoscale", "adamw"][:5]
    write(tmp_path, "cifar100", outcomes)
    primary = section(written("cifar100", tmp_path), "A, primary")
    assert "1 of the planned runs are missing; the test waits for all of them." in primary
    assert "minus" not in primary
    assert "above" not in primary


# --- The files ------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".jsonl"}


def test_a_report_comes_out_the_same_to_the_byte(tmp_path):
    accuracies = {("vit", method, "adamw"): [0.5, 0.6] for method in ("none", "autoscale")}
    effect = {
        "update_norm_ratio": 1.0,
        "update_cosine": 0.9,
        "update_norm_ratio_by_step": [1.0, 0.9],
    }
    for copy in ("one", "two"):
        write(tmp_path / copy, "vit", accuracies, record=effect)
        write_report("vit", tmp_path / copy)
    first, second = contents(tmp_path / "one"), contents(tmp_path / "two")
    names = [*(f"figure{number}" for number in (1, 2, 3, 4)), "effect"]
    pictures = [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert set(first) == {"REPORT.md", *pictures}
    assert first == second
    for name in pictures:
        if name.endswith("png"):
            with Image.open(tmp_path / "one" / name) as picture:
                assert len(set(picture.convert("L").tobytes())) > 10  # something is drawn


@pytest.mark.parametrize(
    ("study", "shown"),
    [
        ("digits", "VGG-16-BN on digits, AdamW"),
        ("ablation", "ResNet-20 on digits, AdamW"),
        ("cifar100", "ResNet-20 on CIFAR-100, AdamW"),
    ],
)
def test_figure_3_shows_the_papers_network_or_else_its_optimizer(
    study, shown, monkeypatch, tmp_path
):
    arms = [(run.model, run.method, run.optimizer) for run in STUDIES[study].experiments()]
    write(tmp_path, study, {arm: [0.5, 0.6] for arm in arms if "autoscale" in arm})
    titles = []
    monkeypatch.setattr(
        figures, "exponents", lambda _, groups: titles.extend(group.title for group in groups)
    )
    monkeypatch.setattr(figures, "figure_of", lambda *_: contextlib.nullcontext(Figure()))
    figures.draw(group(STUDIES[study], read(tmp_path).values()), tmp_path)
    assert titles == [shown]


@pytest.mark.parametrize("study", STUDIES)
def test_every_method_is_named_inside_the_picture(study, monkeypatch, tmp_path):
    arms = [(run.model, run.method, run.optimizer) for run in STUDIES[study].experiments()]
    write(tmp_path, study, {arm: [0.5, 0.6] for arm in arms})
    legends = []

    @contextlib.contextmanager
    def figure_of(path, size):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.draw_without_rendering()
        for legend in figure.legends:
            legends.append([text.get_text() for text in legend.get_texts()])
            box = legend.get_window_extent()
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
            for axes in figure.axes:
                assert axes.get_window_extent().height > 1.8 * figure.dpi  # inches

    monkeypatch.setattr(figures, "figure_of", figure_of)
    groups = group(STUDIES[study], read(tmp_path).values())
    figures.draw(groups, tmp_path)
    assert set(legends[0]) == {arm.label for each in groups for arm in each.shown.values()}


def test_a_name_wider_than_the_figure_is_in_the_legend_all_the_same():
    figure = Figure(figsize=(2, 2), layout="constrained")
    axes = figure.subplots()
    axes.plot([1], [2], label="a method with a name of very many words")
    figures.common_legend(figure, [axes])
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 1


@pytest.mark.parametrize("study", [name for name in STUDIES if (ROOT / "results" / name).exists()])
def test_the_committed_reports_are_those_of_the_committed_records(study, tmp_path):
    committed = ROOT / "results" / study
    for path in committed.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_report(study, tmp_path)
    pictures = "".join(path.read_text() for path in committed.glob("*.svg"))
    same_matplotlib = f"Matplotlib v{mpl.__version__}" in pictures
    for file, content in contents(tmp_path).items():
        if file == "REPORT.md" or same_matplotlib:
            assert content == (committed / file).read_bytes(), file


def test_a_folder_without_records_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no records; make them with"):
        write_report("digits", tmp_path)


def test_the_numbers_of_test_images_are_those_of_the_data():
    assert TEST_IMAGES["digits"] == len(data.load("digits").test_labels)
    assert TEST_IMAGES["digits"] < len(load_digits().target)
