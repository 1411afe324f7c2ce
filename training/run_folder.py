"""The folder of a run: what it was, what it measured, and the parameters it ended with."""

import contextlib
import dataclasses
import errno
import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

from models import MODELS
from training import plots
from training.config import Config
from training.data import Dataset
from training.record import Record


class RunFolder:
    """The files of one run; leaving it as a context draws the pictures.

    In a run of several processes, only the first one has any.

    Args:
      config: the run's options; `config.folder` is created, or continued with `config.resume`.
      dataset: what it trains on.

    Raises:
      OSError: if the folder cannot be used, or holds something and `config.resume` is not set;
        nothing is touched then.
      ValueError: if `config.wandb` is set and the package is not installed.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self._config = config
        self._description = {
            "command": shlex.join(["python", *sys.argv]),
            "num_classes": dataset.num_classes,
            "channels": dataset.train_images.shape[-1],
            **environment(),
        }
        self.path = path = config.folder
        self.records: list[Record] = []
        self._tensorboard: EventsWriter | None = None
        self._wandb: Any = None
        if config.wandb and not find_spec("wandb"):
            raise ValueError(
                "--wandb needs a package that is missing: pip install wandb, or leave --wandb out"
            )
        if not config.resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{path} exists already and is left as it is; "
                "continue it with --resume, give another folder with --out, or remove it"
            )
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            if not config.resume:
                config.save(**self._description)

    def begin(self, epochs: int) -> None:
        """Opens the records, and keeps the first `epochs` of those that are there."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            with _explained(path):
                lines = path.read_text().splitlines(keepends=True)[:epochs]
                self.records = [json.loads(line) for line in lines]
                part = path.with_suffix(".part")
                part.write_text("".join(lines))
                part.replace(path)
                self._config.save(**self._description)
        with _explained(self.path):
            (self.path / "tensorboard").mkdir(exist_ok=True)
            # `SummaryWriter` writes in a thread, which a full disk ends, and waits for it for ever.
            self._tensorboard = EventsWriter(str(self.path / "tensorboard" / "events"))
            hide_later = SessionLog(status=SessionLog.START)
            self._tensorboard.write_event(
                Event(wall_time=time.time(), step=epochs + 1, session_log=hide_later)
            )
        if self._config.wandb:
            wandb: Any = importlib.import_module("wandb")
            try:
                self._wandb = wandb.init(
                    project="optax-autoscale",
                    name=self.path.name,
                    dir=self.path,
                    config=dataclasses.asdict(self._config),
                    resume="auto",
                    settings=wandb.Settings(console="off"),
                )
            except wandb.Error as error:
                raise OSError(
                    f"Weights & Biases cannot be used: {error}; log in with `wandb login`, set "
                    "WANDB_MODE=offline, or give --no-wandb, and continue with --resume"
                ) from error

    def write(self, record: Record, layers: dict[str, np.ndarray]) -> None:
        """Adds an epoch to all records, and histograms of `layers` to TensorBoard's."""
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # After another error a picture that cannot be written is not worth a word.
        with contextlib.suppress(OSError) if error else _explained(self.path):
            if self._tensorboard:
                self._tensorboard.close()
            if self._wandb:
                self._wandb.finish(exit_code=int(error is not None))
            if self.records:
                plots.plot_curves(self.records, self._title, self.path / "curves.png")
                plots.plot_gradients(self.records, self._title, self.path / "gradients.png")

    @property
    def _title(self) -> str:
        config = self._config
        return f"{config.method}: {config.model} on {config.dataset}, seed {config.seed}"


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Says of an error of the operating system where it happened, and what may help."""
    try:
        yield
    except OSError as error:
        remedy = (
            "make room and continue with --resume"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "choose another folder with --out"
        )
        raise type(error)(f"{path} cannot be written: {error.strerror}; {remedy}") from error


def save_model(folder: Path, params: nnx.State, batch_stats: nnx.State) -> None:
    """Saves what a run ended with to `parameters/`; every process of a run takes part."""
    state = nnx.merge_state(params, batch_stats)
    ocp.save(str(folder.absolute() / "parameters"), state, overwrite=True)


def read_records(folder: str | os.PathLike[str]) -> list[Record]:
    """The epochs of a run, from its `metrics.jsonl`."""
    with open(Path(folder, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def load_model(folder: str | os.PathLike[str]) -> nnx.Module:
    """The trained model of a finished run, in evaluation mode.

    Args:
      folder: the run's folder.

    Returns:
      The network that `config.json` describes, with the parameters that the run ended with.
    """
    description = json.loads(Path(folder, "config.json").read_text())
    config = description["config"]
    model = MODELS[config["model"]](
        num_classes=description["num_classes"],
        channels=description["channels"],
        dtype=config["precision"],
        rngs=nnx.Rngs(config["seed"]),
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
        "gradients/global_std": record["global_std"],
        "gradients/scale_factor": record["scale_factor"],
        "gradients/exponent": record["exponent"],
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


def environment() -> dict[str, Any]:
    """Where a run takes place: versions, device and commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "optax-autoscale", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of these sources, with `-dirty` where they differ from it; None without git."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # A study's records and report, which it writes between its runs, are no sources.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(exclude)results")
    return (git("rev-parse", "HEAD") + ("-dirty" if changed else "")) or None
