"""A folder in use, which should stay where it is."""

import os
import shlex
from pathlib import Path


class OpenFolder:
    """Detects that a folder was moved, removed or replaced.

    Args:
      path: the folder; it exists.
    """

    def __init__(self, path: Path):
        self.path = path
        self._absolute = path.absolute()
        # Held open, so that no new folder can get its inode number.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def is_there(self) -> bool:
        """Whether the path still leads to the folder."""
        return self._is(self._absolute)

    def check(self) -> None:
        """Raises FileNotFoundError, and says where the folder is now, unless it is still there."""
        if self.is_there():
            return
        path, during = self.path, "while the run was in progress"
        try:  # as Linux knows it
            now = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
        except OSError:
            raise FileNotFoundError(
                f"{path} was moved or removed {during}; move it back and resume with --resume"
            ) from None
        if not self._is(now):
            raise FileNotFoundError(f"{path} was removed {during}; start the run again")
        raise FileNotFoundError(
            f"{path} was moved to {now} {during}; the finished part is there: resume with: "
            f"python train.py --resume --out {shlex.quote(str(now))}"
        )

    def close(self) -> None:
        os.close(self._descriptor)

    def _is(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        except OSError:
            return False
