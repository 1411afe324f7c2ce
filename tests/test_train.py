"""Whole runs of `train.py`, and their output."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from training.augmentation import normalize
from training.lock import LOCK
from training.saved_model import load_model

import train
from models import MODELS, resnet8
from training import data, devices
from training.optimizers import METHODS, OPTIMIZERS
from training.record import read_records
from training.run_folder import finished_records

pytestmark = pytest.mark.slow

ROOT = Path(train.__file__).parent
TINY = MODELS["resnet20"]._replace(make=partial(resnet8, widths=(4, 8)))
FIELDS = [
    "epoch", "step", "train_loss", "test_loss", "test_accuracy", "learning_rate", "global_std",
    "scale_factor", "exponent", "layer_std", "update_norm_ratio", "update_cosine",
    "update_norm_ratio_by_step", "images_per_second", "seconds",
]  # fmt: skip


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "train.py", *args],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """A short real run from the command line, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "short"
    args = ["--train-size", "300", "--epochs", "2", "--seed", "3", "--effect", "--out", str(out)]
    done = command(*args)
    assert (done.returncode, done.stderr) == (0, "")
    return out, done.stdout


def test_metrics(run):
    folder, _ = run
    records = read_records(folder)
    assert [list(record) for record in records] == [FIELDS] * 2
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 4), (2, 8)]
    for record in records:
        assert np.isfinite(list(record["layer_std"].values())).all()
        layers = list(record["layer_std"])
        assert len(layers) == 20
        assert (layers[0], layers[-1]) == ("stem/conv/kernel", "classifier/kernel")
        assert record["exponent"] in (1, 2)
        assert record["learning_rate"] == pytest.approx(1e-3)
        assert record["images_per_second"] * record["seconds"] > 4 * 64
    assert records[1]["train_loss"] < records[0]["train_loss"]


def test_config_repeats_the_run(run):
    folder, _ = run
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["train_size"] == 300
    assert f"--out {folder}" in saved["command"]
    assert saved["versions"]["jax"] == jax.__version__
    assert {"python", "jaxlib", "flax", "optax", "optax-autoscale"} <= set(saved["versions"])
    assert saved["device"] == "cpu"
    assert "commit" in saved


def test_the_saved_model_has_the_recorded_accuracy(run):
    folder, _ = run
    digits = data.load("digits")
    logits = load_model(folder)(normalize(jnp.asarray(digits.test_images), digits.mean, digits.std))
    accuracy = np.mean(np.argmax(logits, axis=1) == digits.test_labels)
    assert accuracy == pytest.approx(read_records(folder)[-1]["test_accuracy"])


def test_pictures_can_be_opened(run):
    folder, _ = run
    for name in ("curves.png", "gradients.png", "layers.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_tensorboard_has_the_records(run):
    folder, _ = run
    scalars = {
        (value.tag, event.step): value.simple_value
        for event in read_events(folder)
        for value in event.summary.value
    }
    for record in read_records(folder):
        epoch = record["epoch"]
        assert scalars["test/accuracy", epoch] == pytest.approx(record["test_accuracy"])
        assert scalars["autoscale/scale_factor", epoch] == pytest.approx(record["scale_factor"])
        for name in ("update_norm_ratio", "update_cosine"):
            assert scalars[f"effect/{name}", epoch] == pytest.approx(record[name])
        for layer, std in record["layer_std"].items():
            assert scalars[f"layer_std/{layer}", epoch] == pytest.approx(std)


def test_tensorboard_has_histograms_of_the_layers(run):
    folder, _ = run
    histograms = {
        (value.tag, event.step): value.histo
        for event in read_events(folder)
        for value in event.summary.value
        if value.HasField("histo")
    }
    layers = read_records(folder)[-1]["layer_std"]
    assert set(histograms) == {
        (f"{kind}/{layer}", epoch)
        for kind in ("parameters", "gradients")
        for layer in layers
        for epoch in (1, 2)
    }
    kernel = np.asarray(load_model(folder).stem.conv.kernel[...])
    shown = histograms["parameters/stem/conv/kernel", 2]
    counts, edges = np.histogram(kernel, bins=30)
    np.testing.assert_array_equal(shown.bucket, counts)
    np.testing.assert_allclose(shown.bucket_limit, edges[1:], rtol=1e-6)
    assert (shown.min, shown.max) == pytest.approx((kernel.min(), kernel.max()))
    # Another step's gradients than the epoch's mean, but of the same size.
    for layer, std in layers.items():
        shown = histograms[f"gradients/{layer}", 2]
        assert sum(shown.bucket) == shown.num
        assert 0.2 * std < np.sqrt(shown.sum_squares / shown.num) < 5 * std


def read_events(folder: Path) -> list[Event]:
    """The events of a TensorBoard file: length, its checksum, the message, its checksum."""
    (file,) = (folder / "tensorboard").iterdir()
    content, events = file.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def test_what_is_printed(run):
    folder, printed = run
    lines = printed.splitlines()
    assert re.fullmatch(rf"{re.escape(str(folder))}: (2 x )?cpu, compiling \.\.\.", lines[0])
    for line, record in zip(lines[2:4], read_records(folder), strict=True):
        assert f"{record['test_accuracy']:.2%}" in line
        assert f"{record['train_loss']:.4f}" in line
    accuracy = read_records(folder)[-1]["test_accuracy"]
    assert re.fullmatch(rf"Test accuracy {accuracy:.2%} after 2 epochs in \d:\d\d:\d\d", lines[4])
    assert lines[5:] == [f"Pictures: {folder}/{{curves,gradients,layers}}.png"]


def test_a_finished_run_is_left_as_it_is(run, monkeypatch, capsys):
    folder, printed = run
    monkeypatch.setattr(data, "load", None)  # called by all that trains
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(folder)])
    train.main()
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"{folder} has finished already; with more --epochs it is trained further"
    assert others == printed.splitlines()[-2:]


@pytest.mark.parametrize("missing", ["parameters", "layers.png"])
def test_a_run_has_finished_once_all_is_newer_than_its_records(run, missing, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    assert finished_records(folder, 2) == read_records(folder)
    assert finished_records(folder, 3) == []
    last = (folder / "metrics.jsonl").stat().st_mtime
    os.utime(folder / missing, (last - 1, last - 1))
    assert finished_records(folder, 2) == []
    (folder / missing).rename(tmp_path / "away")
    assert finished_records(folder, 2) == []


def test_a_second_run_into_the_same_folder_touches_nothing(run):
    folder, _ = run

    def modified() -> dict[Path, int]:  # all but the lock, which every process that asks has held
        files = folder.rglob("*")
        return {path: path.stat().st_mtime_ns for path in files if path.name != LOCK}

    before = modified()
    done = command("--out", str(folder))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"train.py: {folder} already exists and was not changed; "
        "resume it with --resume, give another folder with --out, or remove it\n"
    )
    assert modified() == before


def nan_at(step: int) -> optax.GradientTransformation:
    """A faulty method: NaN at one step."""

    def update(updates, state, params=None):
        factor = jnp.where(state == step - 1, jnp.nan, 1.0)
        return optax.tree.scale(factor, updates), state + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (3, "step 4: the training loss is nan and the gradients' standard deviation is nan"),
        (4, "after step 4: the test loss is nan"),
    ],
)
def test_a_run_that_meets_nan_says_where_and_keeps_what_it_has(
    step, message, tmp_path, monkeypatch
):
    one_device = jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )
    monkeypatch.setattr(devices, "make_mesh", lambda: one_device)
    monkeypatch.setitem(METHODS, "clip", METHODS["clip"]._replace(make=lambda: nan_at(step)))
    monkeypatch.setitem(MODELS, "resnet20", TINY)
    out = tmp_path / "nan"
    args = ["--method", "clip", "--epochs", "2", "--train-size", "128", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit, match=f"^train.py: {message}"):
        train.main()
    assert [record["epoch"] for record in read_records(out)] == [1]
    for name in ("config.json", "curves.png", "gradients.png"):
        assert (out / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch-size", "2000"], "--batch-size is 2000, more than the 1437 training images"),
        (["--model", "resnet21"], "--model is 'resnet21'; did you mean 'resnet20'"),
        (["--method=zscoer"], "--method is 'zscoer'; did you mean 'zscore'"),
        (["--process-id", "1"], "--coordinator, --num-processes and --process-id go together"),
        (["--train-size", "3"], "--train-size 3 is invalid"),
        (["--learning-rate", "nan"], "--learning-rate is nan; it must be finite and positive"),
    ],
)
def test_bad_input_is_one_line(args, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=re.escape(f"train.py: {message}")) as error:
        train.main()
    assert "\n" not in str(error.value.code)
    assert not (tmp_path / "run").exists()


def test_list(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--list", "--dataset", "cifar100"])
    train.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("--dataset", *data.DATASETS),
        *("--model", *MODELS),
        *("--method", *METHODS),
        *("--optimizer", *OPTIMIZERS),
    ]
    assert any("ResNet-20: residual network" in line and "275,572" in line for line in lines)
    assert all(len(line.split()) > 3 for line in lines if not line.startswith("--"))


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--wandb", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=r"^train.py: --wandb needs .*: pip install wandb"):
        train.main()
    assert not (tmp_path / "run").exists()


def test_wandb_has_the_records(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(MODELS, "resnet20", TINY)
    args = ["--wandb", "--epochs", "1", "--train-size", "64", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    train.main()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"autoscale/scale_factor" in file.read_bytes()


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    args = ["--learning-rate", "nan", "--debug", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(ValueError, match="--learning-rate is nan"):
        train.main()


def test_a_folder_that_is_a_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("precious")
    for out, message in [(path, "already exists"), (path / "run", "cannot be written: Not a dir")]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out)])
        with pytest.raises(SystemExit, match=message):
            train.main()
    assert path.read_text() == "precious"
