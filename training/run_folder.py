"""The folder of a run: what it was, what it measured, and the parameters it ended with."""

import contextlib
import dataclasses
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

from models import MODELS
from training import config, plots
from training.checkpoints import CheckpointError, first_line, is_full
from training.config import Experiment, Launch, run_folder
from training.data import DATASETS, Dataset
from training.lock import LOCK, InUse, lock
from training.open_folder import OpenFolder
from training.optimizers import METHODS, OPTIMIZERS
from training.provenance import environment
from training.record import SCHEMA, Record, RecordError, parse_records, read_records

PICTURES = ("curves.png", "gradients.png", "layers.png")


class RunFolder:
    """The files of one run, to be entered as a context; leaving it draws the pictures.

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
        self._tensorboard: EventsWriter | None = None
        self._wandb: Any = None
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
            self._check_vacant()
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
            (self.path / "tensorboard").mkdir(exist_ok=True)
            # `SummaryWriter` writes in a thread, which a full disk ends, and waits for it for ever.
            self._tensorboard = EventsWriter(str(self.path / "tensorboard" / "events"))
            hide_later = SessionLog(status=SessionLog.START)
            self._tensorboard.write_event(
                Event(wall_time=time.time(), step=epochs + 1, session_log=hide_later)
            )
        if self._launch.wandb:
            wandb: Any = importlib.import_module("wandb")
            try:
                self._wandb = wandb.init(
                    project="optax-autoscale",
                    name=self.path.name,
                    dir=self.path,
                    config=dataclasses.asdict(self._experiment),
                    resume="auto",
                    settings=wandb.Settings(console="off"),
                )
            except wandb.Error as error:
                raise OSError(
                    f"Weights & Biases cannot be used: {error}; log in with `wandb login`, set "
                    "WANDB_MODE=offline, or give --no-wandb, and resume with --resume"
                ) from error

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
        scalars = _scalars(record)
        if self._wandb:
            self._wandb.log(scalars, step=record["epoch"])
        if self._tensorboard:
            summaries = [summary.scalar(name, value) for name, value in scalars.items()]
            summaries += [_histogram(name, entries) for name, entries in layers.items()]
            values = [value for each in summaries for value in each.value]
            event = Event(
                wall_time=time.time(), step=record["epoch"], summary=Summary(value=values)
            )
            with _explained(self.path):
                self._tensorboard.write_event(event)
                self._tensorboard.flush()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # After another error a picture that cannot be written is not worth a word.
        with self._held, contextlib.suppress(OSError) if error else _explained(self.path):
            if self._tensorboard:
                self._tensorboard.close()
            if self._wandb:
                self._wandb.finish(exit_code=int(error is not None))
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
            # What a process leaves behind that is killed before it has begun.
            path.is_dir() and {each.name for each in path.iterdir()} <= {LOCK, "config.part"}
        ):
            raise FileExistsError(
                f"{path} exists already and is left as it is; "
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
    """Says of an error of the operating system where it happened, and what may help."""
    try:
        yield
    except InUse:
        raise
    except OSError as error:
        remedy = (
            "make room and resume with --resume"
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


def save_model(folder: Path, params: nnx.State, batch_stats: nnx.State) -> None:
    """Saves what a run ended with to `parameters/`; every process of a run takes part.

    Raises:
      CheckpointError: if they cannot be written.
    """
    path, state = folder / "parameters", nnx.merge_state(params, batch_stats)
    try:
        ocp.save(str(path.absolute()), state, overwrite=True)
    except Exception as error:
        remedy = "make room and resume" if is_full(error) else "resume"
        raise CheckpointError(
            f"{path} could not be written ({first_line(error)}); {remedy} with --resume"
        ) from error


def load_model(folder: str | os.PathLike[str]) -> nnx.Module:
    """The trained model of a finished run, in evaluation mode.

    Args:
      folder: the run's folder.

    Returns:
      The network that `config.json` describes, with the parameters that the run ended with.
    """
    description = json.loads(Path(folder, "config.json").read_text())
    experiment = description["config"]
    model = MODELS[experiment["model"]].make(
        num_classes=description["num_classes"],
        channels=description["channels"],
        dtype=experiment["precision"],
        rngs=nnx.Rngs(experiment["seed"]),
    )
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, ocp.load(str(Path(folder).absolute() / "parameters"), state))
    model.eval()
    return model


def _scalars(record: Record) -> dict[str, float]:
    """A record under TensorBoard's names; what is None there is left out."""
    scalars = {
        "train/loss": record["train_loss"],
        "train/learning_rate": record["learning_rate"],
        "train/images_per_second": record["images_per_second"],
        "test/loss": record["test_loss"],
        "test/accuracy": record["test_accuracy"],
        "autoscale/global_std": record["global_std"],
        "autoscale/scale_factor": record["scale_factor"],
        "autoscale/exponent": record["exponent"],
        "effect/update_norm_ratio": record["update_norm_ratio"],
        "effect/update_cosine": record["update_cosine"],
    } | {f"layer_std/{path}": std for path, std in record["layer_std"].items()}
    return {name: value for name, value in scalars.items() if value is not None}


def _histogram(name: str, entries: np.ndarray) -> Summary:
    # `summary.histogram` takes ten times as long: its `dot` wakes all of BLAS's threads.
    counts, edges = np.histogram(entries, bins=30)
    return summary.histogram_raw(
        name,
        min=edges[0],
        max=edges[-1],
        num=entries.size,
        sum=entries.sum(),
        sum_squares=np.square(entries).sum(),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
    )
