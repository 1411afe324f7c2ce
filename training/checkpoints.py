"""Checkpoints of a run, written in the background and atomically, and its final model."""

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from models import MODELS
from training import UserError, is_full
from training.data import normalize
from training.devices import is_first_process
from training.run_folder import OpenFolder
from training.step import TrainState

KEPT = 3
VARIABLES = (nnx.Param, nnx.BatchStat)


class CheckpointError(UserError):
    """A checkpoint could not be written or read; the message says which, and what to do."""


class Damaged(Exception):
    """A checkpoint is not what was written."""


class Different(Damaged):
    """A checkpoint has other arrays than the program; the message names them."""


class Checkpoints:
    """The latest checkpoints of a run, in its folder, as a context manager.

    What an interrupted write left there is removed; `say` is told about damaged and lost ones.

    Every method that writes raises:
      CheckpointError: if a checkpoint could not be written.
      FileNotFoundError: if the run's folder was moved or removed.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._folder = folder
        self._say = say
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._run = OpenFolder(folder.parent)
        self._open()

    def _open(self) -> None:
        latest: Any = ocp.training.preservation_policies.LatestN(KEPT)
        path = str(self._folder.absolute())
        self._checkpointer = ocp.training.Checkpointer(
            path, preservation_policy=latest, cleanup_tmp_directories=True
        )
        self._writing: tuple[int, Any] | None = None
        self._complete: int | None = None  # the latest step whose checkpoint is

    def save(self, step: int, state: TrainState) -> None:
        """Starts to write the state after `step`, once the checkpoint before it is complete.

        If those before it were removed meanwhile, this one takes their place.
        """
        try:
            self.wait()
        except CheckpointError:
            if not self._are_lost():
                raise
        if self._are_lost():
            self._say(f"the checkpoints in {self._folder} are gone; new ones start at step {step}")
            self._close()  # it repeats the error of the one before
            self._open()
        contents = {"state": state, "digest": digest(state)}
        try:
            response = self._checkpointer.save_async(step, contents, force=True, overwrite=True)
        except Exception as error:
            raise self._write_error(step, error) from error
        self._writing = (step, response)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete."""
        writing, self._writing = self._writing, None
        if writing is not None:
            step, response = writing
            try:
                response.result()
                self._checkpointer.wait()
            except Exception as error:
                raise self._write_error(step, error) from error
            self._complete = step
        self._run.check()

    def restore(self, like: TrainState) -> TrainState | None:
        """Reads the latest checkpoint that is undamaged; None if there is no checkpoint yet.

        Its shapes, dtypes and shardings are those of `like`. Nothing is deleted. Damaged
        checkpoints after it are set aside, under another name, so that new ones can take their
        place.

        Raises:
          CheckpointError: if the latest one is of another program, or cannot be read now; or if all
            of them are damaged.
        """
        failures: list[tuple[int, Damaged]] = []
        for checkpoint in reversed(self._checkpointer.checkpoints):
            try:
                state = self._read(checkpoint.step, like)
            except Damaged as error:
                failures.append((checkpoint.step, error))
                continue
            # That this one can be read proves that those after it are damaged.
            self._set_aside(failures)
            self._complete = checkpoint.step
            return state
        for step, error in failures:
            if isinstance(error, Different):
                commit = _description(self._folder.parent).get("commit")
                sources = f"the sources of commit {commit}" if commit else "the former sources"
                raise CheckpointError(
                    f"the checkpoint after step {step} in {self._folder} is of another program or "
                    f"of other options: {error}. It was not changed. Resume it with {sources}, "
                    "with config.json as it was, or start a new run with another --out"
                )
        if failures:
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be read ({failures[0][1]}); they "
                "were not changed. Put back a copy of one, or start the run again with another "
                "--out"
            )
        return None

    def _read(self, step: int, like: TrainState) -> TrainState:
        try:
            self._check_structure(step, like)
            loaded = self._checkpointer.load(step, {"state": like, "digest": digest(like)})
            if int(loaded["digest"]) != int(digest(loaded["state"])):
                raise Damaged("its contents are not those that were written")
            return loaded["state"]
        except Damaged:
            raise
        except Exception as error:  # of many libraries' types, and often within another's
            if _files_are_to_blame(error, self._folder / str(step)):
                raise Damaged(reason(error)) from error
            raise CheckpointError(
                f"the checkpoint after step {step} in {self._folder} could not be read "
                f"({reason(error)}); it was not changed. Resume with --resume once this is solved"
            ) from error

    def _check_structure(self, step: int, like: TrainState) -> None:
        """Raises Different if a checkpoint is not one of this program and these options."""
        metadata: Any = self._checkpointer.metadata(step).metadata
        if metadata is None:  # Orbax could not read it: to load the rest will say why
            return
        there, here = (_shapes(tree) for tree in (metadata["state"], like))
        parts = [
            f"{leaf} is {there.get(leaf, 'not')} there and {here.get(leaf, 'not')} here"
            for leaf in sorted(there.keys() | here.keys())
            if there.get(leaf) != here.get(leaf)
        ]
        if parts:
            more = f", and {len(parts) - 3} more" if len(parts) > 3 else ""
            raise Different("; ".join(parts[:3]) + more)

    def _set_aside(self, failures: list[tuple[int, Damaged]]) -> None:
        for step, error in failures if is_first_process() else ():
            path, number = self._folder / str(step), 1
            while (aside := self._folder / f"{step}.damaged{number}").exists():
                number += 1
            path.rename(aside)
            self._say(
                f"the checkpoint after step {step} is damaged ({error}), and was renamed to "
                f"{aside}; the one before it is used"
            )
        if failures:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._checkpointer.reload()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            self.wait()
        except (CheckpointError, FileNotFoundError):
            if error is None:
                raise
        finally:
            self._close()
            self._run.close()

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # what went wrong has been said
            self._checkpointer.close()

    def _are_lost(self) -> bool:
        """Whether the latest complete checkpoint is gone."""
        return self._complete is not None and not (self._folder / str(self._complete)).exists()

    def _write_error(self, step: int, error: Exception) -> CheckpointError:
        """The error to raise instead; FileNotFoundError if the run's folder is gone."""
        self._run.check()
        what, remedy = f"the checkpoint after step {step} in {self._folder}", "resume with --resume"
        if self._are_lost():
            remedy = "those before it are gone, so the run cannot be resumed"
        elif self._complete is not None:
            remedy += f" after step {self._complete}, the latest that is complete"
        return not_written(what, error, remedy)


# What an error says that may not come again, and proves nothing about the files.
_PASSING_ERRORS = (errno.ENOMEM, errno.EIO, errno.EACCES, errno.EPERM)
_PASSING_ERRORS += (errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)
_PASSING = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "out of memory")
_PASSING += tuple(map(os.strerror, _PASSING_ERRORS))


def _files_are_to_blame(error: Exception, folder: Path) -> bool:
    """Whether a checkpoint could not be read although the machine can read its files."""
    if isinstance(error, MemoryError) or any(text in str(error) for text in _PASSING):
        return False
    try:
        for path in folder.rglob("*"):
            if path.is_file():
                path.read_bytes()
    except OSError:
        return False
    return True


def _shapes(tree: Any) -> dict[str, str]:
    """Shape and dtype of each leaf by its path, whatever the types of the nodes."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def digest(state: Any) -> jax.Array:
    """A checksum of every bit of a tree of arrays, on any devices; shape=(), dtype=uint32."""
    # A single function of all leaves would take seconds to compile. Each waits for the one before:
    # a CPU's devices take only 32 programs at a time, the thread that hands over the next one would
    # wait, and the training step on which all of them depend may need that thread.
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(state):
        total = jax.block_until_ready(_add_to_digest(total, leaf))
    return total


@jax.jit
def _add_to_digest(total: jax.Array, leaf: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    weights = 2 * jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape) + 1
    return jnp.uint32(31) * total + jnp.sum(words * weights, dtype=jnp.uint32)


def reason(error: Exception) -> str:
    """What went wrong, in one line: Orbax puts the cause behind its own message."""
    cause = str(error).rpartition("Error details: ")[2]
    return f"{type(error).__name__}: {cause.partition(chr(10))[0][:200]}"


def not_written(what: str, error: Exception, remedy: str) -> CheckpointError:
    space = "free some space and " if is_full(error) else ""
    return CheckpointError(f"{what} could not be written ({reason(error)}); {space}{remedy}")


def save_model(folder: Path, model: nnx.Module) -> None:
    """Saves a network's variables to `parameters/`; every process of a run takes part.

    Raises:
      CheckpointError: if they cannot be written.
    """
    path = folder / "parameters"
    try:
        ocp.save(str(path.absolute()), nnx.state(model, VARIABLES), overwrite=True)
    except Exception as error:
        raise not_written(str(path), error, "resume with --resume") from error


class Classifier(nnx.Module):
    """A trained network with its preprocessing."""

    def __init__(self, network: nnx.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        self.network = network
        self.mean, self.std = mean, std

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `(batch, num_classes)` of uint8 images `(batch, height, width, channels)`."""
        network: Any = self.network
        return network(normalize(jnp.asarray(images), self.mean, self.std))


def load_model(folder: str | os.PathLike[str]) -> Classifier:
    """The trained model of the finished run in a folder, in evaluation mode.

    It is the network that `config.json` describes, with the parameters that the run ended with.
    """
    description = _description(Path(folder))
    experiment = description["config"]
    network = MODELS[experiment["model"]].make(
        num_classes=description["num_classes"],
        channels=description["channels"],
        dtype=experiment["precision"],
        rngs=nnx.Rngs(experiment["seed"]),
    )
    path = Path(folder).absolute() / "parameters"
    nnx.update(network, ocp.load(str(path), nnx.state(network, VARIABLES)))
    network.eval()
    return Classifier(network, tuple(description["mean"]), tuple(description["std"]))


def _description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
