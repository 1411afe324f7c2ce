"""Studies of many runs, their tables and figures: `python reproduce.py --help`."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeAlias

import jax
import tyro
from rich.console import Console
from rich.markdown import Markdown

from reproduction import estimate, records, studies
from reproduction.figures import draw_verdict
from reproduction.presets import PRESETS
from reproduction.records import Table
from reproduction.report import count, difference, runs_section, write_report
from reproduction.studies import NO_HINT, Axes, Begun, Study
from train import NotFinite, train
from training import UserError, devices
from training.options import Experiment, Launch, local_path, recipe
from training.record import read_records
from training.run_folder import InUse, lock
from training.signals import one_line_errors

if TYPE_CHECKING:
    Preset: TypeAlias = str
else:
    Preset = Literal[tuple(PRESETS)]

MAX_HOURS = int(threading.TIMEOUT_MAX) // 3600
MAX_SEEDS = 10_000
CONTINUES = "run the same command again to continue"
PUBLISHED = Path("results")


@dataclasses.dataclass(frozen=True)
class What:
    """What is run, and reported."""

    preset: Annotated[Preset | None, NO_HINT] = None
    """A study that is fixed in the code (default: digits):
    - digits: the methods and models of the paper's Table 1, on a small data set
    - digits-rates: each method at its best learning rate, chosen by validation images
    - ablation: the method's parts, before AdamW and before SGD
    - vit: a Vision Transformer
    - vit-rates: the same, each method at its best learning rate
    - cifar100: does it help on CIFAR-100, and why; 20 epochs
    - cifar100-rates: against the learning rate and the penalty; 20 epochs
    - cifar100-length: AdamW and Adam + L2, one run each, at the paper's 200 epochs
    - paper: the paper's own scale"""
    name: Annotated[str | None, NO_HINT] = None
    """Name of a study of your own: every combination of the options below. Given again, it resumes
    the study of that name, and further values extend it."""
    runs: Annotated[tuple[Path, ...], NO_HINT] = ()
    """Folders of runs that train.py made, finished or not: the study --name reports these."""
    results: Path = Path("studies")
    """Folder with a folder per study; --preset NAME --results results extends what is published."""
    repeat: Annotated[bool, NO_HINT] = False
    """Run the study again on this device, in a folder of its own, to compare devices."""
    hours: Annotated[float | None, NO_HINT] = None
    """Stop after this many hours; the same command resumes."""
    data_dir: Annotated[Path | None, NO_HINT] = None
    """Folder of the TensorFlow Datasets, for CIFAR (default: that of train.py)."""
    dry_run: Annotated[bool, NO_HINT] = False
    """List the runs, how far each is, and the time left; train nothing."""
    report: Annotated[bool, NO_HINT] = False
    """Write the report from the records; train nothing."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Run what is missing from a study of many runs, and write its report."""

    study: What = What()
    axes: Axes = dataclasses.field(default_factory=Axes)
    experiment: Experiment = dataclasses.field(default_factory=Experiment)


def parse(args: Sequence[str] | None = None) -> Options:
    """Reads the command line; options that are not given are those of the study that was begun.

    Raises:
      ValueError: if the study's file is damaged.
    """
    args = sys.argv[1:] if args is None else args
    # Once without --help, to know which defaults it shows.
    chosen = _read([arg for arg in args if arg not in ("-h", "--help")], Options())
    what, it = chosen.study, chosen.experiment
    default = Options(experiment=recipe(it.dataset, it.optimizer))
    if what.name and (found := studies.load(local_path("results", what.results) / what.name)):
        default = Options(What(runs=found.runs), found.axes, found.experiment)
    options = _read(args, default)
    what = options.study
    what = dataclasses.replace(
        what,
        runs=tuple(local_path("runs", run) for run in what.runs),
        results=local_path("results", what.results),
        data_dir=what.data_dir and local_path("data_dir", what.data_dir),
    )
    return dataclasses.replace(options, study=what)


def _read(args: Sequence[str], default: Options) -> Options:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    return tyro.cli(Options, args=args, default=default, config=config)


def check(options: Options) -> None:
    """Raises ValueError for an impossible option, with its value and the remedy."""
    what, axes = options.study, options.axes
    for name, value, most in (("hours", what.hours, MAX_HOURS), ("seeds", axes.seeds, MAX_SEEDS)):
        if value is not None and not 0 < value <= most:
            raise UserError(f"--{name} is {value}; it must be positive, and at most {most}")
    own = dataclasses.replace(axes, seeds=None) != Axes() or options.experiment != recipe()
    if what.name is None and (own or what.runs):
        raise UserError("a study of your own needs a name: give it one with --name, such as mine")
    if what.name is not None and what.preset is not None:
        raise UserError(
            f"--preset is {what.preset} and --name is {what.name}; give one of the two: a preset's "
            "runs are fixed"
        )
    if what.name is not None and (
        not re.fullmatch(r"\w[\w.+-]*", what.name) or what.name in PRESETS
    ):
        raise UserError(
            f"--name is {what.name!r}; it names a folder, and must consist of letters, digits, "
            f"'.', '+', '-' and '_', and not be a preset: {', '.join(PRESETS)}"
        )


def study_of(options: Options) -> tuple[Study, Begun | None]:
    """The study that the options name, and what its folder keeps of a study of one's own.

    Raises:
      ValueError: if they contradict each other, or the study of that name.
    """
    what, axes, experiment = options.study, options.axes, options.experiment
    if what.name is None:
        return PRESETS[what.preset or "digits"], None
    begun = studies.load(what.results / what.name)
    if begun is None and what.report and not what.runs:
        raise UserError(f"there is no study {what.name} in {what.results}; leave out --report")
    if what.runs:
        if axes != Axes() or (begun and not begun.runs):
            raise UserError(
                f"{what.name} cannot have both --runs and runs of its own; give another --name"
            )
        runs = tuple(dict.fromkeys((*(begun.runs if begun else ()), *what.runs)))
        found = {path: records.read_folder(path).experiment for path in runs}
        return studies.of_runs(what.name, found), Begun(experiment, axes, runs)
    axes = studies.extend(what.name, begun, experiment, axes) if begun else axes
    study = studies.of_grid(what.name, experiment, axes)
    return study, Begun(experiment, axes.resolve(experiment), ())


def main() -> None:
    with one_line_errors("reproduce.py", advice=CONTINUES):
        reproduce(parse())


def reproduce(options: Options) -> None:
    """Runs and reports a study; see `What`."""
    check(options)
    what = options.study
    study, begun = study_of(options)
    experiments = list(study.experiments)
    if study.preset and options.axes.seeds is not None:
        experiments = with_seeds(experiments, options.axes.seeds)
    devices.prepare(min(experiment.batch_size for experiment in experiments))
    folder = what.results / study.name
    device = jax.devices()[0].device_kind.replace(" ", "-") if what.repeat else ""
    work = Work(experiments, folder / device, what.data_dir)
    if what.dry_run and not study.runs:
        show_progress(work)
        return
    records.table(study, folder)  # an invalid record is reported now, not after days
    held = []
    if begun:
        make_folder(folder)
        studies.save(folder, begun)
    if not what.report and not study.runs:
        make_folder(work.folder)
        with time_limit(what.hours):
            held = make_missing(work)
    for each in held:
        print(each)
    if held:
        print(
            f"{len(held)} of {len(experiments)} runs are left to other processes; run the same "
            "command again to take over what they do not finish"
        )
        if not any(work.folder.glob("*.jsonl")):
            return
    # Again if records were added meanwhile, so that the last of several processes reports all.
    seen = None
    runs: Table = None
    found: Table = None
    while (there := set(folder.rglob("*.jsonl"))) != seen:
        seen = there
        runs, found = write_report(study, folder)
    if study.preset:
        draw_verdict(what.results)
    else:
        show(study, runs, found)
    made = int((runs["state"] != "missing").sum())
    print(f"{folder / 'REPORT.md'} holds the report of {count(made, 'run')}")


def show(study: Study, runs: Table, found: Table) -> None:
    """Prints what a study of one's own found, in short."""
    if study.runs:
        Console(highlight=False).print(Markdown(runs_section(runs)))
    for _, row in found.iterrows():
        text = f"{difference(row, study.outcome)} {study.outcome.units}"
        print(f"{row['group']}: {row['label']}: {text}, {row['n']} seeds")


class Work(NamedTuple):
    """The runs that a study has, and where they are made."""

    experiments: Sequence[Experiment]
    folder: Path  # of the records
    data_dir: Path | None

    def record(self, experiment: Experiment) -> Path:
        """The record file of a finished run."""
        return self.folder / f"{experiment.name}.jsonl"

    def run(self, experiment: Experiment) -> Path:
        """The folder in which a run is trained."""
        return self.folder / "runs" / experiment.name

    def progress(self) -> tuple[list[Experiment], estimate.Rates]:
        """The runs that are missing, and how fast those are that are not.

        Raises:
          ValueError: if a record is invalid, or another's.
        """
        done = records.read(self.folder)
        for experiment in self.experiments:
            if experiment.name in done:
                records.check_same(experiment, done[experiment.name], self.record(experiment))
        missing = [each for each in self.experiments if each.name not in done]
        return missing, estimate.rates_of(done.values())

    def other_rates(self) -> estimate.Rates:
        """How fast the runs of other studies were."""
        rates: estimate.Rates = {}
        for folder in (*PUBLISHED.glob("*/"), *self.folder.parent.glob("*/")):
            with contextlib.suppress(ValueError):  # an invalid record there
                rates |= estimate.rates_of(records.read(folder).values())
        return rates


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"{folder} cannot be created: {error.strerror}; give another folder with --results"
        ) from error


def with_seeds(experiments: Sequence[Experiment], seeds: int) -> list[Experiment]:
    """The same runs with another number of seeds."""
    first: dict[Experiment, int] = {}
    for each in experiments:
        first.setdefault(dataclasses.replace(each, seed=0), each.seed)
    return [
        dataclasses.replace(kind, seed=start + number)
        for number in range(seeds)
        for kind, start in first.items()
    ]


def make_missing(work: Work) -> list[InUse]:
    """Trains what is missing, run by run, except for runs that another process holds.

    Returns:
      For each of the latter, who holds it.
    """
    rates = work.other_rates()
    while True:
        missing, here = work.progress()  # again: other processes may have finished some
        rates |= here
        held = []
        for number, experiment in enumerate(missing):
            try:
                with lock(work.run(experiment)):
                    if work.record(experiment).exists():  # since the records were read
                        continue
                    place = len(work.experiments) - len(missing) + number + 1
                    left = estimate.time_left(missing[number:], rates)
                    print(f"run {place} of {len(work.experiments)}, {left}: {experiment.name}")
                    make(experiment, work)
                    break
            except InUse as error:
                held.append(error)
        else:
            return held


def make(experiment: Experiment, work: Work) -> None:
    """Trains or resumes a run, whose folder the caller has locked, and publishes its records."""
    folder = work.run(experiment)
    begun, checkpoints = (folder / "config.json").exists(), folder / "checkpoints"
    if begun and not checkpoints.exists():  # it was finished, and its record deleted to rerun it
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    diverged = None
    try:
        train(experiment, Launch(out=folder, data_dir=work.data_dir, resume=begun))
    except NotFinite as error:  # a result as well
        diverged = str(error)
        print(diverged)
    records.publish(experiment, folder, work.record(experiment), diverged)
    shutil.rmtree(checkpoints, ignore_errors=True)
    jax.clear_caches()


def show_progress(work: Work) -> None:
    """Prints how far each run is, and the time left."""
    missing, rates = work.progress()
    for experiment in work.experiments:
        metrics, text = work.run(experiment) / "metrics.jsonl", "done"
        if experiment in missing:
            epochs = len(read_records(metrics.parent)) if metrics.exists() else 0
            text = f"{epochs}/{experiment.epochs} epochs"
        print(f"{text:>12}  {experiment.name}")
    done = len(work.experiments) - len(missing)
    left = estimate.time_left(missing, work.other_rates() | rates)
    print(f"{done} of {len(work.experiments)} done, {left}")


@contextlib.contextmanager
def time_limit(hours: float | None) -> Iterator[None]:
    """Sends this process SIGTERM when the time is up; a run writes a checkpoint first."""

    def stop(number: int, frame: FrameType | None) -> None:
        # Between two runs nothing is lost by exiting at once. An exception could be ignored: Python
        # only prints those that are raised in a finalizer or a garbage collector's callback.
        os.write(sys.stderr.fileno(), f"reproduce.py: stopped; {CONTINUES}\n".encode())
        devices.exit_at_once(128 + number)

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
