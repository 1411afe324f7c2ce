"""Runs side by side: what is told apart, what is drawn, and what is said of what cannot be."""

import dataclasses
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from training.config import Experiment, Launch

from training import compare, config
from training.record import SCHEMA, Record

LAYERS = ("stem/kernel", "classifier/kernel")


def record(epoch: int, factor: float, **changes) -> Record:
    values = {
        "epoch": epoch,
        "step": 10 * epoch,
        "train_loss": factor * 2 / epoch,
        "test_loss": factor / epoch,
        "test_accuracy": factor * epoch / 10,
        "learning_rate": 1e-3,
        "global_std": factor * 3e-3,
        "scale_factor": None,
        "exponent": None,
        "layer_std": dict(zip(LAYERS, (factor * 1e-3, factor * epoch * 1e-2), strict=True)),
        "update_norm_ratio": None,
        "update_cosine": None,
        "update_norm_ratio_by_step": None,
        "images_per_second": 100.0,
        "seconds": 1.0,
    }
    return Record(**values | changes)


def write(folder: Path, experiment: Experiment, records: list[Record]) -> Path:
    folder.mkdir()
    config.save(folder, experiment, Launch(), schema=SCHEMA)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs, of 3 and 2 epochs, that differ in their method."""
    scaled = {"scale_factor": 0.5, "exponent": 2}
    return [
        write(tmp_path / "a", Experiment(method="none"), [record(i, 1.0) for i in (1, 2, 3)]),
        write(tmp_path / "b", Experiment(), [record(i, 2.0, **scaled) for i in (1, 2)]),
    ]


def as_record_file(folder: Path) -> Path:
    """The same as a study publishes it."""
    path = folder.with_suffix(".jsonl")
    description = json.dumps(json.loads((folder / "config.json").read_text())) + "\n"
    path.write_text(description + (folder / "metrics.jsonl").read_text())
    return path


def test_the_table_has_the_last_epoch_of_each(runs, tmp_path, capsys):
    out = tmp_path / "picture.png"
    compare.main((*runs, as_record_file(runs[1])), out)
    first, above, header, *rows, last = capsys.readouterr().out.splitlines()
    assert first == "ResNet-20, digits, AdamW"
    assert above.split() == ["train", "test"]
    columns = ["run", "epoch", "loss", "loss", "accuracy", "grad std", "scale"]
    assert re.split(r"  +", header.strip()) == columns
    none = ["3", "0.6667", "0.3333", "30.00%", "3.00e-03", "-"]
    scaled = ["2", "2.0000", "1.0000", "40.00%", "6.00e-03", "0.5000"]
    # Of two runs with the same options only the paths tell them apart.
    paths = [str(runs[0]), str(runs[1]), str(runs[1]) + ".jsonl"]
    assert [row.split() for row in rows] == [
        [path, *values] for path, values in zip(paths, (none, scaled, scaled), strict=True)
    ]
    assert last == f"Picture: {out}"
    assert matplotlib.image.imread(out).shape[1] == 1500


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ([{"method": "none"}, {}], ["AdamW", "Autoscale"]),
        ([{}, {"seed": 3}], ["seed 0", "seed 3"]),
        ([{"effect": True}, {"weight_decay": 0.5}], ["weight decay 5e-05", "weight decay 0.5"]),
        (
            [{}, {"method": "none", "optimizer": "sgd", "learning_rate": 0.1}],
            ["Autoscale, AdamW", "SGD"],
        ),
        ([{"learning_rate": 0.1}, {}], ["learning rate 0.1", "learning rate 0.001"]),
        ([{"model": "vit"}, {"dataset": "cifar10"}], ["digits, ViT", "CIFAR-10, ResNet-20"]),
        ([{"tag": "x"}, {}, {}], ["path0", "path1", "path2"]),
    ],
)
def test_labels_are_the_options_that_differ(changes, labels):
    experiments = [dataclasses.replace(Experiment(), **change) for change in changes]
    runs = [compare.Run(Path(f"path{i}"), it, []) for i, it in enumerate(experiments)]
    assert compare.labels(runs) == labels


def test_the_picture_has_every_run_in_every_panel_and_maps_on_one_scale(runs):
    read = [compare.read(path) for path in runs]
    figure = compare.draw(read)
    lines = {
        axes.get_title(): [list(line.get_ydata()) for line in axes.lines]
        for axes in figure.axes
        if axes.lines
    }
    assert lines["Test accuracy in %"] == [[10, 20, 30], [20, 40]]
    (losses,) = (values for title, values in lines.items() if title.startswith("Loss"))
    assert losses == [[1, 1 / 2, 1 / 3], [2, 1, 2 / 3], [2, 1], [4, 2]]
    assert lines["Scale factor $a_t$"] == [[None] * 3, [0.5, 0.5]]
    assert not any("plain optimizer" in title for title in lines)  # no effect was measured

    maps = [
        axes.collections[0] for axes in figure.axes if axes.get_title() in ("AdamW", "Autoscale")
    ]
    for mesh, run in zip(maps, read, strict=True):
        assert isinstance(mesh, QuadMesh)
        stds = [[each["layer_std"][layer] for each in run.records] for layer in LAYERS]
        np.testing.assert_array_equal(mesh.get_array(), stds)
        assert mesh.get_clim() == (1e-3, 4e-2)  # the extremes of both


def test_the_effect_and_other_layers(tmp_path):
    effect = {"update_norm_ratio": 0.75, "update_cosine": 0.5}
    other = {"layer_std": {"patches/kernel": 0.0}}  # a layer whose gradients are all 0
    runs = [
        write(tmp_path / "a", Experiment(effect=True), [record(1, 1.0, **effect)]),
        write(tmp_path / "b", Experiment(model="vit"), [record(1, 1.0, **other)]),
    ]
    figure = compare.draw([compare.read(path) for path in runs])
    figure.savefig(tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    for word in ("Cosine", "stem/kernel", "patches/kernel"):
        assert f"<!-- {word}" in text


def test_more_runs_than_colors(tmp_path):
    runs = [
        write(tmp_path / str(seed), Experiment(seed=seed), [record(1, 1.0)]) for seed in range(9)
    ]
    figure = compare.draw([compare.read(path) for path in runs])
    (accuracy,) = (axes for axes in figure.axes if axes.get_title() == "Test accuracy in %")
    assert len({line.get_color() for line in accuracy.lines}) == 9


def damage(folder: Path, kind: str) -> str:
    """Damages a run; the path that is given then."""
    if kind == "missing":
        return str(folder) + "x"
    if kind == "no run":
        (folder / "config.json").unlink()
    elif kind == "config":
        (folder / "config.json").write_text("{")
    elif kind == "no epoch":
        (folder / "metrics.jsonl").unlink()
    elif kind == "empty":
        (folder / "metrics.jsonl").write_text("")
    elif kind == "records":
        (folder / "metrics.jsonl").write_text("{}\n")
    else:
        path = folder / "file"
        path.write_text(kind)
        return str(path)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "PATH does not exist; give the folder of a run, such as runs/NAME"),
        ("no run", "PATH is not the folder of a run, since it has no config.json; give one"),
        ("config", "PATH/config.json is damaged: .*; put back a copy of it, or"),
        ("no epoch", "PATH has no finished epoch; wait for its first one, or leave it out"),
        ("empty", "PATH has no finished epoch; wait for its first one, or leave it out"),
        ("records", "PATH/metrics.jsonl is damaged: epoch 1: .*; put back a copy of the file, or"),
        ("", r"PATH is not the record file of a run \(.*\); give a run's folder, or a file"),
        ("text", r"PATH is not the record file of a run \(.*\); give a run's folder, or a file"),
        ("[]", r"PATH is not the record file of a run \(.*\); give a run's folder, or a file"),
        ("{}", r"PATH is not the record file of a run \(.*\); give a run's folder, or a file"),
        ("{\"schema\": 2}", r"PATH is not the record file of a run \(.*\); give a run's folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said_in_one_line(kind, message, runs, tmp_path):
    path = damage(runs[0], kind)
    with pytest.raises(SystemExit) as stopped:
        compare.main((runs[1], Path(path)), tmp_path / "picture.png")
    said = str(stopped.value)
    assert re.match("compare: " + message.replace("PATH", re.escape(path)), said)
    assert "\n" not in said
    assert not (tmp_path / "picture.png").exists()


def test_one_run_cannot_be_compared(runs, tmp_path):
    with pytest.raises(SystemExit, match="two runs or more can be compared; give their folders"):
        compare.main((runs[0],), tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/picture.png", "nowhere/picture.png cannot be written: No such file or directory"),
        ("picture.txt", "--out is .*picture.txt: "),
    ],
)
def test_a_picture_that_cannot_be_written(out, message, runs, tmp_path):
    with pytest.raises(SystemExit, match=message) as stopped:
        compare.main(tuple(runs), tmp_path / out)
    assert "\n" not in str(stopped.value)
