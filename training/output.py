"""What a program writes to its standard output and error."""

import io
import os
import sys


class _OpenEnded(io.FileIO):
    """A file descriptor that still accepts everything once the reader of its pipe has gone."""

    def write(self, data, /):  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def hide_abandoned_writes() -> None:
    """Hides the stack traces of abandoned checkpoint writes, as when their folder was moved.

    TensorStore reports to Orbax's event loop, which is closed by then; the error itself is printed
    in one line.
    """
    show = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs", /) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook


def outlive_readers() -> None:
    """Lets a program continue once the reader of its output has gone: `python train.py | head`.

    From then on its output is discarded. Characters that the encoding lacks are escaped. Streams
    that were replaced already, for example by a test, are left alone.
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
