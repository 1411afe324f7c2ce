"""What a run shows: a table and a live view in a terminal, plain lines elsewhere."""

import math
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from statistics import mean, median
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from training.config import Experiment
from training.record import Record

PLAIN_INTERVAL = 30.0  # seconds between lines within an epoch, where there is no terminal
WIDTH = 44  # columns of the bar, and of the curves below it


class Display:
    """A live view of a run, to be entered as a context.

    Args:
      experiment: what is trained.
      steps_per_epoch: the number of steps in each epoch.
      evaluation: how long one takes, in steps, for a start.
      quiet: whether to show nothing.
    """

    def __init__(
        self, experiment: Experiment, steps_per_epoch: int, evaluation: float, quiet: bool = False
    ):
        self._epochs = experiment.epochs
        self._batch_size = experiment.batch_size
        self._steps_per_epoch = steps_per_epoch
        self._steps = experiment.epochs * steps_per_epoch
        self._done = 0
        self._clock = Clock(experiment.epochs, steps_per_epoch, evaluation)
        self._effect = experiment.effect
        self._curves = {
            name: Curve() for name in ("loss", "gradient std", "scale factor", "norm ratio")
        }
        self._console = Console(soft_wrap=True, highlight=False, quiet=quiet)
        self._levels = "▁▂▃▄▅▆▇█" if self._console.encoding.startswith("utf") else "_.-:=+*#"
        self._live = Live(console=self._console, get_renderable=self._view)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        """Prints a line above the live view."""
        self._console.print(text, style=style, markup=False)

    def start(self, step: int, records: Sequence[Record]) -> None:
        """Starts the clock after `step` steps, and the table that `epoch` adds to.

        Args:
          step: the number of steps that are done already.
          records: the epochs that are.
        """
        for record in records:
            first = record["step"] - self._steps_per_epoch + 1
            keys = ("train_loss", "global_std", "scale_factor", "update_norm_ratio")
            self._add(first, *(record[key] for key in keys))
        self._done = step
        self._clock.start(step)
        self._last_line = time.monotonic()
        header = "epoch  train loss  test loss  accuracy  grad std   scale  "
        last = "ratio  cosine" if self._effect else "images/s"
        self.say(f"{header}{last}     left", "bold")
        if self._console.is_terminal and not self._console.quiet:
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
        self._clock.step(step)
        self._add(step, loss, global_std, scale_factor, norm_ratio)
        now = time.monotonic()
        if not self._live.is_started and now - self._last_line > PLAIN_INTERVAL:
            self._last_line = now
            measured = "  ".join(f"{name} {text}" for name, text in self._latest().items())
            epoch = (step - 1) // self._steps_per_epoch + 1
            self.say(
                f"epoch {epoch}, step {step}/{self._steps}: {measured}  {self._clock.left()} left"
            )

    def epoch(self, record: Record) -> None:
        """Adds a finished epoch to the table."""
        scale = record["scale_factor"]
        last = (
            f"{record['update_norm_ratio']:5.3f}  {record['update_cosine']:6.3f}"
            if self._effect
            else f"{record['images_per_second']:8.0f}"
        )
        self.say(
            f"{record['epoch']:5}  {record['train_loss']:10.4f}  {record['test_loss']:9.4f}  "
            f"{record['test_accuracy']:8.2%}  {record['global_std']:8.2e}  "
            f"{'-' if scale is None else format(scale, '.4f'):>6}  {last}  "
            f"{self._clock.left():>7}"
        )
        self._last_line = time.monotonic()

    def _add(self, step: int, *values: float | None) -> None:
        column = (step - 1) * WIDTH // self._steps
        for curve, value in zip(self._curves.values(), values, strict=True):
            if value is not None:
                curve.add(column, value)

    def _view(self) -> Table:
        in_epoch = (self._done - 1) % self._steps_per_epoch + 1
        speed = self._clock.seconds_per_step and self._batch_size / self._clock.seconds_per_step
        view = Table.grid(padding=(0, 2))
        view.add_column(no_wrap=True, min_width=14)
        view.add_column(no_wrap=True)
        view.add_column(no_wrap=True, justify="right")
        view.add_row(
            f"epoch {(self._done - in_epoch) // self._steps_per_epoch + 1}/{self._epochs}",
            ProgressBar(self._steps, self._done, width=WIDTH),
            f"{self._clock.left()} left",
        )
        view.add_row(
            f"step {in_epoch}/{self._steps_per_epoch}",
            ProgressBar(self._steps_per_epoch, in_epoch, width=WIDTH),
            f"{speed:.0f} images/s" if speed else "",
        )
        columns = self._done * WIDTH // self._steps
        for name, text in self._latest().items():
            view.add_row(name, self._curves[name].draw(columns, self._levels), text)
        return view

    def _latest(self) -> dict[str, str]:
        return {
            name: f"{curve.latest:.4g}"
            for name, curve in self._curves.items()
            if curve.latest is not None
        }


class Curve:
    """A positive quantity over the course of a run, for a line of text."""

    def __init__(self) -> None:
        self.latest: float | None = None
        self._columns: dict[int, tuple[float, int]] = {}  # sum and number of the values there

    def add(self, column: int, value: float) -> None:
        """Adds a value that belongs to a column of the text."""
        total, number = self._columns.get(column, (0.0, 0))
        self._columns[column] = (total + value, number + 1)
        self.latest = value

    def draw(self, columns: int, levels: str) -> str:
        """The means by column on a logarithmic scale, a column without any like the one before.

        >>> curve = Curve()
        >>> for column, value in enumerate([1.0, 10.0, 1000.0]):
        ...     curve.add(2 * column, value)
        >>> curve.draw(6, "1234")
        '112244'
        """
        means, logs = {at: total / number for at, (total, number) in self._columns.items()}, []
        for column in range(columns):
            if column in means:
                logs.append(math.log(max(means[column], 1e-30)))
            else:
                logs.append(logs[-1] if logs else None)
        known = [log for log in logs if log is not None]
        low = min(known, default=0.0)
        height = (max(known, default=0.0) - low) or 1.0
        return "".join(
            " " if log is None else levels[round((len(levels) - 1) * (log - low) / height)]
            for log in logs
        )


class Clock:
    """Estimates how long a run will take until the end of its last epoch.

    It knows the time of a step, and of what lies between the last step of an epoch and the first
    of the next: evaluation, records and checkpoint. Until there was such a gap it takes it to be as
    long as `gap` steps.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, gap: float):
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch
        self._first_gap = gap
        self._durations: deque[float] = deque(maxlen=steps_per_epoch)
        self._gaps: deque[float] = deque(maxlen=5)
        self.seconds_per_step: float | None = None

    def start(self, step: int) -> None:
        """Starts after `step` steps."""
        self._done, self._before = step, time.monotonic()

    def step(self, step: int) -> None:
        """Notes that a step is done."""
        now = time.monotonic()
        if self.seconds_per_step and (step - 1) % self._steps_per_epoch == 0:
            self._gaps.append(now - self._before - self.seconds_per_step)
        else:
            self._durations.append(now - self._before)
            self.seconds_per_step = mean(self._durations)
        self._done, self._before = step, now

    def seconds_left(self) -> float | None:
        """The time left in seconds, None before the first step."""
        if self.seconds_per_step is None:
            return None
        steps = self._epochs * self._steps_per_epoch - self._done
        gaps = self._epochs - (self._done - 1) // self._steps_per_epoch
        gap = median(self._gaps) if self._gaps else self._first_gap * self.seconds_per_step
        seconds = steps * self.seconds_per_step + gaps * gap
        return max(0.0, seconds - (time.monotonic() - self._before))

    def left(self) -> str:
        """The time left in words."""
        seconds = self.seconds_left()
        return "?" if seconds is None else str(timedelta(seconds=round(seconds)))
