"""Checkpoints whose folder is lost, moved or cannot be written while a run is in progress."""

import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from training import checkpoints as checkpoints_module
from training.checkpoints import CheckpointError, Checkpoints, digest


def state(step: int) -> Any:
    return {"step": jnp.int32(step), "params": jnp.arange(6.0) * step}


# TensorStore reports on writes that were given up to Orbax's event loop, which is closed by then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    with Checkpoints(tmp_path / "run" / "checkpoints", said.append) as opened:
        opened.save(1, state(1))
        opened.wait()
        yield opened


def latest(folder) -> int:
    with Checkpoints(folder, print) as opened:
        restored: Any = opened.restore(state(0))
    np.testing.assert_array_equal(restored["params"], np.arange(6.0) * int(restored["step"]))
    return int(restored["step"])


@pytest.mark.parametrize("how", ["removed", "moved", "emptied"])
def test_lost_ones_start_again(how, checkpoints, said, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    if how == "moved":
        folder.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(folder)
    if how == "emptied":
        folder.mkdir()
    checkpoints.save(3, state(3))
    checkpoints.wait()
    assert said == [f"the checkpoints in {folder} are gone; new ones start at step 3"]
    checkpoints.save(4, state(4))
    checkpoints.wait()
    assert len(said) == 1
    assert latest(folder) == 4


def test_after_a_loss_during_a_write_the_next_one_is_complete(checkpoints, said, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    checkpoints.save(2, state(2))
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    checkpoints.save(3, state(3))
    checkpoints.wait()
    # The one that was being written is lost with the rest, unless the folder was removed before it
    # had begun: then it is whole.
    if said:
        assert said == [f"the checkpoints in {folder} are gone; new ones start at step 3"]
    assert latest(folder) == 3


def test_a_damaged_one_is_removed_and_the_one_before_it_is_read(checkpoints, said, tmp_path):
    checkpoints.save(2, state(2))
    checkpoints.wait()
    folder = tmp_path / "run" / "checkpoints"
    for path in (folder / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    restored: Any = checkpoints.restore(state(0))
    np.testing.assert_array_equal(restored["params"], np.arange(6.0))
    (message,) = said
    assert message.startswith("the checkpoint after step 2 is damaged and was removed (")
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["1"]


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
        (OSError(28, "No space left on device"), "free some space and resume with --resume"),
        (
            ValueError("EXHAUSTED: No space left on device"),
            "free some space and resume with --resume",
        ),
    ],
)
def test_a_write_that_fails(error, remedy, checkpoints, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._checkpointer, "save_async", fail)
    with pytest.raises(CheckpointError, match=rf"step 2 could not .*\); {remedy}"):
        checkpoints.save(2, state(2))


def test_a_checksum_is_computed_by_one_program_at_a_time(monkeypatch):
    """Many programs that wait for a training step could keep it from the threads that it needs."""
    add, finished = checkpoints_module._add_to_digest, []

    def record(total, leaf):
        finished.append(total.is_ready())
        return add(total, leaf)

    monkeypatch.setattr(checkpoints_module, "_add_to_digest", record)
    digest([jnp.ones(10**7)] * 4)
    assert finished == [True] * 4
