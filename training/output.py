"""Standard output and error that do not end a run when nobody reads them any more."""

import io
import os
import sys


class _OpenEnded(io.FileIO):
    """A file descriptor that accepts everything, also once the reader of its pipe has gone."""

    def write(self, data, /):  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def outlive_readers() -> None:
    """Lets a program go on when the reader of its output goes, as in `python train.py | head`.

    From then on its output goes nowhere. Characters that the encoding lacks are escaped. Streams
    that were replaced already, as by a test, stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        raw = _OpenEnded(stream.fileno(), "w", closefd=False)
        replacement = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, replacement)
