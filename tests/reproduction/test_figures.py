"""The figures: what is drawn of which runs, and that it can be told apart."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic import cifar100, short, write, write_tuned

from reproduction import figures
from reproduction.presets import PAPER_METHODS, PRESETS
from reproduction.records import table
from reproduction.statistics import differences
from reproduction.studies import ACCURACY, Axes, Study, of_grid
from training.options import recipe

PLAIN = np.array([0.48, 0.49, 0.50, 0.51, 0.52])


@contextlib.contextmanager
def drawn(study: Study, folder: Path):
    """The figures that are drawn of a study, by name."""
    found = {}

    @contextlib.contextmanager
    def figure_of(path, size):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.draw_without_rendering()
        found[path.name] = figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "figure_of", figure_of)
        runs = table(study, folder)
        there = runs[runs["state"] != "missing"]
        figures.draw(study, there, differences(study, runs), folder)
        yield found


# The others draw nothing by epoch before all their runs are in.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, it in PRESETS.items() if it.outcome == ACCURACY])
def test_every_arm_has_a_look_of_its_own_and_is_named_inside_the_picture(name, tmp_path):
    study = short(PRESETS[name])
    arms = {(run.model, run.method, run.optimizer): [0.5, 0.6] for run in study.experiments}
    write(study, tmp_path, arms)
    runs = table(study, tmp_path)
    looks = figures.looks_of(runs)
    assert len(set(looks.values())) == len(looks) == runs["arm"].nunique()
    with drawn(study, tmp_path) as found:
        (legend,) = found["figure4"].legends
    untagged = (runs["tag"] == "") | ("tag" not in study.arms)
    plain = set(runs[(runs["method"] == "none") & untagged]["arm"])
    assert {text.get_text() for text in legend.get_texts()} == set(looks) - plain
    box, figure = legend.get_window_extent(), found["figure4"].bbox
    assert figure.x0 <= box.x0 < box.x1 <= figure.x1
    assert figure.y0 <= box.y0 < box.y1 <= figure.y1


def test_accuracy_is_drawn_against_the_learning_rate_with_every_seed(tmp_path):
    experiment = dataclasses.replace(recipe("digits"), epochs=3)
    axes = Axes(learning_rates=(1e-3, 2e-3, 4e-3), weight_decays=(0.0, 1e-4), seeds=2)
    study = of_grid("mine", experiment, axes)
    arms = {
        ("resnet20", "none", "adamw"): [0.5, 0.6],
        ("resnet20", "autoscale", "adamw"): [0.6] * 2,
    }
    write(study, tmp_path, arms)
    with drawn(study, tmp_path) as found:
        assert set(found) == {"differences", "learning_rate", "weight_decay", "curves"}
    assert len(found["learning_rate"].axes) == 2  # one for each weight decay
    axes = found["learning_rate"].axes[0]
    assert axes.get_xscale() == "log"
    means = next(line for line in axes.lines if line.get_label() == "AdamW")
    assert means.get_xydata().tolist() == pytest.approx(
        np.array([[1e-3, 55.0], [2e-3, 55.0], [4e-3, 55.0]])
    )
    dots = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert [len(line.get_xdata()) for line in dots] == [6, 6]
    assert found["weight_decay"].axes[0].get_xscale() == "symlog"  # 0 is among them


def test_validation_loss_is_drawn_where_there_are_validation_images(tmp_path):
    with drawn(write_tuned(tmp_path), tmp_path) as found:
        (axes,) = found["learning_rate"].axes
        (forest,) = found["differences"].axes
    assert (axes.get_ylabel(), axes.get_yscale()) == ("validation loss", "log")
    means = next(line for line in axes.lines if line.get_label() == "Autoscale")
    assert means.get_xydata().tolist() == pytest.approx(
        np.array([[1e-3, 3.6], [2e-3, 2.6], [4e-3, 0.6]])
    )
    assert forest.get_xlabel() == "nats of test loss"


def test_the_runs_of_another_study_are_drawn_beside_a_studys_own(tmp_path):
    study, name = short(PRESETS["cifar100-rates"]), "cifar100-rates"
    write(PRESETS["cifar100"], tmp_path / "cifar100", cifar100([0.2, 0.4, 0.3, 0.1, 0.3, 0.2]))
    arms = {(run.model, run.method, run.optimizer): [0.5, 0.6] for run in study.experiments}
    write(study._replace(experiments=PRESETS[name].experiments), tmp_path / name, arms)
    with drawn(PRESETS[name], tmp_path / name) as found:
        panels = {each: found[each].axes[0].lines for each in ("learning_rate", "weight_decay")}
        assert all(len(found[each].axes) == 1 for each in panels)
    dots = {
        each: [sorted(line.get_xdata()) for line in lines if line.get_linestyle() == "None"]
        for each, lines in panels.items()
    }
    assert (
        dots["learning_rate"]
        == [[1e-3] * 6 + [2e-3, 2e-3, 4e-3, 4e-3, 8e-3, 8e-3, 0.016, 0.016]] * 2
    )
    assert dots["weight_decay"] == [
        [5e-4] * 4 + [1.05e-3] * 4 + [2e-3] * 4 + [4e-3] * 2,
        [5e-4] * 4 + [1.05e-3] * 2 + [2e-3] * 2,
    ]


def test_the_forest_shows_intervals_and_seeds_and_the_paper(tmp_path):
    write(PRESETS["cifar100"], tmp_path / "cifar100", cifar100([0.2, 0.4, 0.3, 0.1, 0.3, 0.2]))
    models = ("resnet20", "resnet56")
    digits = {(model, method, "adamw"): PLAIN for model in models for method in PAPER_METHODS}
    for number, model in enumerate(models):
        digits[model, "autoscale", "adamw"] = PLAIN + number / 100 + PLAIN[::-1] / 10
    figures.draw_verdict(tmp_path)
    assert not (tmp_path / "verdict.png").exists()  # digits has no records
    write(PRESETS["digits"], tmp_path / "digits", digits)
    rates = PRESETS["cifar100-rates"]
    fresh = rates._replace(experiments=[it for it in rates.experiments if "fresh" in it.tag])
    pairs = {("resnet20", "none", "adamw"): [0.5] * 10}
    pairs["resnet20", "autoscale", "adamw"] = [0.5] * 6 + [0.48, 0.49, 0.49, 0.49]
    write(fresh, tmp_path / "cifar100-rates", pairs)
    painted = []
    with pytest.MonkeyPatch.context() as patch:
        forest = figures.forest
        patch.setattr(figures, "forest", lambda *args: (painted.append(args), forest(*args))[1])
        figures.draw_verdict(tmp_path)
    (above, first, names), (_, second, _) = painted
    assert names == [
        *("minus AdamW (6 seeds)", "minus AdamW, learning rate 0.008 (4 seeds)"),
        "minus Adam + L2 (4 seeds)",
        *("minus Adam + L2, penalty x2.1 (4 seeds)", "minus Adam + L2, penalty x4 (4 seeds)"),
    ]
    assert first["value"].iloc[:2].tolist() == pytest.approx([0.25, -1.25])
    assert list(second["label"]) == ["Autoscale minus AdamW"] * 2
    (diamond,) = (line for line in above.lines if line.get_marker() == "D")
    assert diamond.get_xydata().tolist() == [[pytest.approx(61.34 - 59.32), 0]]
    assert (tmp_path / "verdict.png").exists()
