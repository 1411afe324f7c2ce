"""The pictures of a run show what its records hold."""

import matplotlib.figure
import numpy as np
import pytest

from tests.training.test_record import GOOD
from training import plots
from training.options import Experiment

EPOCHS = [1, 2, 3, 4, 5]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, path: saved.append(figure)
    )
    return saved


def make_records(**same):
    rng = np.random.default_rng(0)
    vary = [name for name, value in GOOD.items() if isinstance(value, float)]
    return [
        GOOD
        | {"epoch": epoch, "layer_std": {"first": rng.random(), "second": rng.random()}}
        | {name: rng.random() for name in vary}
        | same
        for epoch in EPOCHS
    ]


def lines_of(figure) -> dict[str, list[list[float]]]:
    """The curves of each panel, by the panel's title."""
    assert all(list(line.get_xdata()) == EPOCHS for axes in figure.axes for line in axes.lines)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert {axes.get_xlabel() for axes in panels} == {"epoch"}
    return {axes.get_title(): [list(line.get_ydata()) for line in axes.lines] for axes in panels}


def test_curves_are_losses_and_accuracy(figures):
    records = make_records()
    plots.plot_curves(records, Experiment(validation_size=9), "title", "path")
    train, test, validation, accuracy = (
        [record[name] for record in records]
        for name in ("train_loss", "test_loss", "validation_loss", "test_accuracy")
    )
    accuracy = [100 * value for value in accuracy]
    title = f"Test accuracy, {accuracy[-1]:.1f}% at the end"
    assert lines_of(figures[0]) == {"Loss": [train, test, validation], title: [accuracy]}
    legend = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert legend == ["training, with label smoothing", "test, without", "validation"]


@pytest.mark.parametrize(("scaled", "measured"), [(True, True), (False, False)])
def test_gradients_are_layers_global_std_factor_and_effect(figures, scaled, measured):
    same = {} if scaled else {"scale_factor": None, "exponent": None}
    records = make_records(**same | ({} if measured else {"update_norm_ratio": None}))
    plots.plot_gradients(records, "title", "path")
    columns = {name: [record[name] for record in records] for name in GOOD}
    layers = [[stds[name] for stds in columns["layer_std"]] for name in ("first", "second")]
    expected = {
        "Layer-wise gradient std": layers,
        "Global gradient std $s_t$": [columns["global_std"]],
    }
    logarithmic = set(expected)
    if scaled:
        expected["Scale factor $a_t$, exponent 2"] = [columns["scale_factor"]]
    if measured:
        effect = [columns["update_norm_ratio"], columns["update_cosine"]]
        expected["Update vs. the plain optimizer's"] = effect
    assert lines_of(figures[0]) == expected
    assert logarithmic == {
        axes.get_title() for axes in figures[0].axes if axes.get_yscale() == "log"
    }


def test_the_map_has_a_row_for_each_layer_and_a_column_for_each_epoch(figures):
    records = make_records()
    plots.plot_layer_map(records, "title", "path")
    (axes, *_), rows = figures[0].axes, [list(record["layer_std"].values()) for record in records]
    (mesh,) = axes.collections
    np.testing.assert_array_equal(mesh.get_array(), np.transpose(rows))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]
    assert axes.yaxis_inverted()  # from input (top) to output
    assert (mesh.norm.vmin, mesh.norm.vmax) == (np.min(rows), np.max(rows))
