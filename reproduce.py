"""Many runs, their tables and their pictures: `python reproduce.py --help`."""

import contextlib
import dataclasses
import os
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, TypeAlias

import jax
import tyro

from reproduction import studies
from reproduction.report import write_report
from reproduction.studies import STUDIES, Run
from reproduction.verdict import read_all, write_verdict
from train import NotFinite, train
from training import cpu, output
from training.checkpoints import CheckpointError
from training.compiled import keep_compiled
from training.config import Experiment, Launch, check_path
from training.devices import exit_at_once
from training.interruption import Interrupted
from training.lock import InUse, lock
from training.record import read_records

if TYPE_CHECKING:
    Preset: TypeAlias = str
else:
    Preset = Literal[tuple(STUDIES)]

MAX_HOURS = int(threading.TIMEOUT_MAX) // 3600
MAX_SEEDS = 10_000
CONTINUES = "the same command continues"
RUNS = Path("runs")  # what is under way: checkpoints, pictures, parameters


@dataclasses.dataclass(frozen=True)
class Options:
    """Runs what is missing from a study, and reports on what is there."""

    preset: Preset = "digits"
    """The study. digits: the methods and models of the paper's Table 1 on a small data set;
    ablation: the method's parts, before AdamW and SGD; vit: a Vision Transformer; cpu: CIFAR-100
    for 5 epochs; cifar100: whether it helps on CIFAR-100 and why, 20 epochs; paper: the paper's own
    scale."""
    hours: float | None = None
    """Stop after so long; the next call continues."""
    seeds: int | None = None
    """Number of seeds (default: the study's)."""
    data_dir: Path | None = None
    """Folder of TensorFlow Datasets, for CIFAR."""
    results: Path = Path("results")
    """Folder of the records and reports, one folder in it per study."""
    dry_run: bool = False
    """Show the runs, which of them are done, and how long the rest may take."""
    report: bool = False
    """Only write the report, and the verdict over all studies, from the records alone."""


def main() -> None:
    output.outlive_readers()
    options = tyro.cli(Options, description=Options.__doc__)
    try:
        reproduce(options)
    except Interrupted as error:
        print(f"reproduce.py: {error}; {CONTINUES}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"reproduce.py: {error}")


def reproduce(options: Options) -> None:
    """Does what the options say; see `Options`."""
    for name, most in (("hours", MAX_HOURS), ("seeds", MAX_SEEDS)):
        value = getattr(options, name)
        if value is not None and not 0 < value <= most:
            raise ValueError(f"--{name} is {value}; it must be positive, and at most {most}")
    check_path("results", options.results)
    Launch(data_dir=options.data_dir).validate()
    folder = options.results / options.preset
    experiments = STUDIES[options.preset].experiments(options.seeds)
    if options.dry_run:
        show_progress(experiments, options)
        return
    finished(experiments, folder)  # shows now whether all records are valid,
    read_all(options.results)  # those of the other studies, which the verdict needs, as well
    held = []
    if not options.report:
        try:  # now, and not when the first run is done
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"{folder} cannot be made: {error.strerror}; give another folder with --results"
            ) from error
        cpu.use_cores(min(experiment.batch_size for experiment in experiments))
        cpu.keep_memory()
        keep_compiled()
        with time_limit(options.hours):
            held = make_missing(experiments, options)
    for each in held:
        print(each)
    if held:
        print(
            f"{len(held)} of {len(experiments)} runs are left to other processes; the same command "
            "takes over what they do not finish"
        )
        if not any(folder.glob("*.jsonl")):
            return
    # Again if records came while it was written: so the last report of several processes has all.
    seen = None
    while (records := set(options.results.glob("*/*.jsonl"))) != seen:
        seen = records
        write_report(options.preset, folder)
        write_verdict(options.results)
    count = sum(path.parent == folder for path in records)
    print(f"{folder / 'REPORT.md'} holds the report of {count} runs")


def finished(experiments: Sequence[Experiment], folder: Path) -> dict[str, Run]:
    """The runs that are done, by name.

    Raises:
      ValueError: if a record is invalid, or of another recipe.
    """
    done = studies.read(folder)
    for experiment in experiments:
        check_same(experiment, done, folder)
    return done


def make_missing(experiments: Sequence[Experiment], options: Options) -> list[InUse]:
    """Makes one run after the other of those that are missing and that no other process holds.

    Returns:
      Who holds the others.
    """
    folder = options.results / options.preset
    while True:
        done = finished(experiments, folder)  # read again: others may have made some
        missing = [experiment for experiment in experiments if experiment.name not in done]
        held = []
        for number, experiment in enumerate(missing):
            try:
                with lock(folder_of(experiment, options)):
                    if path_of(experiment, options).exists():  # made since the records were read
                        continue
                    print(
                        f"run {len(experiments) - len(missing) + number + 1} of "
                        f"{len(experiments)}, {left(missing[number:], done)}: {experiment.name}"
                    )
                    run(experiment, options)
                    break
            except InUse as error:
                held.append(error)
        else:
            return held


def folder_of(experiment: Experiment, options: Options) -> Path:
    """Where a run is while it is made."""
    return RUNS / options.preset / experiment.name


def path_of(experiment: Experiment, options: Options) -> Path:
    """The record file of a run that is done."""
    return options.results / options.preset / f"{experiment.name}.jsonl"


def run(experiment: Experiment, options: Options) -> None:
    """Makes a run, or resumes it, and publishes its records; its folder is locked meanwhile."""
    folder = folder_of(experiment, options)
    begun, checkpoints = (folder / "config.json").exists(), folder / "checkpoints"
    if begun and not checkpoints.exists():  # it was done, and its record deleted to rerun it
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    diverged = None
    try:
        train(experiment, Launch(out=folder, data_dir=options.data_dir, resume=begun))
    except NotFinite as error:  # a result as well
        diverged = str(error)
        print(diverged)
    studies.publish(experiment, folder, path_of(experiment, options), diverged)
    shutil.rmtree(checkpoints, ignore_errors=True)
    jax.clear_caches()


def check_same(experiment: Experiment, done: dict[str, Run], folder: Path) -> None:
    """Raises ValueError if the run that is there under an experiment's name is another one."""
    finished = done.get(experiment.name)
    if finished and studies.same_results(finished.experiment) != studies.same_results(experiment):
        changed = [
            f"{key} is {value} there and {getattr(experiment, key)} in the study"
            for key, value in dataclasses.asdict(finished.experiment).items()
            if value != getattr(experiment, key)
        ]
        raise ValueError(
            f"{folder / experiment.name}.jsonl is of another recipe: {', '.join(changed)}; "
            "move it away, or give another folder with --results"
        )


def show_progress(experiments: Sequence[Experiment], options: Options) -> None:
    """Shows how far each run is, and what is wrong with records that are invalid."""
    done: dict[str, Run] = {}
    invalid: list[ValueError] = []
    for experiment in experiments:
        path = path_of(experiment, options)
        metrics = folder_of(experiment, options) / "metrics.jsonl"
        text = "-"
        try:
            if path.exists():
                found = {experiment.name: studies.read_run(path)}
                check_same(experiment, found, path.parent)
                done |= found
                text = "done"
            elif metrics.exists():
                text = f"{len(read_records(metrics.parent))}/{experiment.epochs} epochs"
        except ValueError as error:
            invalid.append(error)
            text = "invalid"
        print(f"{text:>12}  {experiment.name}")
    for error in invalid:
        print(error)
    missing = [experiment for experiment in experiments if experiment.name not in done]
    print(f"{len(done)} of {len(experiments)} done, {left(missing, done)}")


def left(missing: Sequence[Experiment], done: dict[str, Run]) -> str:
    """How long the missing runs may take, in words."""
    if not missing:
        return "nothing left"
    speeds: dict[str, list[float]] = {}  # seconds per unit of cost, by model
    for run in done.values():
        if run.records:
            seconds = statistics.median(record["seconds"] for record in run.records)
            speed = seconds * run.experiment.epochs / studies.cost(run.experiment)
            speeds.setdefault(run.experiment.model, []).append(speed)
    if not speeds:
        return "time left unknown until a run is done"
    other = statistics.median(speed for values in speeds.values() for speed in values)
    seconds = sum(
        studies.cost(each) * statistics.median(speeds.get(each.model, [other])) for each in missing
    )
    return f"about {timedelta(seconds=round(seconds))} left"


@contextlib.contextmanager
def time_limit(hours: float | None) -> Iterator[None]:
    """Sends this process SIGTERM when the time is up; a run then writes a checkpoint first."""

    def stop(number: int, frame: FrameType | None) -> None:
        # Between two runs nothing is lost. An exception could get lost: in a finalizer or a garbage
        # collector's callback Python prints it and goes on.
        os.write(sys.stderr.fileno(), f"reproduce.py: stopped; {CONTINUES}\n".encode())
        exit_at_once(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    timer = None
    if hours is not None:
        timer = threading.Timer(3600 * hours, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer:
            timer.cancel()
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
