"""The pictures of a run show what its records hold."""

import matplotlib.figure
import numpy as np
import pytest
from training.config import Experiment

from training import plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, path: saved.append(figure)
    )
    return saved


def records(*, scaled: bool = True, measured: bool = True):
    rng = np.random.default_rng(0)
    return [
        {
            "epoch": epoch,
            "train_loss": 1 + rng.random(),
            "test_loss": rng.random(),
            "test_accuracy": rng.random(),
            "global_std": rng.random(),
            "scale_factor": rng.random() if scaled else None,
            "exponent": 1 if scaled else None,
            "layer_std": {"first/kernel": rng.random(), "second/kernel": rng.random()},
            "update_norm_ratio": rng.random() if measured else None,
            "update_cosine": rng.random() if measured else None,
        }
        for epoch in range(1, 6)
    ]


def lines_of(figure) -> dict[str, list[list[float]]]:
    """The curves of each panel, by the panel's title."""
    for axes in figure.axes:
        assert all(list(line.get_xdata()) == [1, 2, 3, 4, 5] for line in axes.lines)
    return {
        axes.get_title(): [list(line.get_ydata()) for line in axes.lines]
        for axes in figure.axes
        if axes.get_title()
    }


def column(kept, name):
    return [record[name] for record in kept]


def test_curves_are_losses_and_accuracy(figures):
    kept = records()
    plots.plot_curves(kept, Experiment(), "title", "path")
    accuracy = [100 * value for value in column(kept, "test_accuracy")]
    assert lines_of(figures[0]) == {
        "Loss": [column(kept, "train_loss"), column(kept, "test_loss")],
        f"Test accuracy, {accuracy[-1]:.1f}% at the end": [accuracy],
    }


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("measured", [True, False])
def test_gradients_are_layers_global_std_factor_and_effect(figures, scaled, measured):
    kept = records(scaled=scaled, measured=measured)
    plots.plot_gradients(kept, "title", "path")
    layers = [
        [stds[name] for stds in column(kept, "layer_std")]
        for name in ("first/kernel", "second/kernel")
    ]
    expected = {
        "Layer-wise gradient std": layers,
        "Global gradient std $s_t$": [column(kept, "global_std")],
    }
    if scaled:
        expected["Scale factor $a_t$, exponent 1"] = [column(kept, "scale_factor")]
    if measured:
        effect = [column(kept, "update_norm_ratio"), column(kept, "update_cosine")]
        expected["Update vs. the plain optimizer's"] = effect
    assert lines_of(figures[0]) == expected
    scales = {axes.get_title(): axes.get_yscale() for axes in figures[0].axes}
    assert {title for title, scale in scales.items() if scale == "log"} >= {*expected} - {
        "Scale factor $a_t$, exponent 1",
        "Update vs. the plain optimizer's",
    }


def test_the_map_has_a_row_for_each_layer_and_a_column_for_each_epoch(figures):
    kept = records()
    plots.plot_layer_map(kept, "title", "path")
    (mesh,) = figures[0].axes[0].collections
    rows = [
        [stds[name] for stds in column(kept, "layer_std")]
        for name in ("first/kernel", "second/kernel")
    ]
    np.testing.assert_array_equal(mesh.get_array(), rows)
