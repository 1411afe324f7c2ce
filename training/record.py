"""What a run records: a line for each epoch, and where it was made."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from training import UserError

# Of `config.json` and of the record files of a study. 2: without `scale_factor_max`. 1, unwritten
# there: the method `none` was called `adamw`.
SCHEMA = 3
READABLE = (2, 3)  # schemas of records; a run can be resumed by its own only
PACKAGES = ("jax", "jaxlib", "flax", "optax", "optax-autoscale", "numpy")
ROOT = Path(__file__).parents[1]


class RecordError(UserError):
    """A file of records is missing or damaged; the message names it and what is wrong."""


class Record(TypedDict):
    """A line of `metrics.jsonl`: one epoch. Statistics are means over its steps."""

    __pydantic_config__ = ConfigDict(  # pyright: ignore[reportGeneralTypeIssues]
        extra="forbid", strict=True, allow_inf_nan=False
    )

    epoch: int  # from 1
    step: int  # steps taken by its end
    train_loss: float  # of the augmented, smoothed training batches
    test_loss: float  # cross-entropy over all test images
    test_accuracy: Annotated[float, Field(ge=0, le=1)]
    validation_loss: float | None  # likewise over the images of --validation-size; None without
    validation_accuracy: Annotated[float, Field(ge=0, le=1)] | None
    learning_rate: float
    global_std: float  # of the raw gradients, s_t of the paper
    scale_factor: float | None  # a_t; None where the method has none
    scale_factor_max: float | None  # the largest of its steps; None in records of schema 2
    exponent: int | None  # p_t at its end, 0 while undecided; None where the method has none
    layer_std: dict[str, float]  # of the raw gradients by parameter path, from input to output
    # With --effect, of the updates beside the plain optimizer's, from sums over the epoch:
    update_norm_ratio: float | None
    update_cosine: float | None
    update_norm_ratio_by_step: list[float] | None  # of each step of the first epoch; later None
    images_per_second: float  # in training
    seconds: float  # of training and evaluation


_RECORD = TypeAdapter(Record)
# Keys that older records lack; they are read as None.
_ADDED = (
    *("scale_factor_max", "update_norm_ratio", "update_cosine", "update_norm_ratio_by_step"),
    *("validation_loss", "validation_accuracy"),
)


def read_records(folder: str | os.PathLike[str]) -> list[Record]:
    """The epochs of a run; RecordError if its `metrics.jsonl` cannot be read or is damaged."""
    path = Path(folder, "metrics.jsonl")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    return parse_records(lines, path)


def parse_records(lines: Sequence[str | bytes], path: Path) -> list[Record]:
    """Records from lines of JSON: epochs 1, 2, ... once each; `path` is the file they are from.

    Keys that were added after the file was written are None.

    Raises:
      RecordError: at a line that is not the record of the next epoch.
    """
    records: list[Record] = []
    for epoch, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if isinstance(values, dict):
                values = dict.fromkeys(_ADDED) | values
            record = _RECORD.validate_python(values)
            if record["epoch"] != epoch:
                raise ValueError(f"the record of epoch {record['epoch']} stands in its place")
            if records and record["layer_std"].keys() != records[0]["layer_std"].keys():
                raise ValueError("its layers are not those of epoch 1")
        except (ValueError, RecursionError) as error:
            text = explain(error) if isinstance(error, ValidationError) else str(error)
            raise RecordError(f"{path} is damaged: epoch {epoch}: {text}") from error
        records.append(record)
    return records


def explain(error: ValidationError) -> str:
    """The first thing that is wrong with values that were read, in a few words."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "missing":
            return f"{name} is missing"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{name} is unknown"
        case _:
            message = re.sub(r"^\w+ should", "it should", first["msg"])
            return f"{name or 'the value'} is {first['input']!r}; {message}"


def environment() -> dict[str, Any]:
    """Versions, device and commit, under the names that records have for them."""
    return {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "commit": COMMIT,
    }


def commit_of(folder: Path) -> str | None:
    """The commit of the repository at a folder, with `-dirty` where the sources differ from it.

    None outside a repository and, with a line that says why, where git fails.
    """
    if not (folder / ".git").exists():  # the sources may lie in a repository that is not theirs
        return None
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch"]
    # What a study writes, its records and reports, are not sources.
    command += ["--untracked-files=no", "--", ":(exclude)results", ":(exclude)README.md"]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        print(f"the commit of {folder} will not be recorded: {reason}", file=sys.stderr)
        return None
    first, *others = done.stdout.splitlines()
    commit = first.removeprefix("# branch.oid ")
    if commit == "(initial)":
        return None
    return commit if all(line.startswith("#") for line in others) else f"{commit}-dirty"


# Read once: the code that runs is the imported one, whatever happens to its files later.
COMMIT = commit_of(ROOT)
