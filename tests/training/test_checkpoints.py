"""Checkpoints that are damaged, of another program, lost or not written; and the final model."""

import dataclasses
import errno
import gc
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import MODELS, resnet8
from training import checkpoints as checkpoints_module
from training.checkpoints import CheckpointError, Checkpoints, digest, load_model, save_model
from training.options import Experiment

MANIFEST = "state/manifest.ocdbt"
# TensorStore reports on what was given up to Orbax's event loop, which is closed by then.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _no_reports_in_other_files():
    yield
    gc.collect()


def state(step: int, **more: jax.Array) -> Any:
    return {"step": jnp.int32(step), "params": {"w": jnp.arange(6.0) * step} | more, "no": None}


@pytest.fixture
def said():
    return []


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"commit": "abc"}')
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def checkpoints(folder, said):
    """With one after step 1."""
    with Checkpoints(folder, said.append) as opened:
        save(opened, 1)
        yield opened


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, state(step))
    checkpoints.wait()


def restored(checkpoints: Checkpoints, like: Any = None) -> int:
    """The step of the checkpoint that is restored, complete."""
    found: Any = checkpoints.restore(state(0) if like is None else like)
    np.testing.assert_array_equal(found["params"]["w"], np.arange(6.0) * int(found["step"]))
    return int(found["step"])


def latest(folder: Path) -> int:
    with Checkpoints(folder, print) as opened:
        return restored(opened)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_latest_three_are_kept_and_the_last_is_restored(folder, checkpoints):
    for step in (2, 5, 7):
        save(checkpoints, step)
    assert {path.name for path in folder.iterdir()} == {"2", "5", "7"}
    assert latest(folder) == 7
    with Checkpoints(folder.parent / "others", print) as none:
        assert none.restore(state(0)) is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, partial(Path.write_bytes, data=b""), Path.unlink])
def test_whatever_is_damaged_the_state_is_restored_or_the_one_before_it(
    damage, folder, checkpoints, tmp_path
):
    save(checkpoints, 2)
    names, outcomes = contents(folder / "2"), []
    assert len(names) > 5
    for number, name in enumerate(names):
        run = tmp_path / str(number)
        shutil.copytree(folder.parent, run)
        damage(run / "checkpoints" / "2" / name)
        damaged, said = contents(run / "checkpoints" / "2"), []
        with Checkpoints(run / "checkpoints", said.append) as opened:
            outcomes.append(restored(opened))
            if outcomes[-1] == 2:
                assert contents(run / "checkpoints" / "2") == damaged
                assert said == []
            else:
                assert contents(run / "checkpoints" / "2.damaged1") == damaged
                assert "after step 2 is damaged (" in "".join(said)
                assert "NoneType" not in "".join(said)
                assert not (run / "checkpoints" / "2").exists()
                save(opened, 2)
        assert latest(run / "checkpoints") == 2
    assert {1, 2} == set(outcomes)


def test_damaged_ones_are_set_aside_under_names_of_their_own(folder, checkpoints):
    for number in (1, 2):
        save(checkpoints, 2)
        flip(folder / "2" / MANIFEST)
        save(checkpoints, 3)
        path = folder / "3" / "state" / "_METADATA"  # not taken for one of another program
        path.write_bytes(path.read_bytes().replace(b"params", b"parbms"))
        assert restored(checkpoints) == 1
        aside = {f"{step}.damaged{i + 1}" for step in (2, 3) for i in range(number)}
        assert {path.name for path in folder.iterdir()} == {"1", *aside}


def test_one_that_is_not_what_was_written_is_damaged_and_if_all_are_nothing_is_changed(
    folder, checkpoints, said, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "digest", lambda state: jnp.uint32(7))
        save(checkpoints, 2)
    flip(folder / "1" / MANIFEST)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"none .* not those that were written.* Put back"):
        checkpoints.restore(state(0))
    assert (contents(folder), said) == (before, [])


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        (state(0, b=jnp.ones(3)), r"params/b is not there and float32\[3\] here"),
        ({"step": jnp.int32(0), "no": None}, r"params/w is float32\[6\] there and not here"),
        (state(0, w=jnp.ones((2, 3))), r"params/w is float32\[6\] there and float32\[2, 3\] here"),
        (state(0, w=jnp.arange(6)), r"params/w is float32\[6\] there and int32\[6\] here"),
        (state(0, **dict.fromkeys("abcde", jnp.ones(1))), "params/c .* and 2 more"),
    ],
)
def test_those_of_another_program_are_named_and_left(like, difference, folder, checkpoints, said):
    save(checkpoints, 2)
    before = contents(folder)
    message = f"after step 2 .* another program .*{difference}.* not changed.*commit abc"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(like)
    assert (contents(folder), said) == (before, [])
    assert restored(checkpoints) == 2


OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")
TOO_MANY_OPEN = ValueError(f"Error reading local file: {os.strerror(errno.EMFILE)}")
FAILING_DISK = OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError(), TOO_MANY_OPEN, FAILING_DISK])
@pytest.mark.parametrize("at", ["load", "metadata", "the files"])
def test_an_error_that_proves_nothing_changes_nothing(
    error, at, folder, checkpoints, said, monkeypatch
):
    def fail(*_, **__):
        raise error

    save(checkpoints, 2)
    if at == "the files":  # whatever Orbax says of them: the machine cannot read them now
        flip(folder / "2" / MANIFEST)
        error = FAILING_DISK
    before = contents(folder)
    with monkeypatch.context() as patch:
        owner = (Path, "read_bytes") if at == "the files" else (checkpoints._checkpointer, at)
        patch.setattr(*owner, fail)
        with pytest.raises(CheckpointError, match=r"step 2 .* could not be read .* not changed"):
            checkpoints.restore(state(0))
    assert (contents(folder), said) == (before, [])
    assert restored(checkpoints) == (1 if at == "the files" else 2)


@pytest.mark.parametrize("how", ["removed", "moved", "emptied"])
def test_lost_ones_start_again(how, folder, checkpoints, said, tmp_path):
    if how == "moved":
        folder.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(folder)
    if how == "emptied":
        folder.mkdir()
    for step in (3, 4):
        save(checkpoints, step)
        assert said == [f"the checkpoints in {folder} are gone; new ones start at step 3"]
    assert latest(folder) == 4


def test_after_a_loss_during_a_write_the_next_one_is_complete(folder, checkpoints, said):
    checkpoints.save(2, state(2))
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    save(checkpoints, 3)
    # The one that was being written is lost with the rest, unless the folder was removed before it
    # had begun: then it is whole.
    assert said in ([], [f"the checkpoints in {folder} are gone; new ones start at step 3"])
    assert latest(folder) == 3


def test_a_run_that_is_moved_is_left_alone(checkpoints, tmp_path):
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=f"was moved to {tmp_path / 'moved'} while"):
        checkpoints.save(2, state(2))
    assert not (tmp_path / "run").exists()
    assert latest(tmp_path / "moved" / "checkpoints") == 1
    (tmp_path / "moved").rename(tmp_path / "run")  # for the fixture's end


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(13, "Permission denied"), "resume with --resume after step 1, the latest"),
        (OSError(28, "No space left on device"), "free some space and resume"),
        (ValueError("EXHAUSTED: No space left on device"), "free some space and resume"),
    ],
)
def test_a_write_that_fails(error, remedy, checkpoints, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._checkpointer, "save_async", fail)
    with pytest.raises(CheckpointError, match=rf"step 2 .*could not .*\); {remedy}"):
        checkpoints.save(2, state(2))
    monkeypatch.setattr(checkpoints_module.ocp, "save", fail)
    with pytest.raises(CheckpointError, match=rf"parameters could not .*; {remedy[:9]}"):
        save_model(tmp_path, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_a_checksum_is_of_every_bit_and_by_one_program_at_a_time(monkeypatch):
    """Many programs that wait for a training step could keep it from the threads that it needs."""
    leaves = [jnp.zeros(3), jnp.zeros(3, jnp.int32), jnp.zeros((), jnp.uint32)]
    for i, leaf in enumerate(leaves):
        last = leaf.at[-1:].set(-leaf[-1:]) if i == 0 else leaf.ravel().at[-1].add(1)  # one bit
        for one in (leaf.at[...].set(1), last.reshape(leaf.shape)):
            assert digest([*leaves[:i], one, *leaves[i + 1 :]]) != digest(leaves)
    add, finished = checkpoints_module._add_to_digest, []

    def record(total, leaf):
        finished.append(total.is_ready())
        return add(total, leaf)

    monkeypatch.setattr(checkpoints_module, "_add_to_digest", record)
    digest([jnp.ones(10**7)] * 4)
    assert finished == [True] * 4


def test_the_saved_model_predicts_from_bytes(tmp_path, monkeypatch):
    tiny = MODELS["resnet20"]._replace(make=partial(resnet8, widths=(4,)))
    monkeypatch.setitem(MODELS, "resnet20", tiny)
    network: Any = tiny.make(num_classes=5, channels=3, dtype="bfloat16", rngs=nnx.Rngs(7))
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    mean, std = (0.5, 0.25, 0.75), (0.25, 0.5, 0.125)
    scaled = ((images / 255 - mean) / std).astype(np.float32)
    call = nnx.jit(lambda network, images: network(images))
    network.train()
    call(network, scaled)  # moves BatchNorm's statistics away from their first values
    save_model(tmp_path, network)
    config = dataclasses.asdict(Experiment(precision="bfloat16"))
    description = {"config": config, "num_classes": 5, "channels": 3, "mean": mean, "std": std}
    (tmp_path / "config.json").write_text(json.dumps(description))
    network.eval()
    model = load_model(tmp_path)
    logits = np.asarray(call(model, images), np.float32)
    np.testing.assert_allclose(logits, call(network, scaled).astype(np.float32), atol=0.03)
    assert logits.shape == (9, 5)
    assert np.ptp(logits, axis=0).min() > 0.1
    assert call(model, jnp.asarray(images)).dtype == call(network, scaled).dtype
