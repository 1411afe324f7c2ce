"""The parts of a training run."""

import errno
import os


class UserError(ValueError):
    """An error that is the user's to solve; its message says what is wrong, and what to do."""


def is_full(error: Exception) -> bool:
    """Whether an error means a full disk; some libraries say so only in the message."""
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
