"""Checkpoints of a run, written in the background and atomically, and its final model."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from models import MODELS
from training import UserError
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


class Checkpoints:
    """The latest checkpoints of a run, as a context manager.

    Args:
      folder: where they are, in the run's folder; created where it is missing. What an interrupted
        write left there is removed.
      say: is told about checkpoints that are damaged or lost.

    Every method that writes raises:
      CheckpointError: if a checkpoint could not be written.
      FileNotFoundError: if the run's folder was moved or removed.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._folder = folder
        self._say = say
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._run = OpenFolder(folder.parent)
        self._checkpointer = self._open()
        self._writing: tuple[int, Any] | None = None
        self._complete: int | None = None  # the latest step whose checkpoint is

    def _open(self) -> ocp.training.Checkpointer:
        latest: Any = ocp.training.preservation_policies.LatestN(KEPT)
        return ocp.training.Checkpointer(
            str(self._folder.absolute()),
            preservation_policy=latest,
            cleanup_tmp_directories=True,
        )

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
            self._checkpointer, self._complete = self._open(), None
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
        """Reads the latest checkpoint that is undamaged.

        Nothing is deleted. Damaged checkpoints after it are set aside, under another name, so that
        new ones can take their place.

        Args:
          like: a state of the same structure, whose shapes, dtypes and shardings the result has.

        Returns:
          The state, or None if there is no checkpoint yet.

        Raises:
          CheckpointError: if the latest one is of another program, or cannot be read now; or if all
            of them are damaged.
        """
        damaged = []
        for checkpoint in reversed(self._checkpointer.checkpoints):
            step = checkpoint.step
            try:
                state = self._read(step, like)
            except Damaged as error:
                self._say(
                    f"the checkpoint after step {step} is damaged ({error}); trying the one before "
                    "it"
                )
                damaged.append(step)
                continue
            if damaged:
                self._set_aside(damaged)
            self._complete = step
            return state
        if damaged:
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be read; they were not changed. "
                "Put back a copy of one, or start the run again with another --out"
            )
        return None

    def _read(self, step: int, like: TrainState) -> TrainState:
        try:
            self._check_structure(step, like)
            loaded = self._checkpointer.load(step, {"state": like, "digest": digest(like)})
            if int(loaded["digest"]) != int(digest(loaded["state"])):
                raise Damaged("its contents are not those that were written")
            return loaded["state"]
        except (Damaged, CheckpointError):
            raise
        except Exception as error:  # of many libraries' types, and often within another's
            if found := re.search("|".join(_DAMAGE), str(error)):
                raise Damaged(found[0]) from error
            raise CheckpointError(
                f"the checkpoint after step {step} in {self._folder} could not be read "
                f"({reason(error)}); it was not changed. Resume with --resume once this is solved"
            ) from error

    def _check_structure(self, step: int, like: TrainState) -> None:
        """Raises CheckpointError if a checkpoint is not one of this program and these options."""
        metadata: Any = self._checkpointer.metadata(step).metadata
        there, here = (_shapes(tree) for tree in (metadata["state"], like))
        if there == here:
            return
        parts = []
        for leaf in sorted(there.keys() | here.keys()):
            if there.get(leaf) != here.get(leaf):
                parts.append(
                    f"{leaf} is {there.get(leaf, 'not')} there and {here.get(leaf, 'not')} here"
                )
        more = f", and {len(parts) - 3} more" if len(parts) > 3 else ""
        commit = _description(self._folder.parent).get("commit")
        raise CheckpointError(
            f"the checkpoint after step {step} in {self._folder} is of another program or of other "
            f"options: {'; '.join(parts[:3])}{more}. It was not changed. Resume it "
            + (f"with the sources of commit {commit}, " if commit else "with the former sources, ")
            + "with config.json as it was, or start a new run with another --out"
        )

    def _set_aside(self, steps: list[int]) -> None:
        if is_first_process():
            for step in steps:
                path, number = self._folder / str(step), 1
                while (aside := self._folder / f"{step}.damaged{number}").exists():
                    number += 1
                path.rename(aside)
                self._say(f"{path} was renamed to {aside.name}")
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
        if self._are_lost():
            remedy = "those before it are gone, so the run cannot be resumed"
        else:
            remedy = "resume with --resume"
            if self._complete is not None:
                remedy += f" after step {self._complete}, the latest that is complete"
            if is_full(error):
                remedy = f"free some space and {remedy}"
        return CheckpointError(
            f"the checkpoint after step {step} could not be written to {self._folder} "
            f"({reason(error)}); {remedy}"
        )


# What TensorStore, Orbax and Python's JSON say of files that are missing or not what was written.
# An error without any of them, such as no memory or a failing disk, proves nothing.
_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", r"Expecting [^:]*", "Unterminated string")


def _shapes(tree: Any) -> dict[str, str]:
    """Shape and dtype of each leaf by its path, whatever the types of the nodes."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def is_full(error: Exception) -> bool:
    """Whether an error means a full disk; some libraries say so only in the message."""
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


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
    text = str(error).partition("Error details: ")
    lines = (text[2] or text[0]).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def save_model(folder: Path, model: nnx.Module) -> None:
    """Saves a network's variables to `parameters/`; every process of a run takes part.

    Raises:
      CheckpointError: if they cannot be written.
    """
    path = folder / "parameters"
    try:
        ocp.save(str(path.absolute()), nnx.state(model, VARIABLES), overwrite=True)
    except Exception as error:
        remedy = "free some space and resume" if is_full(error) else "resume"
        raise CheckpointError(
            f"{path} could not be written ({reason(error)}); {remedy} with --resume"
        ) from error


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
    """The trained model of a finished run, in evaluation mode.

    Args:
      folder: the run's folder.

    Returns:
      The network that `config.json` describes, with the parameters that the run ended with, as a
      function from images of bytes to logits.
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
