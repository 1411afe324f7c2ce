"""The folder of a run: its configuration and its records."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import numpy as np

from models import MODELS
from training import config, plots
from training.checkpoints import CheckpointError, is_full
from training.config import Experiment, Launch, run_folder
from training.data import DATASETS, Dataset
from training.lock import LOCK, InUse, lock
from training.open_folder import OpenFolder
from training.optimizers import METHODS, OPTIMIZERS
from training.provenance import environment
from training.record import SCHEMA, Record, RecordError, parse_records, read_records
from training.trackers import TensorBoard, WeightsAndBiases

PICTURES = ("curves.png", "gradients.png", "layers.png")


class RunFolder:
    """The files of one run, as a context manager that draws the pictures at exit.

    No other process can enter it meanwhile. In a run of several processes, only the first one has
    any files.

    Args:
      experiment: what is trained.
      launch: how; the folder is created, or with `launch.resume` goes on.
      dataset: what it trains on.

    Raises:
      ValueError: if `launch.wandb` is set and the package is not installed.
    """

    def __init__(self, experiment: Experiment, launch: Launch, dataset: Dataset):
        self._experiment = experiment
        self._launch = launch
        self._description = {
            "schema": SCHEMA,
            "command": shlex.join(["python", *sys.argv]),
            "num_classes": dataset.num_classes,
            "channels": dataset.train_images.shape[-1],
            **environment(),
        }
        self.path = run_folder(experiment, launch)
        self.records: list[Record] = []
        self._trackers: list[TensorBoard | WeightsAndBiases] = []
        if launch.wandb and not find_spec("wandb"):
            raise ValueError(
                "--wandb needs a package that is missing: pip install wandb, or leave --wandb out"
            )

    def __enter__(self) -> Self:
        """Takes the folder.

        Raises:
          OSError: if another process holds the folder, if it cannot be written, or if it holds
            something and `launch.resume` is not set; nothing in it is touched then.
        """
        new = not self._launch.resume
        if new and not (self.path / LOCK).exists():  # the lock would touch what is there
            try:
                self._check_vacant()
            except FileExistsError:
                if not (self.path / LOCK).exists():  # else another run took the folder just now
                    raise
        with contextlib.ExitStack() as stack:
            with _explained(self.path):
                stack.enter_context(lock(self.path))
                self._opened = OpenFolder(self.path)
            stack.callback(self._opened.close)
            if new:  # looked at under the lock: of two runs that start at once, one wins
                self._check_vacant()
                with _explained(self.path):
                    self._save_config()
            self._held = stack.pop_all()
        return self

    def begin(self, epochs: int, say: Callable[[str], None]) -> None:
        """Opens the records, and keeps the first `epochs` of those that are there.

        Args:
          epochs: those before the checkpoint that the run resumes from.
          say: is told about records of later epochs, which are made again.

        Raises:
          RecordError: if the records of these epochs are not all there.
          CheckpointError: if there are records, and no checkpoint that they could continue from.
        """
        path = self.path / "metrics.jsonl"
        with _explained(path):
            lines = path.read_bytes().splitlines() if path.exists() else []
        # The record of the first epoch may be written before the first checkpoint is.
        if len(lines) > 1 and not any((self.path / "checkpoints").glob("[0-9]*")):
            raise CheckpointError(
                f"{path} holds {len(lines)} epochs, and there is no checkpoint to resume from; "
                f"remove {self.path} to start again"
            )
        try:
            records = parse_records(lines[:epochs], path)
            if len(lines) < epochs:
                raise RecordError(f"{path} holds {len(lines)} epochs")
        except RecordError as error:
            raise RecordError(
                f"{error}; the checkpoint is after epoch {epochs}, and needs the records of all "
                f"epochs until then. Put back a copy of the file, or remove {self.path} to start "
                "again"
            ) from error
        self.records = records
        if len(lines) > epochs:
            say(
                f"training resumes with epoch {epochs + 1}: the records from there to epoch "
                f"{len(lines)} in {path} are replaced"
            )
        with _explained(self.path):
            if lines:
                part = path.with_suffix(".part")
                part.write_bytes(b"".join(line + b"\n" for line in lines[:epochs]))
                part.replace(path)
            self._save_config()
            self._trackers.append(TensorBoard(self.path / "tensorboard", epochs))
        if self._launch.wandb:
            self._trackers.append(WeightsAndBiases(self.path, self._experiment))

    def write(self, record: Record, layers: dict[str, np.ndarray]) -> None:
        """Adds an epoch to all records, and histograms of `layers` to TensorBoard's."""
        self._opened.check()
        path = self.path / "metrics.jsonl"
        line = json.dumps({name: record[name] for name in Record.__annotations__}) + "\n"
        with _explained(path), open(path, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        with _explained(self.path):
            for tracker in self._trackers:
                tracker.write(record, layers)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # After another error, do not report pictures that cannot be written.
        with self._held, contextlib.suppress(OSError) if error else _explained(self.path):
            for tracker in self._trackers:
                tracker.close(failed=error is not None)
            if self.records and self._opened.is_there():
                curves, gradients, layers = (self.path / name for name in PICTURES)
                plots.plot_curves(self.records, self._experiment, self._title, curves)
                plots.plot_gradients(self.records, self._title, gradients)
                plots.plot_layer_map(self.records, self._title, layers)

    def _check_vacant(self) -> None:
        path = self.path
        for each in (path, *path.parents):
            if each.is_symlink() and not each.exists():
                raise FileNotFoundError(
                    f"{each} is a link to {os.readlink(each)}, which does not exist; create that, "
                    "remove the link, or give another folder with --out"
                )
        if path.exists() and not (
            # Left by a process that was killed before it started.
            path.is_dir() and {each.name for each in path.iterdir()} <= {LOCK, "config.part"}
        ):
            raise FileExistsError(
                f"{path} already exists and was not changed; "
                "resume it with --resume, give another folder with --out, or remove it"
            )

    @property
    def _title(self) -> str:
        it = self._experiment
        optimizer, method = OPTIMIZERS[it.optimizer].label, METHODS[it.method].label
        chain = optimizer if it.method == "none" else f"{method} before {optimizer}"
        return f"{chain}: {MODELS[it.model].label} on {DATASETS[it.dataset].label}, seed {it.seed}"

    def _save_config(self) -> None:
        config.save(self.path, self._experiment, self._launch, **self._description)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Adds to an OSError where it happened, and a remedy."""
    try:
        yield
    except InUse:
        raise
    except OSError as error:
        remedy = (
            "free some space and resume with --resume"
            if is_full(error)
            else "choose another folder with --out"
        )
        raise type(error)(f"{path} cannot be written: {error.strerror}; {remedy}") from error


def finished_records(folder: Path, epochs: int) -> list[Record]:
    """The records of a run of `epochs` epochs that has finished; none where it has not.

    It has where all that a run ends with, parameters and pictures, is newer than the last record.
    """
    metrics = folder / "metrics.jsonl"
    try:
        last = metrics.stat().st_mtime_ns
        if any((folder / name).stat().st_mtime_ns < last for name in ("parameters", *PICTURES)):
            return []
        records = read_records(folder)
    except (OSError, RecordError):
        return []
    return records if len(records) == epochs else []
