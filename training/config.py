"""What one run is: the options of `train.py`, and the recipe that fills them in."""

import dataclasses
import difflib
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

Dataset = Literal["digits", "cifar10", "cifar100"]
Optimizer = Literal["adamw", "sgd"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains one model with one gradient method, and records what its gradients do."""

    dataset: Dataset = "digits"
    """Data set. CIFAR is looked for in --data-dir, and downloaded there where it is missing."""
    model: Literal["resnet20", "resnet56", "vgg16_bn", "vit"] = "resnet20"
    """Network."""
    method: Literal[
        "adamw",
        "autoscale",
        "gradient_centralization",
        "gradient_normalization",
        "zscore",
        "clip",
        "centering",
        "scaling",
        "constant",
        "autoscale_p1",
        "autoscale_p2",
        "autoscale_max1",
    ] = "autoscale"
    """What is done to the gradients in front of the optimizer; --list explains each."""
    optimizer: Optimizer = "adamw"
    """Optimizer. sgd has a momentum of 0.9."""
    epochs: int = 20
    """Number of passes over the training images."""
    batch_size: int = 64
    """Images per step. The images left over at the end of an epoch wait for a later one."""
    learning_rate: float = 1e-3
    """Learning rate at the start."""
    decay_epochs: float = 30.0
    """Number of epochs after which the learning rate is multiplied by 0.75, again and again."""
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
    resume: bool = False
    """Continue the run in that folder where its latest checkpoint is, with its own options."""
    checkpoint_minutes: float = 10.0
    """A checkpoint is written after every epoch, and within one whenever so long has passed."""
    fsdp: bool = False
    """Split parameters and optimizer state over the devices, and not the batch alone."""
    coordinator: str | None = None
    """Address (host:port) of process 0, for a run of several processes that no cluster started."""
    num_processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Number of this process, from 0, with --coordinator."""
    wandb: bool = False
    """Send the records to Weights & Biases as well."""
    list: bool = False
    """Show the data sets, models and methods, and stop."""
    debug: bool = False
    """Show the traceback of an error."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path(
            "runs", f"{self.dataset}-{self.model}-{self.method}-seed{self.seed}"
        )

    def validate(self) -> None:
        """Raises ValueError if an option is impossible, with its value and what it may be."""
        limits: dict[str, tuple[Callable[[float], bool], str]] = {
            "epochs": (lambda value: value >= 1, "positive"),
            "batch_size": (lambda value: value >= 1, "positive"),
            "learning_rate": (lambda value: value > 0, "positive"),
            "decay_epochs": (lambda value: value > 0, "positive"),
            "weight_decay": (lambda value: value >= 0, "0 or positive"),
            "label_smoothing": (lambda value: 0 <= value <= 1, "between 0 and 1"),
            "cutmix_probability": (lambda value: 0 <= value <= 1, "between 0 and 1"),
            "seed": (lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1"),
            "checkpoint_minutes": (lambda value: value > 0, "positive"),
        }
        for name, (allowed, text) in limits.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and allowed(value)):
                raise ValueError(f"{_option(name)} is {value}; it must be finite and {text}")
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        processes = (self.coordinator, self.num_processes, self.process_id)
        if None in processes and processes != (None, None, None):
            raise ValueError(
                "--coordinator, --num-processes and --process-id go together; got "
                f"{self.coordinator}, {self.num_processes} and {self.process_id}"
            )

    def save(self, **description: Any) -> None:
        """Writes `config.json`: the options, and what else describes the run."""
        path = self.folder / "config.json"
        text = json.dumps({"config": dataclasses.asdict(self)} | description, indent=2, default=str)
        part = path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(path)


CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind)
    for name, kind in get_type_hints(Config).items()
    if get_origin(kind) is Literal
}

# Options that may change when a run is continued. All others would make it another experiment.
FREE = {
    *("epochs", "data_dir", "out", "resume", "checkpoint_minutes", "fsdp", "debug"),
    *("coordinator", "num_processes", "process_id", "wandb", "list"),
}


def load(folder: Path) -> Config:
    """The options of the run in a folder, from its `config.json`."""
    values = json.loads((folder / "config.json").read_text())["config"]
    paths = {name: values[name] and Path(values[name]) for name in ("data_dir", "out")}
    return Config(**values | paths)


def check_continues(config: Config) -> None:
    """Raises ValueError if `config` does not continue the run that is in its folder."""
    if not (config.folder / "config.json").exists():
        raise ValueError(
            f"there is no run in {config.folder} to continue; give its folder with --out, "
            "or leave out --resume to start it"
        )
    begun = load(config.folder)
    for name, value in dataclasses.asdict(begun).items():
        if name not in FREE and getattr(config, name) != value:
            raise ValueError(
                f"{_option(name)} is {getattr(config, name)}, and the run in {config.folder} was "
                f"started with {value}; continue it with that, or start another run with --out"
            )


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
    """Reads the command line; raises ValueError for an impossible option.

    `--help` shows the defaults of the chosen data set and optimizer; with `--resume`, options that
    are not given are those of the run that is continued.
    """
    args = sys.argv[1:] if args is None else args
    for name, choices in CHOICES.items():  # tyro names the choices, but not the nearest
        for value in _given(name, args):
            _check_choice(name, value, choices)
    chosen, _ = tyro.cli(recipe, args=args, return_unknown_args=True, add_help=False)
    config = tyro.cli(Config, args=args, default=chosen)
    if config.resume and (config.folder / "config.json").exists():
        alone = {"coordinator": None, "num_processes": None, "process_id": None, "debug": False}
        begun = dataclasses.replace(load(config.folder), out=config.folder, **alone)
        config = tyro.cli(Config, args=args, default=begun)
    config.validate()
    return config


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _given(name: str, args: Sequence[str]) -> list[str]:
    """The values that the command line has for an option."""
    option = _option(name)
    return [value for key, value in itertools.pairwise(args) if key == option] + [
        arg.partition("=")[2] for arg in args if arg.startswith(option + "=")
    ]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0)[0]
        raise ValueError(
            f"{_option(name)} is {value!r}; did you mean {nearest!r}? "
            f"It must be one of {', '.join(choices)}"
        )
