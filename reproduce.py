"""Studies of many runs, their tables and figures: `python reproduce.py --help`."""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import jax
import tyro
from training.compiled import keep_compiled
from training.config import Experiment, Launch, check_path
from training.interruption import Interrupted
from training.lock import InUse, lock

from reproduction import estimate, studies
from reproduction.report import write_report
from reproduction.studies import STUDIES, Run
from reproduction.verdict import read_all, write_verdict
from train import NotFinite, train
from training import cpu, output
from training.checkpoints import CheckpointError
from training.devices import exit_at_once
from training.record import read_records

if TYPE_CHECKING:
    Preset: TypeAlias = str
else:
    Preset = Literal[tuple(STUDIES)]

MAX_HOURS = int(threading.TIMEOUT_MAX) // 3600
MAX_SEEDS = 10_000
CONTINUES = "run the same command again to continue"
RUNS = Path("runs")  # of runs in progress: checkpoints, pictures, parameters


NO_HINT = tyro.conf.arg(help_behavior_hint="")  # of a default that turns the option off


@dataclasses.dataclass(frozen=True)
class Options:
    """Run what is missing from a study, and write its report."""

    preset: Preset = "digits"
    """The study:
    - digits: the methods and models of the paper's Table 1, on a small data set
    - ablation: the method's parts, before AdamW and before SGD
    - vit: a Vision Transformer
    - cpu: CIFAR-100 for 5 epochs
    - cifar100: does it help on CIFAR-100, and why; 20 epochs
    - cifar100-gpu: the same again on one GPU
    - paper: the paper's own scale"""
    hours: Annotated[float | None, NO_HINT] = None
    """Stop after this many hours; the same command resumes."""
    seeds: Annotated[int | None, NO_HINT] = None
    """Number of seeds (default: the study's)."""
    data_dir: Annotated[Path | None, NO_HINT] = None
    """Folder of the TensorFlow Datasets, for CIFAR (default: that of train.py)."""
    results: Path = Path("results")
    """Folder of the records and reports, with one folder per study."""
    dry_run: Annotated[bool, NO_HINT] = False
    """List the runs, how far each is, and the time left; train nothing."""
    report: Annotated[bool, NO_HINT] = False
    """Write the report, and the verdict over all studies, from the records; train nothing."""


def main() -> None:
    output.outlive_readers()
    options = tyro.cli(Options, description=Options.__doc__, config=(tyro.conf.DisallowNone,))
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
    """Runs and reports a study; see `Options`."""
    for name, most in (("hours", MAX_HOURS), ("seeds", MAX_SEEDS)):
        value = getattr(options, name)
        if value is not None and not 0 < value <= most:
            raise ValueError(f"--{name} is {value}; it must be positive, and at most {most}")
    check_path("results", options.results)
    Launch(data_dir=options.data_dir).validate()
    folder = options.results / options.preset
    experiments = STUDIES[options.preset].experiments(options.seeds)
    cpu.use_cores(min(experiment.batch_size for experiment in experiments))
    cpu.keep_memory()
    keep_compiled()
    if options.dry_run:
        show_progress(experiments, options)
        return
    # An invalid record is reported now, not after days: of this study or, for the verdict, others.
    finished(experiments, folder)
    read_all(options.results)
    held = []
    if not options.report:
        try:  # now, not after the first run
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"{folder} cannot be created: {error.strerror}; give another folder with --results"
            ) from error
        with time_limit(options.hours):
            held = make_missing(experiments, options)
    for each in held:
        print(each)
    if held:
        print(
            f"{len(held)} of {len(experiments)} runs are left to other processes; run the same "
            "command again to take over what they do not finish"
        )
        if not any(folder.glob("*.jsonl")):
            return
    # Again if records were added meanwhile, so that the last of several processes reports all.
    seen = None
    while (records := set(options.results.glob("*/*.jsonl"))) != seen:
        seen = records
        write_report(options.preset, folder)
        write_verdict(options.results)
    count = sum(path.parent == folder for path in records)
    print(f"{folder / 'REPORT.md'} holds the report of {count} runs")


def finished(experiments: Sequence[Experiment], folder: Path) -> dict[str, Run]:
    """The finished runs by name.

    Raises:
      ValueError: if a record is invalid, or its recipe is not the study's.
    """
    done = studies.read(folder)
    for experiment in experiments:
        check_same(experiment, done, folder)
    return done


def make_missing(experiments: Sequence[Experiment], options: Options) -> list[InUse]:
    """Trains what is missing, run by run, except for runs that another process holds.

    Returns:
      For each of the latter, who holds it.
    """
    folder = options.results / options.preset
    while True:
        done = finished(experiments, folder)  # again: other processes may have finished some
        missing = [experiment for experiment in experiments if experiment.name not in done]
        held = []
        for number, experiment in enumerate(missing):
            try:
                with lock(folder_of(experiment, options)):
                    if path_of(experiment, options).exists():  # since the records were read
                        continue
                    print(
                        f"run {len(experiments) - len(missing) + number + 1} of "
                        f"{len(experiments)}, {left(missing[number:], options)}: {experiment.name}"
                    )
                    run(experiment, options)
                    break
            except InUse as error:
                held.append(error)
        else:
            return held


def folder_of(experiment: Experiment, options: Options) -> Path:
    """The folder in which a run is trained."""
    return RUNS / options.preset / experiment.name


def path_of(experiment: Experiment, options: Options) -> Path:
    """The record file of a finished run."""
    return options.results / options.preset / f"{experiment.name}.jsonl"


def run(experiment: Experiment, options: Options) -> None:
    """Trains or resumes a run, whose folder the caller has locked, and publishes its records."""
    folder = folder_of(experiment, options)
    begun, checkpoints = (folder / "config.json").exists(), folder / "checkpoints"
    if begun and not checkpoints.exists():  # it was finished, and its record deleted to rerun it
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
    """Raises ValueError if the record under an experiment's name has another recipe."""
    finished = done.get(experiment.name)
    if finished and studies.same_results(finished.experiment) != studies.same_results(experiment):
        changed = [
            f"{key} is {value} there and {getattr(experiment, key)} in the study"
            for key, value in dataclasses.asdict(finished.experiment).items()
            if value != getattr(experiment, key)
        ]
        raise ValueError(
            f"{folder / experiment.name}.jsonl has another recipe: {', '.join(changed)}; "
            "move it away, or choose another folder with --results"
        )


def show_progress(experiments: Sequence[Experiment], options: Options) -> None:
    """Prints how far each run is, and what is wrong with invalid records."""
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
    unknown = "time left unknown while records are invalid"
    text = unknown if invalid else left(missing, options, measure=True)
    print(f"{len(done)} of {len(experiments)} done, {text}")


def left(missing: Sequence[Experiment], options: Options, *, measure: bool = False) -> str:
    """The estimated time of the missing runs, in words; this study's own runs tell most."""
    datasets = {experiment.dataset for experiment in missing}
    rates: estimate.Rates = {}
    for study in (*STUDIES, options.preset):
        runs = studies.read(options.results / study).values()
        rates |= estimate.rates_of(run for run in runs if run.experiment.dataset in datasets)
    return estimate.time_left(missing, rates, measure=measure)


@contextlib.contextmanager
def time_limit(hours: float | None) -> Iterator[None]:
    """Sends this process SIGTERM when the time is up; a run writes a checkpoint first."""

    def stop(number: int, frame: FrameType | None) -> None:
        # Between two runs nothing is lost by exiting at once. An exception could be ignored: Python
        # only prints those that are raised in a finalizer or a garbage collector's callback.
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
