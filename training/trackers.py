"""What is told of a run to TensorBoard and to Weights & Biases."""

import dataclasses
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

from training.config import Experiment
from training.record import Record


class TensorBoard:
    """Scalars and histograms of each epoch, as TensorBoard's event files.

    Args:
      folder: where the files are; created where it is missing.
      epochs: those that the run has done. What the files hold of later ones is hidden.
    """

    def __init__(self, folder: Path, epochs: int):
        folder.mkdir(exist_ok=True)
        # `SummaryWriter` writes in a thread, which a full disk ends, and waits for it for ever.
        self._writer = EventsWriter(str(folder / "events"))
        hide_later = SessionLog(status=SessionLog.START)
        self._writer.write_event(
            Event(wall_time=time.time(), step=epochs + 1, session_log=hide_later)
        )

    def write(self, record: Record, layers: dict[str, np.ndarray]) -> None:
        """Adds an epoch, with histograms of `layers`."""
        summaries = [summary.scalar(name, value) for name, value in _scalars(record).items()]
        summaries += [_histogram(name, entries) for name, entries in layers.items()]
        values = [value for each in summaries for value in each.value]
        self._writer.write_event(
            Event(wall_time=time.time(), step=record["epoch"], summary=Summary(value=values))
        )
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Closes the files, whether the run has failed or not."""
        del failed
        self._writer.close()


class WeightsAndBiases:
    """Scalars of each epoch, as a run in Weights & Biases.

    Args:
      folder: that of the run.
      experiment: what is trained.

    Raises:
      OSError: if the service cannot be used.
    """

    def __init__(self, folder: Path, experiment: Experiment):
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project="optax-autoscale",
                name=folder.name,
                dir=folder,
                config=dataclasses.asdict(experiment),
                resume="auto",
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise OSError(
                f"Weights & Biases cannot be used: {error}; log in with `wandb login`, set "
                "WANDB_MODE=offline, or give --no-wandb, and resume with --resume"
            ) from error

    def write(self, record: Record, layers: dict[str, np.ndarray]) -> None:
        """Adds an epoch."""
        del layers
        self._run.log(_scalars(record), step=record["epoch"])

    def close(self, *, failed: bool) -> None:
        """Ends the run, as a failed one or not."""
        self._run.finish(exit_code=int(failed))


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
