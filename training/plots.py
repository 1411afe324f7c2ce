"""The pictures of a run: its loss and accuracy, and the statistics of its gradients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.options import Experiment
from training.record import Record

STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
LAYER_HEIGHT = 0.16  # inches of a layer in a map
# Okabe and Ito: told apart by the color-blind.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def plot_curves(records: Sequence[Record], experiment: Experiment, title: str, path: Path) -> None:
    """Draws the loss and the test accuracy over epochs."""
    mixed = ["label smoothing"] * (experiment.label_smoothing > 0)
    mixed += ["CutMix"] * (experiment.cutmix_probability > 0)
    training, test = "training", "test"
    if mixed:
        training, test = f"training, with {' and '.join(mixed)}", "test, without"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3), layout="constrained")
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        _plot_epochs(loss_axes, [record["train_loss"] for record in records], ORANGE, training)
        _plot_epochs(loss_axes, [record["test_loss"] for record in records], BLUE, test)
        if experiment.validation_size:
            validation = [record["validation_loss"] for record in records]
            _plot_epochs(loss_axes, validation, GREEN, "validation")
        loss_axes.set(title="Loss", ylim=(0, None))
        loss_axes.legend()
        accuracy = [100 * record["test_accuracy"] for record in records]
        _plot_epochs(accuracy_axes, accuracy, BLUE)
        accuracy_axes.set_title(f"Test accuracy, {accuracy[-1]:.1f}% at the end")
        _finish(figure, title, path)


def plot_gradients(records: Sequence[Record], title: str, path: Path) -> None:
    """Draws the standard deviation of each layer's gradient, the global one, and the scale factor.

    As in the paper's Figures 1 and 2; where it was measured, the effect on the updates as well.
    """
    scaled = records[-1]["scale_factor"] is not None
    measured = records[-1]["update_norm_ratio"] is not None
    panels = 2 + scaled + measured
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 + 3 * panels, 3.2), layout="constrained")
        layer_axes, global_axes, *more_axes = figure.subplots(1, panels)

        layers = {
            layer: [record["layer_std"][layer] for record in records]
            for layer in records[-1]["layer_std"]
        }
        plot_layers(figure, layer_axes, [record["epoch"] for record in records], layers)
        layer_axes.set(title="Layer-wise gradient std", yscale="log")

        _plot_epochs(global_axes, [record["global_std"] for record in records], BLUE)
        global_axes.set(title="Global gradient std $s_t$", yscale="log")
        if scaled:
            factors = [record["scale_factor"] for record in records]
            _plot_epochs(more_axes[0], factors, ORANGE)
            more_axes[0].set_title(f"Scale factor $a_t$, exponent {records[-1]['exponent']}")
        if measured:
            ratios = [record["update_norm_ratio"] for record in records]
            cosines = [record["update_cosine"] for record in records]
            _plot_epochs(more_axes[-1], ratios, BLUE, "ratio of norms")
            _plot_epochs(more_axes[-1], cosines, ORANGE, "cosine")
            more_axes[-1].set_title("Update vs. the plain optimizer's")
            more_axes[-1].legend()
        _finish(figure, title, path)


def plot_layer_map(records: Sequence[Record], title: str, path: Path) -> None:
    """Draws the standard deviation of each layer's gradient by name, in colors over epochs.

    A layer without any is blank.
    """
    names = list(records[-1]["layer_std"])
    stds = np.array([[record["layer_std"][name] for record in records] for name in names])
    stds = np.ma.masked_less_equal(stds, 0)
    norm = LogNorm() if stds.count() else LogNorm(1e-3, 1)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(8, 1.5 + LAYER_HEIGHT * len(names)), layout="constrained")
        axes = figure.subplots()
        epochs, rows = np.arange(len(records) + 1) + 0.5, np.arange(len(names) + 1)
        mesh = axes.pcolormesh(epochs, rows, stds, norm=norm)
        axes.set_yticks(rows[:-1] + 0.5, names, fontsize=7)
        axes.invert_yaxis()
        axes.set_title("Gradient std by layer, from input (top) to output")
        figure.colorbar(mesh, ax=axes)
        _finish(figure, title, path)


def plot_layers(
    figure: Figure, axes: Axes, epochs: Sequence[int], layers: Mapping[str, Sequence[float]]
) -> None:
    """Draws one curve per layer, colored by depth, with a color bar.

    Args:
      figure: the figure of `axes`.
      axes: where to draw.
      epochs: the horizontal axis.
      layers: the values of each layer by epoch, from the network's input to its output.
    """
    colors = mpl.colormaps["viridis"].resampled(len(layers))
    marker = "o" if len(epochs) == 1 else ""
    for depth, values in enumerate(layers.values()):
        axes.plot(epochs, values, marker=marker, color=colors(depth), markersize=3, linewidth=1.2)
    norm = BoundaryNorm(np.arange(0.5, len(layers) + 1), len(layers))
    figure.colorbar(
        ScalarMappable(norm, colors),
        ax=axes,
        label="layer, from input to output",
        ticks=MaxNLocator(8, integer=True),
    )


def _plot_epochs(axes: Axes, values: Sequence[Any], color: str, label: str = "") -> None:
    epochs = range(1, len(values) + 1)
    marker = "o" if len(epochs) < 30 else ""
    axes.plot(epochs, values, color=color, label=label, marker=marker, markersize=3, linewidth=1.2)


def _finish(figure: Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontweight="bold")
    for axes in figure.axes:
        if axes.get_title():  # color bars have none
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.savefig(path)
