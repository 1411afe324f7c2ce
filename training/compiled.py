"""Compiled programs, kept between runs."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any, cast

import jax
import platformdirs


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next run finds them there.

    Nothing changes where a folder was chosen already, with `JAX_COMPILATION_CACHE_DIR`, or where
    the user's cannot be written. Programs may be deleted at any time. Call it before anything is
    compiled.
    """
    if cast(Any, jax.config).jax_compilation_cache_dir is not None:
        return
    # A program compiled for one type of CPU may crash on another that shares the home directory.
    folder = Path(platformdirs.user_cache_dir("optax_autoscale")) / cpu_type()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def cpu_type() -> str:
    """A name for CPUs with the same instructions."""
    description = {platform.machine(), platform.processor()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = ("model name", "flags", "CPU part", "Features")
        description |= {line for line in lines if line.startswith(names)}
    digest = hashlib.sha256("\n".join(sorted(description)).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"
