"""The parts of a training run."""

import ctypes
import errno
import os
import platform


class UserError(ValueError):
    """An error that is the user's to solve; its message says what is wrong, and what to do."""


def is_full(error: Exception) -> bool:
    """Whether an error means a full disk; some libraries say so only in the message."""
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def _keep_memory() -> None:
    """Keeps freed memory for the next step, if the C library is glibc.

    XLA allocates the temporary arrays of a step at its start and frees them at its end. glibc would
    return blocks of that size to the system, which then fills every page with zeros again.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # The options' numbers are those of malloc.h. Other arenas would map their large blocks anyway.
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    libc.mallopt(m_arena_max, 1)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)


# Before a library starts a thread that allocates, as pyarrow does, and Matplotlib in its first run:
# it would get an arena of its own, and XLA's threads would share it.
_keep_memory()
