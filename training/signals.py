"""How a program ends: by a signal, by an error, or although nobody reads its output any more."""

import contextlib
import io
import logging
import os
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from training import UserError, is_full
from training.devices import by_batch, exit_at_once, is_first_process, put, replicated

# Ctrl-C, and what schedulers and closed terminals send. Windows has the first two.
STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
    if hasattr(signal, name)
)


class Request(NamedTuple):
    """What all processes of a run do after a step."""

    save: int  # 1 to write a checkpoint, else 0
    signal: int  # the number of the signal to stop at, 0 for none


class Interrupted(BaseException):
    """The run was stopped by a signal, after it had written a checkpoint."""

    def __init__(self, number: int, step: int, folder: Path):
        super().__init__(
            f"{signal.Signals(number).name}: stopped after step {step}, which a checkpoint holds; "
            f"resume with: python train.py --resume --out {shlex.quote(str(folder))}"
        )
        self.exit_code = 128 + number


class Requests:
    """Listens for signals to stop while it is entered; a second Ctrl-C ends the process at once.

    Until `begin` there is nothing to save, and a signal ends the process. All processes must act on
    a request at the same step, so requests are reduced over the devices of the mesh.
    """

    def __init__(self, mesh: Mesh, checkpoint_minutes: float):
        self._mesh = mesh
        self._interval = 60 * checkpoint_minutes
        self.signal = 0  # the number of the one received, 0 for none
        self._begun = False
        self._largest = jax.jit(partial(jnp.max, axis=0), out_shardings=replicated(mesh))

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._receive)
            for number in STOPPING
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT  # as by nohup
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From now on, a signal stops the run after the step that is being taken."""
        self._asked = time.monotonic()
        self._begun = True

    def next(self) -> Any:
        """A `Request`'s two numbers; on the devices, if there are several processes."""
        due = is_first_process() and time.monotonic() - self._asked > self._interval
        if due:
            self._asked = time.monotonic()
        request = Request(due, self.signal)
        if jax.process_count() == 1:
            return request
        of_all = np.full((self._mesh.size, 2), request, np.int32)
        return self._largest(put(of_all, by_batch(self._mesh)))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.signal and number == signal.SIGINT
        if not again:
            what = "stopping after this step" if self._begun else "stopped before it took a step"
            say_at_once(f"train.py: {signal.Signals(number).name}: {what}\n")
        if again or not self._begun:
            exit_at_once(128 + number)
        self.signal = number


def say_at_once(text: str) -> None:
    """Writes to the standard error, past Python's buffers: a signal handler must not wait."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def interruptible(function: Callable[[], None]) -> None:
    """Calls a function in a thread, so that signals are handled while it compiles."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(function)
        # One that arrives just before this thread waits, or in another thread, does not wake it.
        while wait([future], timeout=1).not_done:
            pass
        future.result()


@contextlib.contextmanager
def one_line_errors(program: str, *, debug: bool = False, advice: str = "") -> Iterator[None]:
    """Ends a program with one line, without a traceback, where the user can solve what is wrong.

    The line begins with the program's name, and after a signal ends with advice how to continue.
    With `debug`, every error has its traceback. See `outlive_readers` as well.
    """
    outlive_readers()
    if not debug:  # Orbax and its event loop log errors with tracebacks; they are raised as well
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except Interrupted as error:
        print(f"{program}: {error}{advice and f'; {advice}'}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, UserError | OSError):
            sys.exit(f"{program}: {error}")
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            sys.exit(
                f"{program}: out of memory ({reason}); a smaller "
                "--batch-size, --precision bfloat16 or, on several devices, --fsdp needs less. "
                "A run that has a checkpoint can be resumed"
            )
        error.add_note(f"This is a fault of {program}. Please report it, with all of these lines.")
        raise


class _Enduring(io.FileIO):
    """A file descriptor that still accepts everything once nothing can be written to it."""

    def write(self, data, /):  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            while (written := super().write(data)) is None:  # another program made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            # A full disk may have space again; a closed pipe or terminal never comes back.
            if not is_full(error):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            return len(data)


def outlive_readers() -> None:
    """Lets a program continue where its output cannot be written: `python train.py | head`.

    From then on its output is discarded; while a disk is full, until it is not. Characters that the
    encoding lacks are escaped. Streams that were replaced already, for example by a test, are left
    alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        raw = _Enduring(stream.fileno(), "w", closefd=False)
        replacement = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, replacement)
