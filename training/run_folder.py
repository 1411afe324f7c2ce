"""The folder of a run: what it was, what it measured, and the parameters it ended with."""

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tensorboardX import SummaryWriter

from models import MODELS
from training import plots
from training.config import Config
from training.data import Dataset
from training.record import Record


class RunFolder:
    """The files of one run.

    Args:
      config: the run's options; `config.folder` is created.
      dataset: what it trains on.

    Raises:
      FileExistsError: if there is something at that path already; nothing is touched.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self.path = config.folder
        self._title = f"{config.method}: {config.model} on {config.dataset}, seed {config.seed}"
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(
                f"{self.path} exists already and is left as it is; "
                "give another folder with --out, or remove it"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        description = {
            "command": shlex.join(["python", *sys.argv]),
            "config": dataclasses.asdict(config),
            "num_classes": dataset.num_classes,
            "channels": dataset.train_images.shape[-1],
            **environment(),
        }
        text = json.dumps(description, indent=2, default=str)
        (self.path / "config.json").write_text(text + "\n")
        self.records: list[Record] = []
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    def write(self, record: Record) -> None:
        """Adds an epoch to `metrics.jsonl` and to TensorBoard."""
        self.records.append(record)
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({name: record[name] for name in Record.__annotations__}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in _scalars(record).items():
            self._tensorboard.add_scalar(name, value, record["epoch"])
        self._tensorboard.flush()

    def save_model(self, state: nnx.State) -> None:
        """Saves the parameters and BatchNorm statistics; `load_model` reads them back."""
        ocp.save(str(self.path.absolute() / "parameters"), state)

    def close(self) -> None:
        """Draws the pictures of the epochs so far."""
        self._tensorboard.close()
        if self.records:
            plots.plot_curves(self.records, self._title, self.path / "curves.png")
            plots.plot_gradients(self.records, self._title, self.path / "gradients.png")


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


def environment() -> dict[str, Any]:
    """Where a run takes place: versions, device and commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "optax-autoscale", "numpy")
    source = Path(__file__).parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "commit": git.stdout.strip() or None,
    }
