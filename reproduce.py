"""Many runs, their tables and their pictures: `python reproduce.py --help`."""

import contextlib
import dataclasses
import os
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Literal

import jax
import tyro

from reproduction import studies
from reproduction.report import write_report
from reproduction.studies import STUDIES, Run
from train import NotFinite, train
from training import cpu
from training.checkpoints import CheckpointError
from training.config import Config
from training.interruption import Interrupted
from training.run_folder import read_records

RUNS = Path("runs")  # what is under way: checkpoints, pictures, parameters


@dataclasses.dataclass(frozen=True)
class Options:
    """Makes the runs of a study that are missing, and reports on those that are there."""

    preset: Literal["digits", "ablation", "vit", "cpu", "paper"] = "digits"
    """The study. digits: the methods and models of the paper's Table 1 on a small data set;
    ablation: the method's parts, behind AdamW and SGD; vit: a Vision Transformer; cpu: CIFAR-100
    for 5 epochs; paper: the paper's own scale."""
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
    """Only write the report, from the records alone."""


class Stopped(BaseException):
    """The time is up, or a signal came, while no run was under way."""


def main() -> None:
    options = tyro.cli(Options, description=Options.__doc__)
    try:
        reproduce(options)
    except (Interrupted, Stopped) as error:
        print(f"reproduce.py: {error or 'stopped'}; the same command continues", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 143))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"reproduce.py: {error}")


def reproduce(options: Options) -> None:
    """Does what the options say; see `Options`."""
    for name in ("hours", "seeds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; it must be positive")
    folder = options.results / options.preset
    cells = STUDIES[options.preset].cells(options.seeds)
    done = {studies.name(run.cell): run for run in studies.read(folder)}
    for cell in cells:
        check_same(cell, done, folder)
    missing = [cell for cell in cells if studies.name(cell) not in done]

    if options.dry_run:
        for cell in cells:
            print(f"{progress(cell, done, options):>12}  {studies.name(cell)}")
        print(f"{len(cells) - len(missing)} of {len(cells)} done, {left(missing, done)}")
        return
    if not options.report:
        try:  # now, and not when the first run is done
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"{folder} cannot be made: {error.strerror}; give another folder with --results"
            ) from error
        cpu.use_cores(min(cell.batch_size for cell in cells))
        cpu.keep_memory()
        jax.config.update("jax_compilation_cache_dir", str((RUNS / "compiled").absolute()))
        with time_limit(options.hours):
            for number, cell in enumerate(missing):
                print(
                    f"run {len(cells) - len(missing) + number + 1} of {len(cells)}, "
                    f"{left(missing[number:], done)}: {studies.name(cell)}"
                )
                done[studies.name(cell)] = run(cell, options)
    write_report(options.preset, folder)
    print(f"{folder / 'REPORT.md'} holds the report of {len(done)} runs")


def folder_of(cell: Config, options: Options) -> Path:
    """Where a run is while it is made."""
    return RUNS / options.preset / studies.name(cell)


def run(cell: Config, options: Options) -> Run:
    """Makes a run, or continues it, and publishes its records."""
    folder = folder_of(cell, options)
    begun = (folder / "config.json").exists()
    config = dataclasses.replace(cell, out=folder, data_dir=options.data_dir, resume=begun)
    diverged = None
    try:
        train(config)
    except NotFinite as error:  # a result as well
        diverged = str(error)
        print(diverged)
    path = options.results / options.preset / f"{studies.name(cell)}.jsonl"
    finished = studies.publish(config, path, diverged)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    jax.clear_caches()
    return finished


def check_same(cell: Config, done: dict[str, Run], folder: Path) -> None:
    """Raises ValueError if the run that is there under a cell's name is another one."""
    finished = done.get(studies.name(cell))
    if finished and finished.cell != cell:
        changed = [
            f"{key} is {value} there and {getattr(cell, key)} in the study"
            for key, value in dataclasses.asdict(finished.cell).items()
            if value != getattr(cell, key)
        ]
        raise ValueError(
            f"{folder / studies.name(cell)}.jsonl is of another recipe: {', '.join(changed)}; "
            "move it away, or give another folder with --results"
        )


def progress(cell: Config, done: dict[str, Run], options: Options) -> str:
    """How far a run is, in words."""
    if studies.name(cell) in done:
        return "done"
    records = folder_of(cell, options) / "metrics.jsonl"
    return f"{len(read_records(records.parent))}/{cell.epochs} epochs" if records.exists() else "-"


def left(missing: list[Config], done: dict[str, Run]) -> str:
    """How long the missing runs may take, in words."""
    if not missing:
        return "nothing left"
    speeds: dict[str, list[float]] = {}  # seconds per unit of cost, by model
    for run in done.values():
        if run.records:
            seconds = statistics.median(record["seconds"] for record in run.records)
            speed = seconds * run.cell.epochs / studies.cost(run.cell)
            speeds.setdefault(run.cell.model, []).append(speed)
    if not speeds:
        return "time left unknown until a run is done"
    other = statistics.median(speed for values in speeds.values() for speed in values)
    seconds = sum(
        studies.cost(cell) * statistics.median(speeds.get(cell.model, [other])) for cell in missing
    )
    return f"about {timedelta(seconds=round(seconds))} left"


@contextlib.contextmanager
def time_limit(hours: float | None) -> Iterator[None]:
    """Sends this process SIGTERM when the time is up; a run then writes a checkpoint first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

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
