"""What one run is: the options of `train.py`, and the recipe that fills them in."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

Dataset = Literal["digits", "cifar10", "cifar100"]
Optimizer = Literal["adamw", "sgd"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains one model with one gradient method, and records what its gradients do."""

    dataset: Dataset = "digits"
    """Data set. CIFAR is looked for in --data-dir, and downloaded there where it is missing."""
    model: Literal["resnet20", "resnet56", "vgg16_bn"] = "resnet20"
    """Network."""
    method: Literal[
        "adamw",
        "autoscale",
        "gradient_centralization",
        "gradient_normalization",
        "zscore",
        "clip",
    ] = "autoscale"
    """What is done to the gradients in front of the optimizer. adamw: nothing; clip: their global
    norm is clipped at 1."""
    optimizer: Optimizer = "adamw"
    """Optimizer. sgd has a momentum of 0.9."""
    epochs: int = 20
    """Number of passes over the training images."""
    batch_size: int = 64
    """Images per step. The images left over at the end of an epoch wait for a later one."""
    learning_rate: float = 1e-3
    """Learning rate at the start; every 30 epochs it is multiplied by 0.75."""
    weight_decay: float = 5e-5
    """Weight decay: AdamW's decoupled one, or the L2 penalty's gradient of sgd."""
    label_smoothing: float = 0.1
    """Probability mass of the training labels that is spread over all classes."""
    cutmix_probability: float = 0.0
    """Probability that CutMix mixes a batch."""
    seed: int = 0
    """Seed of everything random: initial parameters, batches, augmentation, --train-size."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's computations; parameters and statistics are float32."""
    data_dir: Path | None = None
    """Folder of TensorFlow Datasets (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    train_size: int | None = None
    """Number of training images to use, equally many of each class (default: all)."""
    out: Path | None = None
    """Folder for the results (default: runs/<dataset>-<model>-<method>-seed<k>)."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path(
            "runs", f"{self.dataset}-{self.model}-{self.method}-seed{self.seed}"
        )

    def validate(self) -> None:
        """Raises ValueError if an option is impossible, with its value and what it may be."""
        limits = {
            "epochs": (1, math.inf),
            "batch_size": (1, math.inf),
            "learning_rate": (0, math.inf),
            "weight_decay": (0, math.inf),
            "label_smoothing": (0, 1),
            "cutmix_probability": (0, 1),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                option = f"--{name.replace('_', '-')}"
                allowed = f"between {low} and {high}" if high < math.inf else f"at least {low}"
                raise ValueError(f"{option} is {value}; it must be finite and {allowed}")


def recipe(dataset: Dataset = "digits", optimizer: Optimizer = "adamw") -> Config:
    """The defaults: for CIFAR the paper's (section 5), for digits what takes a minute on a CPU."""
    config = Config(dataset, optimizer=optimizer)
    if optimizer == "sgd":
        config = dataclasses.replace(config, learning_rate=0.1)
    if dataset != "digits":
        epochs = 300 if dataset == "cifar10" else 200
        config = dataclasses.replace(config, epochs=epochs, batch_size=256, cutmix_probability=1.0)
    return config


def parse(args: Sequence[str] | None = None) -> Config:
    """Reads the command line; `--help` shows the defaults of the chosen data set and optimizer."""
    chosen, _ = tyro.cli(recipe, args=args, return_unknown_args=True, add_help=False)
    return tyro.cli(Config, args=args, default=chosen)
