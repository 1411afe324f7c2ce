"""Several runs side by side, in a table and a picture: `python -m training.compare --help`."""

import dataclasses
import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import matplotlib as mpl
import tyro
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

from models import MODELS
from training import config, output, plots
from training.config import Experiment, experiment_of
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS, method_label
from training.record import SCHEMA, Record, parse_records, read_records

# Okabe and Ito: told apart by the color-blind. More runs than these get shades of one scale.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLUMNS = 3  # of panels, and of maps
TITLE = 40  # characters in a line of a title
Quantity = Callable[[Record], float | None]


class Panel(NamedTuple):
    """What is drawn over epochs, a line for each run."""

    title: str
    solid: Quantity
    dashed: Quantity | None = None
    scale: str = "linear"


class Run(NamedTuple):
    """A run that has finished at least one epoch."""

    path: Path
    experiment: Experiment
    records: list[Record]


def main(
    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN RUN ...", help_behavior_hint=""),
    ],
    out: Path = Path("compare.png"),
) -> None:
    """Compare runs: a table of their last epochs, and a picture of all their epochs.

    Args:
      runs: folders of runs, finished or not, or record files results/STUDY/NAME.jsonl.
      out: the picture; its suffix, such as .png, .svg or .pdf, decides the format.
    """
    output.outlive_readers()
    try:
        found = [read(path) for path in runs]
        if len(found) < 2:
            raise ValueError("two runs or more can be compared; give their folders")
        show(found)
        save(draw(found), out)
    except (ValueError, OSError) as error:
        sys.exit(f"compare: {error}")
    print(f"Picture: {out}")


def read(path: Path) -> Run:
    """Reads a run.

    Args:
      path: the run's folder, or a record file of a study.

    Raises:
      ValueError: if no run, or no finished epoch, can be read there; the message says why, and
        what may help.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the folder of a run, such as runs/NAME")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(
                f"{path} is not the folder of a run, since it has no config.json; give one that "
                "train.py has written"
            )
        run = Run(path, config.load(path), _records(path))
    else:
        run = _read_file(path)
    if not run.records:
        raise ValueError(f"{path} has no finished epoch; wait for its first one, or leave it out")
    return run


def _records(folder: Path) -> list[Record]:
    if not (folder / "metrics.jsonl").exists():
        return []
    try:
        return read_records(folder)
    except ValueError as error:
        raise ValueError(f"{error}; put back a copy of the file, or leave the run out") from error


def _read_file(path: Path) -> Run:
    try:
        first, *lines = path.read_bytes().splitlines()
        description = json.loads(first)
        if description.get("schema", 1) != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        return Run(path, experiment_of(description["config"]), parse_records(lines, path))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the record file of a run ({error}); give a run's folder, or a file "
            "results/STUDY/NAME.jsonl"
        ) from error


def labels(runs: Sequence[Run]) -> list[str]:
    """What tells each run from the others: its options that differ, else its path."""
    experiments = [run.experiment for run in runs]
    differing = [
        field.name
        for field in dataclasses.fields(Experiment)
        if field.name != "effect"  # which changes nothing
        and len({getattr(experiment, field.name) for experiment in experiments}) > 1
    ]
    if all(it.learning_rate == OPTIMIZERS[it.optimizer].learning_rate for it in experiments):
        differing = [name for name in differing if name != "learning_rate"]
    texts = [_describe(experiment, differing) for experiment in experiments]
    if len(set(texts)) == len(texts):
        return texts
    return [str(run.path) for run in runs]


def _describe(experiment: Experiment, names: Sequence[str]) -> str:
    it = experiment
    words = {
        "dataset": DATASETS[it.dataset].label,
        "model": MODELS[it.model].label,
        "method": method_label(it.method, it.optimizer),
        "optimizer": OPTIMIZERS[it.optimizer].label,
        "tag": it.tag,
    }
    parts = [words.get(name, f"{name.replace('_', ' ')} {getattr(it, name)}") for name in names]
    return ", ".join(part for part in dict.fromkeys(parts) if part)


def title(runs: Sequence[Run]) -> str:
    """The model, the data set and the chain, as far as all runs have them in common."""
    it = runs[0].experiment

    def common(name: str) -> bool:
        return len({getattr(run.experiment, name) for run in runs}) == 1

    parts = []
    if common("model"):
        parts.append(MODELS[it.model].label)
    if common("dataset"):
        parts.append(DATASETS[it.dataset].label)
    if common("method") and it.method != "none":
        parts.append(METHODS[it.method].label)
    if common("optimizer"):
        parts.append(OPTIMIZERS[it.optimizer].label)
    return ", ".join(parts)


def show(runs: Sequence[Run]) -> None:
    """Prints a line for each run: where it is after its last epoch."""
    console = Console(highlight=False)
    columns: dict[str, Callable[[Record], str]] = {
        "epoch": lambda record: str(record["epoch"]),
        "train loss": lambda record: f"{record['train_loss']:.4f}",
        "test loss": lambda record: f"{record['test_loss']:.4f}",
        "accuracy": lambda record: f"{record['test_accuracy']:.2%}",
        "grad std": lambda record: f"{record['global_std']:.2e}",
        "scale": lambda record: _format(record["scale_factor"], ".4f"),
        "ratio": lambda record: _format(record["update_norm_ratio"], ".3f"),
        "cosine": lambda record: _format(record["update_cosine"], ".3f"),
    }
    rows = {label: run.records[-1] for label, run in zip(labels(runs), runs, strict=True)}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column("run", overflow="fold")
    shown = {
        name: text
        for name, text in columns.items()
        if any(text(record) != "-" for record in rows.values())
    }
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for label, record in rows.items():
        table.add_row(label, *(text(record) for text in shown.values()))
    if not console.is_terminal:
        console.width = sys.maxsize  # nothing is wrapped
    if common := title(runs):
        console.print(common, style="bold", soft_wrap=True)
    console.print(table)


def _format(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def draw(runs: Sequence[Run]) -> Figure:
    """Draws a panel for each quantity, a line in it for each run, and a map of each run's layers.

    Args:
      runs: two or more.

    Returns:
      The figure; its maps have one color scale.
    """
    mixed = plots.mixed_in([run.experiment for run in runs])
    panels = [
        Panel(
            f"Loss: test (solid), training{mixed and f' with {mixed}'} (dashed)",
            lambda record: record["test_loss"],
            lambda record: record["train_loss"],
            scale="log",
        ),
        Panel("Test accuracy in %", lambda record: 100 * record["test_accuracy"]),
        Panel("Global gradient std $s_t$", lambda record: record["global_std"], scale="log"),
        Panel("Scale factor $a_t$", lambda record: record["scale_factor"]),
        Panel(
            "Update norm, relative to the plain optimizer's",
            lambda record: record["update_norm_ratio"],
        ),
        Panel(
            "Cosine of the update to the plain optimizer's", lambda record: record["update_cosine"]
        ),
    ]
    panels = [
        panel for panel in panels if any(panel.solid(run.records[-1]) is not None for run in runs)
    ]
    texts, shades = labels(runs), mpl.colormaps["viridis"].resampled(len(runs))
    colors = COLORS if len(runs) <= len(COLORS) else [shades(i) for i in range(len(runs))]
    layers = [list(run.records[-1]["layer_std"]) for run in runs]
    panel_columns = 2 if len(panels) == 4 else COLUMNS
    panel_rows, map_rows = -(-len(panels) // panel_columns), -(-len(runs) // COLUMNS)
    heights = (
        0.5 + 2.6 * panel_rows,
        0.5 + map_rows * (0.8 + plots.LAYER_HEIGHT * max(map(len, layers))),
    )

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        figure.suptitle(title(runs), fontweight="bold")
        top, bottom = cast(Any, figure.subfigures(2, 1, height_ratios=heights))
        panel_axes = top.subplots(panel_rows, panel_columns, squeeze=False).flat
        for axes, panel in itertools.zip_longest(panel_axes, panels):
            if panel is None:
                axes.remove()
                continue
            for run, color in zip(runs, colors, strict=False):
                for value, line in ((panel.solid, "-"), (panel.dashed, "--")):
                    if value:
                        plots.plot_epochs(axes, list(map(value, run.records)), color, line=line)
            axes.set_title(textwrap.fill(panel.title, TITLE), fontsize=9)
            axes.set_yscale(panel.scale)
        handles = [
            Line2D([], [], color=color, label=text)
            for text, color in zip(texts, colors, strict=False)
        ]
        in_a_row = min(COLUMNS, max(1, 100 // max(map(len, texts))))
        top.legend(handles=handles, loc="outside upper center", ncols=in_a_row)

        norm = plots.layer_norm([run.records for run in runs])
        map_axes = bottom.subplots(map_rows, min(COLUMNS, len(runs)), squeeze=False).flat
        for number, axes in enumerate(map_axes):
            if number >= len(runs):
                axes.remove()
                continue
            axes.grid(False)
            plots.draw_layer_map(axes, runs[number].records, norm)
            axes.set_title(textwrap.fill(texts[number], TITLE), fontsize=9)
            if number % COLUMNS and layers[number] == layers[number - 1]:
                axes.set_yticklabels([])
        bottom.suptitle("Gradient std by layer, from input (top) to output", fontsize=9)
        bottom.colorbar(ScalarMappable(norm), ax=bottom.axes, aspect=20 * map_rows)
        plots.label_epochs(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure; an error names the path, and says what may help."""
    try:
        figure.savefig(path)
    except ValueError as error:  # Matplotlib's for a suffix that it does not know
        raise ValueError(f"--out is {path}: {error}") from error
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written: {error.strerror}; choose another file with --out"
        ) from error


if __name__ == "__main__":
    tyro.cli(main, prog="python -m training.compare")
