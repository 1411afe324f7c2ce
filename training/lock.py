"""The lock on the folder of a run, which one process holds at a time."""

import contextlib
import errno
import functools
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK = "run.lock"  # stays in the folder: whoever removed it might remove the next owner's
_held: set[str] = set()  # folders that this process holds


class InUse(OSError):
    """Another process holds the folder; `owner` is its process id and host, in words."""

    def __init__(self, folder: Path, owner: str):
        super().__init__(f"{folder} is in use by {owner}")
        self.owner = owner


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, to be entered as a context.

    The kernel holds the lock, and releases it when the process ends, however that happens; programs
    that the process starts do not inherit it. A process that holds it may enter it again. On a
    file system without locks, a warning is printed once and no process is kept out.

    Args:
      folder: created if it is missing. The file `run.lock` in it names the owner.

    Raises:
      InUse: if another process holds the folder.
      OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = os.path.realpath(folder)
    if name in _held:
        yield
        return
    with open(folder / LOCK, "a+", errors="replace") as file:  # truncates nothing
        try:
            if sys.platform == "win32":
                raise OSError(errno.ENOSYS, "not on Windows")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # its owner may have only just taken it
            file.seek(0)
            raise InUse(folder, file.read().strip() or "another process") from None
        except OSError as error:
            _say_unlocked(f"{error.strerror}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held.add(name)
        try:
            yield
        finally:
            _held.remove(name)
            file.truncate(0)


@functools.cache
def _say_unlocked(reason: str) -> None:
    print(
        f"the file system does not support locks ({reason}): do not let two processes use the "
        "folder of one run",
        file=sys.stderr,
    )
