"""The options of `train.py`: what a run is, how it is launched, and the recipes of the defaults."""

import dataclasses
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import jax
import numpy as np
import tyro
from flax import nnx
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from models import MODELS
from training import UserError
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS
from training.record import READABLE, SCHEMA, explain

if TYPE_CHECKING:
    DatasetName: TypeAlias = str
    ModelName: TypeAlias = str
    MethodName: TypeAlias = str
    OptimizerName: TypeAlias = str
else:
    DatasetName, ModelName = Literal[tuple(DATASETS)], Literal[tuple(MODELS)]
    MethodName, OptimizerName = Literal[tuple(METHODS)], Literal[tuple(OPTIMIZERS)]

MAX_STEPS = 2**31 - 1  # steps are counted in int32
# Other numbers are zero or infinite in float32.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

alias = tyro.conf.arg
no_default = tyro.conf.arg(help_behavior_hint="")  # its text says what happens without the option
Flag = Annotated[bool, no_default]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained and how: recorded with the results, and fixed when a run is resumed."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dataset: DatasetName = "digits"
    """Data set; CIFAR is read from --data-dir, or downloaded there if it is missing."""
    model: ModelName = "resnet20"
    """Network."""
    method: MethodName = "autoscale"
    """What transforms the gradients before the optimizer; --list describes each."""
    optimizer: OptimizerName = "adamw"
    """Optimizer; --list describes each."""
    epochs: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 20
    """Number of passes over the training images; a resumed run may have more."""
    batch_size: Annotated[int, Field(ge=1), alias(aliases=("-b",))] = 64
    """Images per step; the incomplete last batch of an epoch is dropped."""
    learning_rate: Annotated[float, Field(ge=SMALLEST, le=LARGEST), alias(aliases=("--lr",))] = 1e-3
    """Learning rate at the start."""
    decay_epochs: Positive = 30.0
    """Multiply the learning rate by 0.75 every this many epochs."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Raise the learning rate linearly from 0 over this many epochs."""
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST), alias(aliases=("--wd",))] = 5e-5
    """Weight decay: decoupled with adamw, an L2 penalty with adam and sgd."""
    label_smoothing: Probability = 0.1
    """Share of each training label that is spread evenly over all classes."""
    cutmix_probability: Probability = 0.0
    """Probability that CutMix mixes a batch."""
    tag: Annotated[str, Field(pattern=r"^[\w.+-]*$"), no_default] = ""
    """Suffix of the run's name, to tell variants apart: letters, digits and . + - _"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of initial parameters, batches, augmentation and subsets."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's computations; parameters and statistics are float32."""
    train_size: Annotated[int | None, no_default] = None
    """Number of training images to use, the same of each class (default: all)."""
    validation_size: Annotated[int, Field(ge=0)] = 0
    """Number of other training images: evaluated after every epoch, as the test images are."""
    effect: Flag = False
    """Measure how each update differs from the plain optimizer's on the same gradients."""

    @property
    def name(self) -> str:
        """The run's name, and by default its folder's."""
        name = f"{self.dataset}-{self.model}-{self.method}-{self.optimizer}-seed{self.seed}"
        return f"{name}-{self.tag}" if self.tag else name

    @property
    def num_train(self) -> int:
        """The number of images that it is trained on."""
        return self.train_size or DATASETS[self.dataset].num_train - self.validation_size


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where a run is stored and on what it runs; may change whenever it is resumed."""

    __pydantic_config__ = ConfigDict(extra="ignore", allow_inf_nan=False)

    out: Annotated[Path | None, no_default] = None
    """Folder of the run (default: runs/<dataset>-<model>-<method>-<optimizer>-seed<k>)."""
    resume: Flag = False
    """Resume from the latest checkpoint in --out, with the options of that run."""
    auto_resume: Flag = False
    """Resume the run in --out if there is one, start it otherwise."""
    config: Annotated[Path | None, no_default] = None
    """Repeat the run of this config.json; other options given change it."""
    data_dir: Annotated[Path | None, no_default] = None
    """Folder of the TensorFlow Datasets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)."""
    checkpoint_minutes: Positive = 1.0
    """Write a checkpoint every this many minutes, and at the end."""
    wandb: Flag = False
    """Log to Weights & Biases as well."""
    fsdp: Flag = False
    """Shard the parameters and the optimizer state over the devices, not only the batch."""
    coordinator: Annotated[str | None, Field(pattern=r"^.+:\d{1,5}$"), no_default] = None
    """Address (host:port) of process 0, for several hosts without a cluster that JAX detects."""
    num_processes: Annotated[int | None, Field(ge=1, lt=2**31), no_default] = None
    """Number of processes; needs --coordinator."""
    process_id: Annotated[int | None, Field(ge=0), no_default] = None
    """Id of this process, from 0; needs --coordinator."""
    list: Flag = False
    """Describe the data sets, models, methods and optimizers, then exit."""
    debug: Flag = False
    """Show the full traceback of an error."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Train one model with one gradient method, and record what its gradients do.

    The defaults shown are those of the chosen --dataset and --optimizer; for CIFAR they are the
    paper's recipe, as docs/readings.md reads it.
    """

    experiment: tyro.conf.OmitArgPrefixes[Experiment] = Experiment()
    launch: tyro.conf.OmitArgPrefixes[Launch] = Launch()


_EXPERIMENT, _LAUNCH = TypeAdapter(Experiment), TypeAdapter(Launch)


def recipe(dataset: DatasetName = "digits", optimizer: OptimizerName = "adamw") -> Experiment:
    """The defaults: for CIFAR the paper's recipe, for digits one that takes a minute on a CPU.

    `docs/readings.md` has other readings of the paper's section 5, and how to try each of them.
    """
    experiment = Experiment(
        dataset, optimizer=optimizer, learning_rate=OPTIMIZERS[optimizer].learning_rate
    )
    if dataset == "digits":
        return experiment
    epochs = 300 if dataset == "cifar10" else 200
    return dataclasses.replace(experiment, epochs=epochs, batch_size=256, cutmix_probability=1.0)


def parse(args: Sequence[str] | None = None) -> tuple[Experiment, Launch]:
    """Reads the command line of `train.py`.

    Options that are not given are, where a run is resumed, those of that run; with `--config` those
    of the file; otherwise the recipe's for the data set and the optimizer.

    Returns:
      What is trained, and how it is launched: `out` is set, and `resume` where there is a run.

    Raises:
      ValueError: for an impossible option; the message has its value and what is possible.
    """
    args = sys.argv[1:] if args is None else list(args)
    # Once without --help, to know which defaults it shows.
    chosen = _read([arg for arg in args if arg not in ("-h", "--help")], Options())
    if chosen.launch.config is not None:
        default = load(chosen.launch.config)
    else:
        default = recipe(chosen.experiment.dataset, chosen.experiment.optimizer)
    options = _read(args, Options(default))
    out = local_path("out", options.launch.out or Path("runs", options.experiment.name))
    resume, config = options.launch.resume, out / "config.json"
    if (resume or options.launch.auto_resume) and config.exists():
        options, resume = _read(args, _options_of(config, (SCHEMA,))), True
    data_dir = options.launch.data_dir
    if data_dir is not None:  # a run may be resumed from another folder
        data_dir = local_path("data_dir", data_dir).absolute()
    launch = dataclasses.replace(options.launch, out=out, resume=resume, data_dir=data_dir)
    validate(options.experiment, launch)
    return options.experiment, launch


def _read(args: Sequence[str], default: Options) -> Options:
    # What a recorded run has switched on may be given again, or be switched off.
    is_on = default.experiment.effect or default.launch.wandb or default.launch.fsdp
    pairs = () if is_on else (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(Options, args=args, default=default, config=(*pairs, tyro.conf.DisallowNone))


def validate(experiment: Experiment, launch: Launch) -> None:
    """Raises ValueError if an option is impossible, with its value and what is possible."""
    for adapter, options in ((_EXPERIMENT, experiment), (_LAUNCH, launch)):
        try:
            adapter.validate_json(json.dumps(dataclasses.asdict(options), default=str))
        except ValidationError as error:
            name, _, problem = explain(error).partition(" ")
            raise UserError(f"{option(name)} {problem}") from error
    number, id = launch.num_processes, launch.process_id
    if len({launch.coordinator is None, number is None, id is None}) > 1:
        raise UserError(
            "--coordinator, --num-processes and --process-id go together; got "
            f"{launch.coordinator}, {number} and {id}"
        )
    if number is not None and id is not None and id >= number:
        raise UserError(f"--process-id is {id}; it must be less than --num-processes, {number}")


def experiment_of(options: Any) -> Experiment:
    """The experiment that was written as JSON; options that were added later have their defaults.

    Raises:
      ValueError: if an option is unknown, of the wrong type or impossible.
    """
    try:
        return _EXPERIMENT.validate_json(json.dumps(options))
    except ValidationError as error:
        raise UserError(explain(error)) from error


def load(path: Path) -> Experiment:
    """The experiment in a `config.json`.

    Raises:
      ValueError: if the file cannot be read, is damaged, or of another version.
    """
    return _options_of(path, READABLE).experiment


def _options_of(path: Path, schemas: Sequence[int]) -> Options:
    """What a `config.json` of these schemas holds; of the launch, what a resumed run keeps."""
    try:
        description = json.loads(path.read_text())
        if not (isinstance(description, dict) and "config" in description):
            raise ValueError("no options are in it")
        if description.get("schema", 1) in schemas:
            saved = description.get("launch") or {}
            names = ("data_dir", "checkpoint_minutes", "wandb", "fsdp")
            kept = json.dumps({name: saved[name] for name in names if name in saved})
            return Options(experiment_of(description["config"]), _LAUNCH.validate_json(kept))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a config.json") from error
    except ValueError as error:
        reason = explain(error) if isinstance(error, ValidationError) else error
        raise UserError(
            f"{path} is damaged: {reason}; put back a copy of it, or start the run again with "
            "another --out"
        ) from error
    commit = description.get("commit")
    raise UserError(
        f"{path} was written by another version of train.py, and this one cannot resume its run; "
        "start a new run with another --out"
        + (f", or resume it with the sources of commit {commit}" if commit else "")
    )


def check_resumes(experiment: Experiment, folder: Path) -> None:
    """Raises ValueError if the run in a folder cannot go on as `experiment`."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(
            f"there is no run in {folder} to resume; give its folder with --out, "
            "or leave out --resume to start it"
        )
    begun = _options_of(path, (SCHEMA,)).experiment
    for name, value in dataclasses.asdict(begun).items():
        if name != "epochs" and getattr(experiment, name) != value:
            raise UserError(
                f"{option(name)} is {getattr(experiment, name)}, and the run in {folder} was "
                f"started with {value}; resume it with that, or start another run with --out"
            )


def option(name: str) -> str:
    """An option as it is given on the command line.

    >>> option("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def local_path(name: str, path: Path) -> Path:
    """The path that an option gives, with `~` expanded.

    Raises:
      ValueError: if it is a URL, a home that is unknown, or not UTF-8, which some libraries would
        misread.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise UserError(f"{option(name)} is {path}; only a local or mounted folder can be used")
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{option(name)} is {path}, and {error}; give the whole path") from error
    absolute = path.absolute()
    if os.fsencode(absolute) != str(absolute).encode(errors="replace"):
        raise UserError(f"{option(name)} is {str(path)!r}, which is not UTF-8; choose another")
    return path


def show_choices(dataset: str) -> None:
    """Prints a line about each choice, wrapped in a terminal; of models, the size for `dataset`."""
    of = DATASETS[dataset]

    def parameters(name: str) -> int:
        make, sizes = MODELS[name].make, {"num_classes": of.num_classes, "channels": len(of.mean)}
        network = nnx.eval_shape(lambda: make(**sizes, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))

    more = {name: f"; {parameters(name):,} parameters for {of.label}" for name in MODELS} | {
        name: f"; {data.num_train:,} training images of {data.image_size}x{data.image_size} "
        f"pixels, {data.num_classes} classes"
        for name, data in DATASETS.items()
    }
    choices: dict[str, Any] = {"dataset": DATASETS, "model": MODELS}
    choices |= {"method": METHODS, "optimizer": OPTIMIZERS}
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for kind, specs in choices.items():
        print(option(kind))
        for name, spec in specs.items():
            start = f"  {name:{max(map(len, specs))}}  "
            text = f"{start}{spec.label}: {spec.description}{more.get(name, '')}"
            print(textwrap.fill(text, width, subsequent_indent=" " * len(start)))
