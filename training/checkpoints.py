"""Checkpoints of a run: written in the background, complete or not there at all."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from training.steps import TrainState

KEPT = 3


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and what to do."""


class Checkpoints:
    """The latest checkpoints of a run, to be entered as a context.

    Args:
      folder: where they are; created where it is missing. What an interrupted write left there is
        removed.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        latest: Any = ocp.training.preservation_policies.LatestN(KEPT)
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.absolute()),
            preservation_policy=latest,
            cleanup_tmp_directories=True,
        )
        self._writing: tuple[int, Any] | None = None

    def save(self, step: int, state: TrainState) -> None:
        """Starts to write the state after `step`, once the checkpoint before it is complete."""
        self.wait()
        # A copy, since the next step overwrites its argument while this is being written.
        copy = jax.tree.map(jnp.copy, state)
        contents = {"state": copy, "digest": digest(copy)}
        try:
            response = self._checkpointer.save_async(step, contents, force=True, overwrite=True)
        except Exception as error:
            raise self._write_error(step, error) from error
        self._writing = (step, response)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete."""
        if self._writing is None:
            return
        (step, response), self._writing = self._writing, None
        try:
            response.result()
            self._checkpointer.wait()
        except Exception as error:
            raise self._write_error(step, error) from error

    def restore(self, like: TrainState, say: Callable[[str], None]) -> TrainState | None:
        """Reads the latest checkpoint that is undamaged, and removes the damaged ones after it.

        Args:
          like: a state of the same structure, whose shapes, dtypes and shardings the result has.
          say: is told about checkpoints that are damaged.

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
                return loaded["state"]
            except (
                Exception
            ) as error:  # of many libraries' types: files can be damaged in many ways
                say(
                    f"the checkpoint after step {step} is damaged and was removed "
                    f"({_summary(error)}); trying the one before it"
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
        except CheckpointError:
            if error is None:
                raise
        finally:
            with contextlib.suppress(Exception):  # what went wrong has been said
                self._checkpointer.close()

    def _write_error(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint after step {step} could not be written to {self._folder} "
            f"({_summary(error)}); the ones before it are intact. Make room and continue with "
            "--resume"
        )


def digest(state: Any) -> jax.Array:
    """A checksum of every bit of a tree of arrays, wherever they lie; shape=(), dtype=uint32."""
    # A single function of all leaves would take seconds to compile.
    return functools.reduce(_add_to_digest, jax.tree.leaves(state), jnp.uint32(0))


@jax.jit
def _add_to_digest(total: jax.Array, leaf: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    weights = 2 * jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape) + 1
    return jnp.uint32(31) * total + jnp.sum(words * weights, dtype=jnp.uint32)


def _summary(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
