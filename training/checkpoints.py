"""Checkpoints of a run: written in the background, atomically."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from training.open_folder import OpenFolder
from training.program import TrainState

KEPT = 3


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and what to do."""


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
        """Reads the latest checkpoint that is undamaged, and removes the damaged ones after it.

        Args:
          like: a state of the same structure, whose shapes, dtypes and shardings the result has.

        Returns:
          The state, or None if there is no checkpoint yet.

        Raises:
          CheckpointError: if there are checkpoints, and all of them are damaged.
        """
        steps = [checkpoint.step for checkpoint in reversed(self._checkpointer.checkpoints)]
        for step in steps:
            try:
                loaded = self._checkpointer.load(step, {"state": like, "digest": digest(like)})
                if int(loaded["digest"]) != int(digest(loaded["state"])):
                    raise ValueError("its contents are not those that were written")
                self._complete = step
                return loaded["state"]
            except (
                Exception
            ) as error:  # of many libraries' types: files can be damaged in many ways
                self._say(
                    f"the checkpoint after step {step} is damaged and was removed "
                    f"({first_line(error)}); trying the one before it"
                )
                self._checkpointer.delete(step)
        if steps:
            raise CheckpointError(f"none of the checkpoints in {self._folder} can be read")
        return None

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
            f"({first_line(error)}); {remedy}"
        )


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


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message, shortened."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
