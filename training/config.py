"""What a run is and how it is launched: the options of `train.py`, and the recipe behind them."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeAlias,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import tyro

from models import MODELS
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS
from training.record import SCHEMA

if TYPE_CHECKING:
    DatasetName: TypeAlias = str
    ModelName: TypeAlias = str
    MethodName: TypeAlias = str
    OptimizerName: TypeAlias = str
else:
    DatasetName, ModelName = Literal[tuple(DATASETS)], Literal[tuple(MODELS)]
    MethodName, OptimizerName = Literal[tuple(METHODS)], Literal[tuple(OPTIMIZERS)]

MAX_STEPS = 2**31 - 1  # steps are counted in int32
# Others are zero or infinite in float32.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained and how: recorded with the results, and the same when a run is resumed."""

    dataset: DatasetName = "digits"
    """Data set; CIFAR is read from --data-dir, or downloaded there if it is missing."""
    model: ModelName = "resnet20"
    """Network."""
    method: MethodName = "autoscale"
    """What transforms the gradients before the optimizer; --list describes each."""
    optimizer: OptimizerName = "adamw"
    """Optimizer; --list describes each."""
    epochs: int = 20
    """Number of passes over the training images; a resumed run may have more."""
    batch_size: int = 64
    """Images per step; the incomplete last batch of an epoch is dropped."""
    learning_rate: float = 1e-3
    """Learning rate at the start."""
    decay_epochs: float = 30.0
    """Multiply the learning rate by 0.75 every this many epochs."""
    warmup_epochs: float = 0.0
    """Raise the learning rate linearly from 0 over this many epochs."""
    weight_decay: float = 5e-5
    """Weight decay: decoupled with adamw, an L2 penalty with adam and sgd."""
    label_smoothing: float = 0.1
    """Share of each training label that is spread evenly over all classes."""
    cutmix_probability: float = 0.0
    """Probability that CutMix mixes a batch."""
    tag: str = ""
    """Suffix of the run's name, to tell variants apart."""
    seed: int = 0
    """Random seed of initial parameters, batches, augmentation and --train-size."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's computations; parameters and statistics are float32."""
    train_size: int | None = None
    """Number of training images to use, the same of each class (default: all)."""
    effect: bool = False
    """Measure how each update differs from the plain optimizer's on the same gradients."""

    @property
    def name(self) -> str:
        """The run's name, and by default its folder's."""
        it = self
        name = f"{it.dataset}-{it.model}-{it.method}-{it.optimizer}-seed{it.seed}"
        return f"{name}-{it.tag}" if it.tag else name

    def validate(self) -> None:
        """Raises ValueError if an option is impossible, with its value and what it may be."""
        limits: dict[str, tuple[Callable[[float], bool], str]] = {
            "epochs": (lambda value: 1 <= value <= MAX_STEPS, f"between 1 and {MAX_STEPS}"),
            "batch_size": (lambda value: 1 <= value < math.inf, "positive"),
            "learning_rate": (
                lambda value: SMALLEST <= value <= LARGEST,
                "positive in float32",
            ),
            "decay_epochs": (lambda value: 0 < value < math.inf, "positive"),
            "warmup_epochs": (lambda value: 0 <= value < math.inf, "0 or positive"),
            "weight_decay": (
                lambda value: 0 <= value <= LARGEST,
                "0 or positive in float32",
            ),
            "label_smoothing": (lambda value: 0 <= value <= 1, "between 0 and 1"),
            "cutmix_probability": (lambda value: 0 <= value <= 1, "between 0 and 1"),
            "seed": (lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1"),
        }
        _check_limits(self, limits)
        if not re.fullmatch(r"[\w.+-]*", self.tag):
            raise ValueError(
                f"--tag is {self.tag!r}; it is part of a file's name and must be of letters, "
                "digits, '.', '+', '-' and '_'"
            )
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where a run is stored and on what it runs; may change whenever it is resumed."""

    out: Path | None = None
    """Folder of the run (default: runs/<dataset>-<model>-<method>-<optimizer>-seed<k>)."""
    resume: bool = False
    """Resume from the latest checkpoint in --out, with the options of that run."""
    auto_resume: bool = False
    """Resume the run in --out if there is one, start it otherwise."""
    data_dir: Path | None = None
    """Folder of the TensorFlow Datasets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)."""
    checkpoint_minutes: float = 1.0
    """Write a checkpoint every this many minutes, and at the end."""
    wandb: bool = False
    """Log to Weights & Biases as well."""
    fsdp: bool = False
    """Shard the parameters and the optimizer state over the devices, not only the batch."""
    coordinator: str | None = None
    """Address (host:port) of process 0, for several hosts without a cluster that JAX detects."""
    num_processes: int | None = None
    """Number of processes; needs --coordinator."""
    process_id: int | None = None
    """Id of this process, from 0; needs --coordinator."""
    list: bool = False
    """Describe the data sets, models, methods and optimizers, then exit."""
    debug: bool = False
    """Show the full traceback of an error."""

    def validate(self) -> None:
        """Raises ValueError if an option is impossible, with its value and what it may be."""
        positive = (lambda value: 0 < value < math.inf, "positive")
        _check_limits(self, {"checkpoint_minutes": positive})
        for name in ("out", "data_dir"):
            check_path(name, getattr(self, name) or Path())
        processes = (self.coordinator, self.num_processes, self.process_id)
        if None in processes and processes != (None, None, None):
            raise ValueError(
                "--coordinator, --num-processes and --process-id go together; got "
                f"{self.coordinator}, {self.num_processes} and {self.process_id}"
            )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not (host and port.isdecimal() and int(port) < 2**16):
                raise ValueError(f"--coordinator is {self.coordinator!r}; it must be host:port")
        if (count := self.num_processes) is not None:
            limits: dict[str, tuple[Callable[[float], bool], str]] = {
                "num_processes": (lambda value: 1 <= value < 2**31, "between 1 and 2**31 - 1"),
                "process_id": (lambda value: 0 <= value < count, f"between 0 and {count - 1}"),
            }
            _check_limits(self, limits)


class Options(NamedTuple):
    """Train one model with one gradient method, and record what its gradients do.

    The defaults shown are those of the chosen --dataset and --optimizer; for CIFAR they are the
    paper's recipe, as docs/readings.md reads it.
    """

    experiment: Experiment = Experiment()
    launch: Launch = Launch()


# The groups of the command line's options, as --help shows them.
GROUPS = {
    "data": ("dataset", "data_dir", "train_size"),
    "model": ("model", "precision"),
    "recipe": (
        *("method", "optimizer", "epochs", "batch_size", "learning_rate", "decay_epochs"),
        *("warmup_epochs", "weight_decay", "label_smoothing", "cutmix_probability"),
    ),
    "run": (
        *("out", "tag", "seed", "resume", "auto_resume", "checkpoint_minutes"),
        *("effect", "wandb", "list", "debug"),
    ),
    "device": ("fsdp", "coordinator", "num_processes", "process_id"),
}
ALIASES = {"batch_size": ("-b",), "learning_rate": ("--lr",), "weight_decay": ("--wd",)}
# Options that experiments written by an earlier version may lack.
LATER = ("warmup_epochs", "tag", "effect")
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind)
    for name, kind in get_type_hints(Experiment).items()
    if get_origin(kind) is Literal
}


def run_folder(experiment: Experiment, launch: Launch) -> Path:
    """The folder of a run."""
    return launch.out or Path("runs", experiment.name)


def recipe(dataset: DatasetName = "digits", optimizer: OptimizerName = "adamw") -> Experiment:
    """The defaults: for CIFAR the paper's recipe, for digits one that takes a minute on a CPU.

    The recipe is that of section 5 as we read it. `docs/readings.md`, *What the paper leaves to the
    reader*, has the other readings and how to try each of them.
    """
    experiment = Experiment(
        dataset, optimizer=optimizer, learning_rate=OPTIMIZERS[optimizer].learning_rate
    )
    if dataset == "digits":
        return experiment
    epochs = 300 if dataset == "cifar10" else 200
    return dataclasses.replace(experiment, epochs=epochs, batch_size=256, cutmix_probability=1.0)


def parse(args: Sequence[str] | None = None) -> Options:
    """Reads the command line; raises ValueError for an impossible option.

    `--help` shows the defaults of the chosen data set and optimizer. Where a run is resumed,
    options that are not given are those of that run, and `launch.resume` is set.
    """
    args = sys.argv[1:] if args is None else args
    for name, choices in CHOICES.items():  # tyro names the choices, but not the nearest
        for value in _given(name, args):
            _check_choice(name, value, choices)
    chosen, _ = tyro.cli(recipe, args=args, return_unknown_args=True, add_help=False)
    options = _parse(args, Options(chosen))
    folder = run_folder(*options)
    resume = options.launch.resume or options.launch.auto_resume
    if resume and (folder / "config.json").exists():
        options = _parse(args, Options(load(folder), Launch(out=folder, resume=True)))
    options.experiment.validate()
    options.launch.validate()
    return options


def _parse(args: Sequence[str], default: Options) -> Options:
    kinds: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for each in (Experiment, Launch):
        kinds |= get_type_hints(each)
        texts |= _field_docstrings(each)
    values = vars(default.experiment) | vars(default.launch)

    def field(name: str) -> tuple[str, Any, Any]:
        about = tyro.conf.arg(
            help=texts[name], aliases=ALIASES.get(name), help_behavior_hint=default_hint
        )
        return name, Annotated[kinds[name], about], values[name]

    # tyro makes a group of each dataclass.
    groups = [
        (title, dataclasses.make_dataclass(title, map(field, names), frozen=True))
        for title, names in GROUPS.items()
    ]
    command_line = dataclasses.make_dataclass(
        "CommandLine", [(title, kind, kind()) for title, kind in groups]
    )
    given = tyro.cli(
        command_line,
        args=args,
        description=inspect.getdoc(Options),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
    )
    chosen = {name: value for group in vars(given).values() for name, value in vars(group).items()}
    experiment, launch = (
        {name: chosen[name] for name in vars(part)} for part in (default.experiment, default.launch)
    )
    return Options(Experiment(**experiment), Launch(**launch))


def default_hint(default: str) -> str:
    """What --help says of a default; nothing of one that turns the option off."""
    return "" if default in ("None", "False", "''", "") else f"(default: {default})"


def _field_docstrings(kind: type) -> dict[str, str]:
    (definition,) = ast.parse(inspect.getsource(kind)).body
    return {
        ast.unparse(field.target): inspect.cleandoc(ast.literal_eval(text.value))
        for field, text in itertools.pairwise(cast(ast.ClassDef, definition).body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def save(folder: Path, experiment: Experiment, launch: Launch, **description: Any) -> None:
    """Writes `config.json`: the options, and what else describes the run."""
    options = {"config": dataclasses.asdict(experiment), "launch": dataclasses.asdict(launch)}
    path = folder / "config.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(options | description, indent=2, default=str) + "\n")
    part.replace(path)


def load(folder: Path) -> Experiment:
    """The experiment of the run in a folder, from its `config.json`.

    Raises:
      ValueError: if the file is damaged, or of another version; the message names it.
    """
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text())
        if not (isinstance(description, dict) and "config" in description):
            raise ValueError("no options are in it")
        schema = description.get("schema", 1)
        if schema == SCHEMA:
            return experiment_of(description["config"])
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}; put back a copy of it, or start the run again with "
            "another --out"
        ) from error
    version = "an earlier" if schema == 1 else "another"
    commit = description.get("commit")
    raise ValueError(
        f"{path} was written by {version} version of train.py, and this one cannot resume its run; "
        "start it again with another --out"
        + (f", or resume it with the sources of commit {commit}" if commit else "")
    )


def experiment_of(options: Any) -> Experiment:
    """The experiment that was written as JSON.

    Args:
      options: the result of `dataclasses.asdict`, as JSON gives it back.

    Returns:
      The experiment; options that were added after it was written have their defaults.

    Raises:
      ValueError: if an option is missing, unknown, of the wrong type or impossible.
    """
    kinds = get_type_hints(Experiment)
    if not isinstance(options, dict):
        raise ValueError("no options are in it")
    if unknown := [name for name in options if name not in kinds]:
        raise ValueError(f"there is no option {', '.join(unknown)}")
    options = {name: getattr(Experiment(), name) for name in LATER} | options
    if missing := [name for name in kinds if name not in options]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name, kind in kinds.items():
        value = options[name]
        if type(value) not in _json_types(kind):
            names = " or ".join(each.__name__ for each in _json_types(kind))
            raise ValueError(f"{name} is {value!r}, not of type {names}")
    experiment = Experiment(**options)
    experiment.validate()
    return experiment


def _json_types(kind: Any) -> tuple[type, ...]:
    if get_origin(kind) is Literal:
        return (str,)
    return {float: (float, int)}.get(kind) or get_args(kind) or (kind,)


def check_resumes(experiment: Experiment, folder: Path) -> None:
    """Raises ValueError if `experiment` is not that of the run in a folder."""
    if not (folder / "config.json").exists():
        raise ValueError(
            f"there is no run in {folder} to resume; give its folder with --out, "
            "or leave out --resume to start it"
        )
    begun = load(folder)
    for name, value in dataclasses.asdict(begun).items():
        if name != "epochs" and getattr(experiment, name) != value:
            raise ValueError(
                f"{option(name)} is {getattr(experiment, name)}, and the run in {folder} was "
                f"started with {value}; resume it with that, or start another run with --out"
            )


def option(name: str) -> str:
    """An option as it is given on the command line.

    >>> option("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def check_path(name: str, path: Path) -> None:
    """Raises ValueError for a path that is not UTF-8, which some libraries would misread."""
    path = path.absolute()
    if os.fsencode(path) != str(path).encode(errors="replace"):
        raise ValueError(f"{option(name)} is {str(path)!r}, which is not UTF-8; choose another")


def _given(name: str, args: Sequence[str]) -> list[str]:
    """The values that the command line has for an option."""
    return [value for key, value in itertools.pairwise(args) if key == option(name)] + [
        arg.partition("=")[2] for arg in args if arg.startswith(option(name) + "=")
    ]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if (name, value) == ("method", "adamw"):
        raise ValueError(
            "--method adamw is called none now: the optimizer alone, which --optimizer chooses"
        )
    if value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0)[0]
        raise ValueError(
            f"{option(name)} is {value!r}; did you mean {nearest!r}? "
            f"It must be one of {', '.join(choices)}"
        )


def _check_limits(options: Any, limits: dict[str, tuple[Callable[[float], bool], str]]) -> None:
    for name, (allowed, text) in limits.items():
        value = getattr(options, name)
        if not allowed(value):
            raise ValueError(f"{option(name)} is {value}; it must be finite and {text}")
