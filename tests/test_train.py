"""What a run of `train.py` writes, prints and refuses."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from tests import pages
from tests.programs import ARGS, ROOT, contents, epochs, finish, main, refused, shrunk, start
from training import data
from training.optimizers import METHODS
from training.options import Experiment
from training.record import Record, read_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """A short run from the command line, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "short"
    args = ["--train-size", "300", "--validation-size", "100", "--epochs", "2", "--seed", "3"]
    args += ["--effect", "--out", out]
    stdout, stderr = finish(start(*args, number=0))
    assert stderr == ""
    return out, stdout


def test_records(run):
    records = read_records(run[0])
    assert [list(record) for record in records] == [list(Record.__annotations__)] * 2
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 4), (2, 8)]
    for record in records:
        layers = list(record["layer_std"])
        assert (layers[0], layers[-1], len(layers)) == ("stem/conv/kernel", "classifier/kernel", 4)
        assert np.isfinite(list(record["layer_std"].values())).all()
        assert record["exponent"] in (1, 2)
        assert 0 < (record["scale_factor"] or 0) <= (record["scale_factor_max"] or 0)
        assert record["learning_rate"] == pytest.approx(1e-3)
        assert record["images_per_second"] * record["seconds"] > 4 * 64
    assert len(records[0]["update_norm_ratio_by_step"]) == 4
    assert records[1]["train_loss"] < records[0]["train_loss"]


def test_the_saved_model_predicts_as_recorded(run, tmp_path, monkeypatch):
    """With the code of the guide, which knows the name of a run with default options."""
    folder = tmp_path / "runs" / Experiment().name
    folder.parent.mkdir()
    folder.symlink_to(run[0])
    monkeypatch.chdir(tmp_path)
    digits = data.load("digits", train_size=300, validation_size=100, seed=3)
    assert digits.validation
    last = read_records(run[0])[-1]
    with shrunk():
        names = pages.run(pages.DOCS / "training.md")
        logits = {"test": names["logits"], "validation": names["model"](digits.validation[0])}
    for name, labels in (("test", digits.test_labels), ("validation", digits.validation[1])):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[name], labels)
        assert losses.mean() == pytest.approx(last[f"{name}_loss"], rel=1e-4)
        accuracy = np.mean(np.argmax(logits[name], axis=1) == labels)
        assert accuracy == pytest.approx(last[f"{name}_accuracy"])


def test_pictures_can_be_opened(run):
    for name in ("curves.png", "gradients.png", "layers.png"):
        with Image.open(run[0] / name) as image:
            assert min(image.size) > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_what_is_printed(run):
    folder, printed = run
    first, _, *rows, result, pictures = printed.splitlines()
    assert re.fullmatch(rf"{re.escape(str(folder))}: (2 x )?cpu, compiling \.\.\.", first)
    records = read_records(folder)
    for row, record in zip(rows, records, strict=True):
        assert f"{record['test_accuracy']:.2%}" in row
        for name in ("train", "validation", "test"):
            assert f"{record[f'{name}_loss']:.4f}" in row
    accuracy = records[-1]["test_accuracy"]
    assert re.fullmatch(rf"Test accuracy {accuracy:.2%} after 2 epochs in \d:\d\d:\d\d", result)
    assert pictures == f"Pictures: {folder}/{{curves,gradients,layers}}.png"


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
    def update(updates, state, params=None):  # NaN at that step
        return optax.tree.scale(jnp.where(state == step - 1, jnp.nan, 1), updates), state + 1

    faulty = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    monkeypatch.setitem(METHODS, "clip", METHODS["clip"]._replace(make=lambda: faulty))
    args = ["--method", "clip", "--epochs", "2", "--train-size", "128", "--out", tmp_path]
    assert refused(*args).startswith(message)
    assert epochs(tmp_path) == 1
    for name in ("config.json", "curves.png", "gradients.png"):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch-size", "2000"], "--batch-size is 2000; it must be at most 1437"),
        (["--process-id", "1"], "--coordinator, --num-processes and --process-id go together"),
        (["--train-size", "3"], "--train-size 3 is invalid"),
        (["--validation-size", "1430"], "--validation-size 1430 is invalid: digits allows at most"),
        (["--learning-rate", "nan"], "--learning-rate is nan; it should"),
        (["--epochs", "2147483647"], "--epochs is 2147483647; it must be at most 97612893"),
        (["--out", "caf\udce9"], "--out is 'caf"),
        (["--out", "file/run"], "file/run cannot be written: Not a directory"),
        (["--out", "new", "--resume"], "there is no run in new to resume"),
        (["--wandb"], "--wandb needs a package that is missing: pip install wandb"),
    ],
)
def test_nothing_is_written_by_a_run_that_cannot_be(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    Path("file").write_text("precious")
    before = sorted(os.listdir()), contents(tmp_path)
    assert refused(*args).startswith(message)
    assert (sorted(os.listdir()), contents(tmp_path)) == before


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="--learning-rate is nan"):
        main("--learning-rate", "nan", "--debug")


def test_wandb_has_the_records(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    main(*ARGS, "--wandb", "--epochs", "1", "--out", tmp_path)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"autoscale/scale_factor" in file.read_bytes()


def test_make_train_resumes():
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "--no-print-directory", "--dry-run", "train", "ARGS=--seed 3"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1].endswith("python train.py --auto-resume --seed 3")
