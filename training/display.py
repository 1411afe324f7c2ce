"""What a run shows: a table and a live view in a terminal, plain lines elsewhere."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from training.options import Experiment
from training.record import Record

PLAIN_INTERVAL = 30.0  # seconds between lines within an epoch, where there is no terminal
WIDTH = 44  # columns of the bars, and of the curves below them


class Display:
    """A live view of a run, as a context manager; `quiet` shows nothing.

    The time left is estimated with an evaluation that takes as long as `evaluation` steps.
    """

    def __init__(
        self, experiment: Experiment, steps_per_epoch: int, evaluation: float, quiet: bool = False
    ):
        self._epochs = experiment.epochs
        self._batch_size = experiment.batch_size
        self._steps_per_epoch = steps_per_epoch
        self._steps = experiment.epochs * steps_per_epoch
        self._evaluation = evaluation
        self._done = 0
        self._effect = experiment.effect
        self._validation = experiment.validation_size > 0
        self._curves = {
            name: Curve() for name in ("loss", "gradient std", "scale factor", "norm ratio")
        }
        self._console = Console(soft_wrap=True, highlight=False, quiet=quiet)
        self._is_live = self._console.is_interactive and not quiet
        unicode = self._console.encoding.startswith("utf")
        self._levels = "▁▂▃▄▅▆▇█" if unicode else "_.-:=+*#"
        self._spinner = "dots" if unicode else "line"
        most = max(steps_per_epoch, self._epochs)
        self._label = Column(width=max(14, len(f"epoch {most}/{most}")), no_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}", table_column=self._label),
            BarColumn(WIDTH),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            speed_estimate_period=math.inf,  # the mean over the last 1,000 steps
            get_time=time.monotonic,
        )
        self._live = Live(console=self._console, get_renderable=self._view)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Prints a line above the live view."""
        self._console.print(text, style=style, markup=False)

    @contextlib.contextmanager
    def compiling(self, text: str) -> Iterator[None]:
        """Prints a line, and that the program is being compiled; in a terminal, for how long."""
        self.say(f"{text}, compiling ...")
        spinner = Progress(
            SpinnerColumn(self._spinner),
            TextColumn("compiling"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        spinner.add_task("")
        with spinner if self._is_live else contextlib.nullcontext():
            yield

    def start(self, step: int, records: Sequence[Record]) -> None:
        """Starts the clock, after these steps and epochs, and the table that `epoch` adds to."""
        for record in records:
            first = record["step"] - self._steps_per_epoch + 1
            keys = ("train_loss", "global_std", "scale_factor", "update_norm_ratio")
            self._add(first, *(record[key] for key in keys))
        self._done = step
        # In units of a step, so that the speed and the time left count the evaluations too.
        total = self._completed(self._steps, self._epochs)
        self._run = self._progress.add_task("epoch", total=total, note="")
        self._progress.update(self._run, completed=self._completed(step, len(records)))
        self._epoch = self._progress.add_task("step", total=self._steps_per_epoch, note="")
        self._evaluating = self._progress.add_task("evaluating", total=None, visible=False, note="")
        self._last_line = time.monotonic()
        validation = "validation  " if self._validation else ""
        header = f"epoch  train loss  {validation}test loss  accuracy  grad std   scale  "
        last = "ratio  cosine" if self._effect else "images/s"
        self.say(f"{header}{last}     left", "bold")
        if self._is_live:
            self._live.start()

    def step(
        self,
        step: int,
        loss: float,
        global_std: float,
        scale_factor: float | None,
        norm_ratio: float | None = None,
    ) -> None:
        """Shows that step `step` of the run is done, and what it measured."""
        self._done = step
        epoch, in_epoch = divmod(step - 1, self._steps_per_epoch)
        if in_epoch == 0:
            self._progress.reset(self._epoch)
        self._progress.update(self._run, completed=self._completed(step, epoch))
        self._progress.update(self._epoch, completed=in_epoch + 1)
        speed = self._progress.tasks[self._epoch].speed
        self._progress.update(
            self._run,
            description=f"epoch {epoch + 1}/{self._epochs}",
            note=f"{self._left()} left",
        )
        self._progress.update(
            self._epoch,
            description=f"step {in_epoch + 1}/{self._steps_per_epoch}",
            note=f"{speed * self._batch_size:.0f} images/s" if speed else "",
        )
        self._add(step, loss, global_std, scale_factor, norm_ratio)
        if self._is_due():
            measured = "  ".join(f"{name} {text}" for name, text in self._latest().items())
            self.say(
                f"epoch {epoch + 1}, step {step}/{self._steps}: {measured}  {self._left()} left"
            )

    def evaluating(self, images: int) -> None:
        """Shows that these many images are evaluated, until `epoch` is called."""
        self._progress.update(self._epoch, visible=False)
        self._progress.reset(self._evaluating, visible=True, total=images, note="")
        self._images, self._evaluated = images, 0

    def evaluated(self, images: int) -> None:
        """Shows that these many more images are evaluated."""
        self._evaluated += images
        note, epoch = (
            f"{self._evaluated}/{self._images} images",
            self._done // self._steps_per_epoch,
        )
        self._progress.update(self._evaluating, completed=self._evaluated, note=note)
        evaluations = epoch - 1 + self._evaluated / self._images
        self._progress.update(self._run, completed=self._completed(self._done, evaluations))
        if self._is_due():
            self.say(f"epoch {epoch}, evaluating: {note}  {self._left()} left")

    def epoch(self, record: Record) -> None:
        """Adds a finished epoch to the table."""
        self._progress.update(self._evaluating, visible=False)
        self._progress.update(self._epoch, visible=True)
        self._progress.update(self._run, completed=self._completed(record["step"], record["epoch"]))
        scale = record["scale_factor"]
        validation = f"{record['validation_loss']:10.4f}  " if self._validation else ""
        last = (
            f"{record['update_norm_ratio']:5.3f}  {record['update_cosine']:6.3f}"
            if self._effect
            else f"{record['images_per_second']:8.0f}"
        )
        self.say(
            f"{record['epoch']:5}  {record['train_loss']:10.4f}  {validation}"
            f"{record['test_loss']:9.4f}  "
            f"{record['test_accuracy']:8.2%}  {record['global_std']:8.2e}  "
            f"{'-' if scale is None else format(scale, '.4f'):>6}  {last}  "
            f"{self._left():>7}"
        )
        self._last_line = time.monotonic()

    def _is_due(self) -> bool:
        """Whether it is time for another line, where there is no terminal."""
        now = time.monotonic()
        if self._is_live or now - self._last_line <= PLAIN_INTERVAL:
            return False
        self._last_line = now
        return True

    def _completed(self, step: int, evaluations: float) -> float:
        return step + evaluations * self._evaluation

    def _add(self, step: int, *values: float | None) -> None:
        column = (step - 1) * WIDTH // self._steps
        for curve, value in zip(self._curves.values(), values, strict=True):
            if value is not None:
                curve.add(column, value)

    def _left(self) -> str:
        seconds = self._progress.tasks[self._run].time_remaining
        return "?" if seconds is None else str(timedelta(seconds=seconds))

    def _view(self) -> Group:
        curves = Table.grid(self._label.copy(), Column(no_wrap=True), "", padding=(0, 1))
        columns = self._done * WIDTH // self._steps
        for name, text in self._latest().items():
            curves.add_row(name, self._curves[name].draw(columns, self._levels).ljust(WIDTH), text)
        return Group(self._progress, curves)

    def _latest(self) -> dict[str, str]:
        curves = self._curves.items()
        return {name: f"{each.latest:.4g}" for name, each in curves if each.latest is not None}


class Curve:
    """A positive quantity over the course of a run, for a line of text of `WIDTH` columns."""

    def __init__(self) -> None:
        self.latest: float | None = None
        self._sums, self._counts = np.zeros(WIDTH), np.zeros(WIDTH, int)

    def add(self, column: int, value: float) -> None:
        """Adds a value to a column of the text."""
        self._sums[column] += value
        self._counts[column] += 1
        self.latest = value

    def draw(self, columns: int, levels: str) -> str:
        """The means by column on a logarithmic scale, a column without any like the one before.

        >>> curve = Curve()
        >>> for column, value in enumerate([1.0, 10.0, 1000.0]):
        ...     curve.add(2 * column, value)
        >>> curve.draw(6, "1234")
        '112244'
        """
        drawn = np.flatnonzero(self._counts[:columns])
        if not len(drawn):
            return " " * columns
        logs = np.log(np.maximum(self._sums[drawn] / self._counts[drawn], 1e-30))
        heights = np.rint((len(levels) - 1) * (logs - logs.min()) / (np.ptp(logs) or 1)).astype(int)
        before = np.searchsorted(drawn, np.arange(columns), side="right") - 1
        return "".join(" " if i < 0 else levels[heights[i]] for i in before)
