"""Studies of many runs: what they are made of, their records, statistics, reports and figures."""

import contextlib
import os
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import training  # noqa: F401  # which has to be imported before pandas

if missing := [name for name in ("pandas", "scipy", "statsmodels") if find_spec(name) is None]:
    raise SystemExit(
        f"studies need {', '.join(missing)}: in the clone, with pip 25.1 or newer, run "
        "`pip install --group reproduce`"
    )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, which replaces `path` atomically at the end.

    Other processes may read or write the file meanwhile. After an error, `path` is unchanged.
    """
    # No other process, on any host, writes to this name.
    part = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
