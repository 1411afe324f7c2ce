"""The records of finished runs: one file for each, and one table of all that a study has."""

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from models import MODELS
from reproduction import replacing
from reproduction.studies import Study, same_results
from training import UserError, options
from training.optimizers import METHODS, OPTIMIZERS
from training.options import Experiment, option, recipe
from training.record import READABLE, Record, RecordError, explain, parse_records, read_records

# A data frame of pandas, or a row of one, whose contents no type checker knows.
Table: TypeAlias = Any


class Description(TypedDict):
    """The first line of a record file."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    schema: Literal[READABLE]  # pyright: ignore[reportInvalidTypeForm]
    config: Experiment
    command: str  # that makes the run again
    num_classes: int
    channels: int
    versions: dict[str, str]
    device: str
    device_count: int
    commit: str | None
    diverged: str | None  # why the run stopped before its last epoch, if it did


_DESCRIPTION = TypeAdapter(Description)


class Run(NamedTuple):
    """A run with its records."""

    experiment: Experiment
    description: Mapping[str, Any]  # a `Description`
    records: list[Record]


def publish(experiment: Experiment, folder: Path, path: Path, diverged: str | None) -> None:
    """Writes a finished run's record file: a line that describes it, then its epochs.

    Args:
      experiment: the run's configuration.
      folder: the run's folder.
      path: the file; its name is the run's.
      diverged: why the run stopped before its last epoch, if it did.

    Raises:
      RecordError: if the folder lacks the records of some epochs; then nothing is written.
    """
    default = dataclasses.asdict(recipe(experiment.dataset, experiment.optimizer))
    arguments = [
        option(key) if value is True else f"{option(key)}={value}"
        for key, value in dataclasses.asdict(experiment).items()
        if key in ("dataset", "optimizer") or value != default[key]
    ]
    description = json.loads((folder / "config.json").read_text())
    del description["launch"]
    description |= {
        "command": shlex.join(["python", "train.py", *arguments]),
        "diverged": diverged,
    }
    # A run that diverged in its first epoch has no records.
    records = read_records(folder) if (folder / "metrics.jsonl").exists() else []
    if len(records) != experiment.epochs and not diverged:
        raise RecordError(
            f"{folder / 'metrics.jsonl'} has {len(records)} of {experiment.epochs} epochs; "
            f"remove {folder} to rerun"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in (description, *records)))


def read_run(path: Path) -> Run:
    """A finished run, from its record file.

    Raises:
      RecordError: if the file is not such a record, or is named after another run.
    """
    try:
        lines = path.read_bytes().splitlines() or [b""]
        description: Any = _DESCRIPTION.validate_json(lines[0])
        experiment, records = description.pop("config"), parse_records(lines[1:], path)
        missed = experiment.epochs - len(records)
        if missed < 0 or (missed > 0 and not description["diverged"]):
            raise RecordError(f"{path} has {len(records)} of {experiment.epochs} epochs")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise RecordError(
            f"{path} is not the record of a run: {explain(error)}; delete it to rerun"
        ) from error
    except RecordError as error:
        raise RecordError(f"{error}; delete it to rerun") from error
    if path.stem != experiment.name:
        raise RecordError(f"{path} is the record of {experiment.name}; move it away")
    return Run(experiment, description, records)


def read(folder: Path) -> dict[str, Run]:
    """The finished runs in a folder by name, sorted by name.

    Raises:
      RecordError: if a file is not the record of a run.
    """
    return {path.stem: read_run(path) for path in sorted(folder.glob("*.jsonl"))}


def read_folder(path: Path) -> Run:
    """A run that `train.py` made, finished or not.

    Args:
      path: its folder, or the record file of a study's run.

    Raises:
      ValueError: if there is no run, or no finished epoch; the message says what may help.
    """
    if path.is_file():
        return read_run(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give the folder of a run, such as runs/NAME")
    if not (path / "config.json").exists():
        raise UserError(
            f"{path} is not the folder of a run, since it has no config.json; give one that "
            "train.py has written"
        )
    experiment = options.load(path / "config.json")
    if not (path / "metrics.jsonl").exists() or not (records := read_records(path)):
        raise UserError(f"{path} has no finished epoch; wait for its first one, or leave it out")
    description = json.loads((path / "config.json").read_text())
    return Run(experiment, description | {"diverged": None}, records)


def check_same(experiment: Experiment, run: Run, path: Path) -> None:
    """Raises ValueError if the record under an experiment's name has another recipe."""
    if same_results(run.experiment) != same_results(experiment):
        changed = [
            f"{key} is {value} there and {getattr(experiment, key)} in the study"
            for key, value in dataclasses.asdict(run.experiment).items()
            if value != getattr(experiment, key)
        ]
        raise UserError(
            f"{path} has another recipe: {', '.join(changed)}; move it away, or choose another "
            "folder with --results"
        )


def table(study: Study, folder: Path) -> Table:
    """The runs of a study that were planned, and those that exist: a row for each.

    Records lie in the study's folder. Those of a repetition on another device lie in a folder of
    that device there, and all of the study is planned for it, too.

    Args:
      study: the study.
      folder: its folder.

    Returns:
      Rows by group, arm and seed, as reports show them. The columns are the options of the runs,
      and

      - experiment: all of the options;
      - group, arm: title and label;
      - repeat: the folder of the repetition, or "";
      - planned: whether the study has the run;
      - state: finished, diverged, unfinished, or missing;
      - accuracy, test_loss, validation_loss: after the last epoch, in percent and in nats, of runs
        that finished;
      - outcome: the one of them that the study compares;
      - chosen, at_end: whether the run has its arm's best learning rate, and whether that is an
        end of the grid; see `choose_rates`;
      - device, device_count, commit, versions, diverged: as in the record;
      - records: the list of epochs.

    Raises:
      ValueError: if a file is not the record of a run, or its recipe is not the study's.
    """
    entries: list[tuple[Experiment, Run | None, str, bool]] = []
    if study.runs:
        pairs = zip(study.experiments, map(read_folder, study.runs), strict=True)
        entries = [(experiment, run, "", True) for experiment, run in pairs]
    else:
        for repeat in ("", *sorted({path.parent.name for path in folder.glob("*/*.jsonl")})):
            found = read(folder / repeat)
            for experiment in study.experiments:
                if run := found.pop(experiment.name, None):
                    check_same(experiment, run, folder / repeat / f"{experiment.name}.jsonl")
                entries.append((experiment, run, repeat, True))
            entries += [(run.experiment, run, repeat, False) for run in found.values()]
    rows = [_row(study, *entry) for entry in entries]
    order: dict[Any, list[str]] = {
        "optimizer": list(OPTIMIZERS),
        "model": list(MODELS),
        "method": list(METHODS),
    }
    order["arm"] = list(dict.fromkeys(row["arm"] for row in rows))
    numbers = [key for key in ("learning_rate", "weight_decay") if key in study.groups]
    runs: Table = pd.DataFrame(rows).sort_values(
        ["repeat", "dataset", "optimizer", "model", *numbers, "method", "arm", "seed"],
        key=lambda column: column.map(order[column.name].index) if column.name in order else column,
        kind="stable",
        ignore_index=True,
    )
    if runs["repeat"].nunique() > 1:
        for _, there in runs.groupby("repeat"):
            devices = sorted(there["device"].dropna().unique())
            titles = [", ".join([title, *devices]) for title in there["group"]]
            runs.loc[there.index, "group"] = titles
    return choose_rates(runs.assign(outcome=runs[study.outcome.column]), waits=study.preset)


def choose_rates(runs: Table, waits: bool) -> Table:
    """Adds to a table each arm's learning rate with the lowest mean validation loss.

    Where no images validate, all learning rates are chosen. A rate at which a planned run diverged
    comes last, and of equals the smallest is chosen. If it `waits`, none is chosen while planned
    runs of the group are missing.
    """
    runs = runs.assign(chosen=True, at_end=False)
    done: Any = runs["state"].isin(("finished", "diverged")) | ~runs["planned"]
    for _, arm in runs[runs["validation_size"] > 0].groupby(["repeat", "group", "arm"]):
        here = (runs["repeat"] == arm["repeat"].iloc[0]) & (runs["group"] == arm["group"].iloc[0])
        if waits and not done[here].all():
            runs.loc[arm.index, "chosen"] = False
            continue
        losses = arm["validation_loss"].mask(arm["state"] == "diverged", math.inf)
        means = losses[arm["planned"]].groupby(arm["learning_rate"]).mean().dropna()
        if len(means) > 1:
            best = means.idxmin()
            runs.loc[arm.index, "chosen"] = arm["learning_rate"] == best
            runs.loc[arm.index, "at_end"] = best in (means.index[0], means.index[-1])
    return runs


def _row(
    study: Study, experiment: Experiment, run: Run | None, repeat: str, planned: bool
) -> dict[str, Any]:
    about, records = (run.description, run.records) if run else ({}, [])
    state = "missing" if run is None else "diverged" if about["diverged"] else "finished"
    if state == "finished" and len(records) < experiment.epochs:
        state = "unfinished"
    last: Any = records[-1] if state == "finished" else {}
    losses = {key: last.get(key) for key in ("test_loss", "validation_loss")}
    copied = ("device", "device_count", "commit", "versions", "diverged")
    return {
        **dataclasses.asdict(experiment),
        "experiment": experiment,
        "group": study.group(experiment),
        "arm": study.arm(experiment),
        "repeat": repeat,
        "planned": planned,
        "state": state,
        "accuracy": 100 * last.get("test_accuracy", np.nan),
        **{key: np.nan if loss is None else loss for key, loss in losses.items()},
        "records": records,
        **{key: about.get(key) for key in copied},
    }


def by_epoch(runs: Table, name: str) -> Table:
    """A recorded number: a row for each run, a column for each epoch from 1."""
    rows = [{record["epoch"]: record[name] for record in records} for records in runs["records"]]
    return pd.DataFrame(rows, index=runs["seed"], dtype=float).sort_index(axis=1)
