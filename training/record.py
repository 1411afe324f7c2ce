"""The record of an epoch, and how it is read back."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

# Of `config.json` and of the record files of a study. 1, unwritten there: the method `none` was
# called `adamw`.
SCHEMA = 2


class RecordError(ValueError):
    """A file of records is missing or damaged; the message names it and what is wrong."""


class Record(TypedDict):
    """A line of `metrics.jsonl`: one epoch. Statistics are means over its steps."""

    epoch: int  # from 1
    step: int  # steps taken by its end
    train_loss: float  # of the augmented, smoothed training batches
    test_loss: float  # cross-entropy over all test images
    test_accuracy: float  # 0 to 1
    learning_rate: float
    global_std: float  # of the raw gradients, s_t of the paper
    scale_factor: float | None  # a_t; None where the method has none
    exponent: int | None  # p_t at its end, 0 while undecided; None where the method has none
    layer_std: dict[str, float]  # of the raw gradients by parameter path, from input to output
    # With --effect, of the updates beside the plain optimizer's, from sums over the epoch:
    update_norm_ratio: float | None
    update_cosine: float | None
    update_norm_ratio_by_step: list[float] | None  # of each step of the first epoch; later None
    images_per_second: float  # in training
    seconds: float  # of training and evaluation


INTEGERS = ("epoch", "step", "exponent")
OPTIONAL = ("scale_factor", "exponent")
# Keys that records of an earlier version may lack; they are read as None.
LATER = ("update_norm_ratio", "update_cosine", "update_norm_ratio_by_step")


def read_records(folder: str | os.PathLike[str]) -> list[Record]:
    """The epochs of a run, from its `metrics.jsonl`.

    Raises:
      RecordError: if the file cannot be read, or a line is not the record of the next epoch.
    """
    path = Path(folder, "metrics.jsonl")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    return parse_records(lines, path)


def parse_records(lines: Sequence[str | bytes], path: Path) -> list[Record]:
    """Records from lines of JSON: epochs 1, 2, ... once each.

    Args:
      lines: one record each.
      path: the file that they are from.

    Returns:
      The records; keys that were added after the file was written are None.

    Raises:
      RecordError: at a line that is not the record of the next epoch.
    """
    records: list[Record] = []
    for epoch, line in enumerate(lines, start=1):
        try:
            records.append(_checked(json.loads(line), epoch))
            if records[-1]["layer_std"].keys() != records[0]["layer_std"].keys():
                raise ValueError("its layers are not those of epoch 1")
        except (ValueError, OverflowError, RecursionError) as error:
            raise RecordError(f"{path} is damaged: epoch {epoch}: {error}") from error
    return records


def _checked(record: Any, epoch: int) -> Record:
    if not isinstance(record, dict):
        raise ValueError("not a record")
    record = dict.fromkeys(LATER) | record
    names = set(Record.__annotations__)
    if wrong := names.symmetric_difference(record):
        missing = sorted(names - set(record))
        raise ValueError(f"{'missing' if missing else 'unknown'}: {', '.join(missing or wrong)}")
    if not isinstance(record["layer_std"], dict):
        raise ValueError(f"layer_std is {record['layer_std']!r}, not a number for each layer")
    if record["epoch"] != epoch:
        raise ValueError(f"the record of epoch {record['epoch']} stands in its place")
    values = {name: record[name] for name in Record.__annotations__ if name != "layer_std"}
    values |= {f"layer_std of {layer}": std for layer, std in record["layer_std"].items()}
    if isinstance(by_step := values["update_norm_ratio_by_step"], list):
        del values["update_norm_ratio_by_step"]
        values |= {f"update_norm_ratio of step {i}": ratio for i, ratio in enumerate(by_step, 1)}
    for name, value in values.items():
        if value is None and name in (*OPTIONAL, *LATER):
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"{name} is {value!r}, not a finite number")
        if name in INTEGERS and not isinstance(value, int):
            raise ValueError(f"{name} is {value!r}, not an integer")
    if not 0 <= record["test_accuracy"] <= 1:
        raise ValueError(f"test_accuracy is {record['test_accuracy']}, not between 0 and 1")
    return cast(Record, {name: record[name] for name in Record.__annotations__})
