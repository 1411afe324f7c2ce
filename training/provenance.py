"""Where a run is made: versions, device and commit."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "optax-autoscale", "numpy")


def commit_of(folder: Path) -> str | None:
    """The commit of the sources in a folder, with `-dirty` where they differ from it.

    Args:
      folder: in the working tree.

    Returns:
      The commit; None without git, or outside a repository.
    """
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # What a study writes, its records, reports and the README's verdict, are not sources.
    written = [":(exclude)results", ":(exclude)README.md"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *written)
    return (git("rev-parse", "HEAD") + ("-dirty" if changed else "")) or None


# Read once: the code that runs is the imported one, whatever happens to its files later.
COMMIT = commit_of(Path(__file__).parents[1])


def environment() -> dict[str, Any]:
    """Versions, device and commit, under the names that records have for them."""
    return {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "commit": COMMIT,
    }
