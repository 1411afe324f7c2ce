"""What a run shows: a table and a live bar in a terminal, plain lines elsewhere."""

import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from training.config import Config
from training.record import Record

PLAIN_INTERVAL = 30.0  # seconds between lines within an epoch, where there is no terminal


class Display:
    """A live view of a run, to be entered as a context.

    Args:
      config: the run's options.
      steps_per_epoch: the number of steps in each epoch.
      quiet: whether to show nothing.
    """

    def __init__(self, config: Config, steps_per_epoch: int, quiet: bool = False):
        self._epochs = config.epochs
        self._batch_size = config.batch_size
        self._steps_per_epoch = steps_per_epoch
        self._accuracy = "-"
        self._console = Console(soft_wrap=True, highlight=False, quiet=quiet)
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(config.epochs)),
            BarColumn(bar_width=None),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=300,
            expand=True,
        )
        self._task = self._progress.add_task(
            "", total=config.epochs * steps_per_epoch, start=False, epoch=1, status=""
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text)

    def start(self, step: int) -> None:
        """Starts the clock after `step` steps, and the table that `epoch` adds to."""
        self._progress.update(self._task, completed=step)
        self._progress.start_task(self._task)
        self._last_line = time.monotonic()
        self.say(
            " epoch  train loss  test loss  accuracy  gradient std  scale factor  images/s"
            "      left"
        )

    def step(self, step: int, loss: float) -> None:
        """Shows that step `step` of the run is done, and its training loss."""
        epoch = (step - 1) // self._steps_per_epoch + 1
        speed = self._progress.tasks[0].speed
        rate = f"{speed * self._batch_size:.0f} images/s" if speed else ""
        status = f"loss {loss:.3f}  accuracy {self._accuracy}  {rate}"
        self._progress.update(self._task, completed=step, epoch=epoch, status=status)
        now = time.monotonic()
        if self._progress.disable and now - self._last_line > PLAIN_INTERVAL:
            self._last_line = now
            total = self._epochs * self._steps_per_epoch
            self.say(f"epoch {epoch}, step {step}/{total}: {status}  {self._left()} left")

    def epoch(self, record: Record) -> None:
        """Adds a finished epoch to the table."""
        self._accuracy = f"{record['test_accuracy']:.2%}"
        scale = record["scale_factor"]
        self.say(
            f"{record['epoch']:6}  {record['train_loss']:10.4f}  {record['test_loss']:9.4f}  "
            f"{self._accuracy:>8}  {record['global_std']:12.3e}  "
            f"{'-' if scale is None else format(scale, '.4f'):>12}  "
            f"{record['images_per_second']:8.0f}  {self._left():>8}"
        )
        self._last_line = time.monotonic()

    def _left(self) -> str:
        seconds = self._progress.tasks[0].time_remaining
        return "?" if seconds is None else str(timedelta(seconds=round(seconds)))
