"""Requests to a run from outside: stop, or write a checkpoint."""

import shlex
import signal
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from training.devices import by_batch, exit_at_once, is_first_process, put, replicated


class Request(NamedTuple):
    """What all processes of a run are to do after a step."""

    save: int  # 1 to write a checkpoint, else 0
    signal: int  # the number of the signal to stop at, 0 for none


class Interrupted(BaseException):
    """The run was stopped by a signal, after it had written a checkpoint."""

    def __init__(self, signal_number: int, step: int, folder: Path):
        super().__init__(
            f"{signal.Signals(signal_number).name}: stopped after step {step}, which a checkpoint "
            f"holds; resume with: python train.py --resume --out {shlex.quote(str(folder))}"
        )
        self.exit_code = 128 + signal_number


class Requests:
    """Listens for SIGINT and SIGTERM while it is entered; a second SIGINT ends the process at once.

    Args:
      mesh: the devices of the run. All processes must act on a request at the same step, so
        requests are reduced over the devices.
      checkpoint_minutes: the time between requests to save.
    """

    def __init__(self, mesh: Mesh, checkpoint_minutes: float):
        self._mesh = mesh
        self._interval = 60 * checkpoint_minutes
        self._signal = 0
        self._largest = jax.jit(partial(jnp.max, axis=0), out_shardings=replicated(mesh))

    def __enter__(self) -> Self:
        self._asked = time.monotonic()
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def next(self) -> Any:
        """A `Request`'s two numbers; on the devices, if there are several processes."""
        due = is_first_process() and time.monotonic() - self._asked > self._interval
        if due:
            self._asked = time.monotonic()
        request = Request(due, self._signal)
        if jax.process_count() == 1:
            return request
        of_all = np.full((self._mesh.size, 2), request, np.int32)
        return self._largest(put(of_all, by_batch(self._mesh)))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            exit_at_once(128 + number)
        self._signal = number
