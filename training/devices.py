"""The processes, devices, cores and memory of a run, and the sharding of its arrays."""

import atexit
import contextlib
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np
import platformdirs
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from training import UserError
from training.options import Launch

T = TypeVar("T")

HEARTBEAT_SECONDS = 30  # until the processes that are left notice that one has died
SMALLEST_SHARDED = 1024  # entries; smaller arrays are not worth a gather


def prepare(batch_size: int) -> None:
    """Uses a CPU's cores well, and keeps compiled programs. Call it before JAX is used.

    Raises:
      UserError: if JAX is set to float64, in which nothing here computes.
    """
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError("JAX_ENABLE_X64 is set, and training is in float32: unset it")
    _use_cores(batch_size)
    _keep_compiled()


def _use_cores(batch_size: int) -> None:
    """Makes a CPU of several cores two devices, between which a step splits an even batch.

    With a single device, XLA leaves all cores but one idle during operations that it does not
    parallelize; more than two devices would hold as many copies of the data. A number of devices
    that is set already, by `jax_num_cpu_devices` or in `XLA_FLAGS`, is kept.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    chosen = cast(Any, jax.config).jax_num_cpu_devices != -1
    if chosen or "xla_force_host_platform_device_count" in flags:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if (cores or 1) > 1 and batch_size % 2 == 0:
        try:
            jax.config.update("jax_num_cpu_devices", 2)
        except RuntimeError:  # JAX has been used, as in a notebook
            return
        # XLA aborts once one device has waited 40 s for the other, as after the process has slept.
        timeout = "--xla_cpu_collective_call_terminate_timeout_seconds"
        if timeout not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {timeout}={24 * 3600}"


def _keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next run finds them there.

    Nothing changes where a folder was chosen already, with `JAX_COMPILATION_CACHE_DIR`, or where
    the user's cannot be written. Programs may be deleted at any time.
    """
    if cast(Any, jax.config).jax_compilation_cache_dir is not None:
        return
    # A program compiled for one type of CPU may crash on another that shares the home directory.
    cpuinfo, cpu = Path("/proc/cpuinfo"), {platform.machine(), platform.processor()}
    if cpuinfo.exists():
        names = ("model name", "flags", "CPU part", "Features")
        cpu |= {line for line in cpuinfo.read_text().splitlines() if line.startswith(names)}
    digest = hashlib.sha256("\n".join(sorted(cpu)).encode()).hexdigest()
    folder = platformdirs.user_cache_path("optax_autoscale") / f"{platform.machine()}-{digest[:12]}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # most are small


def start_processes(launch: Launch) -> None:
    """Joins the other processes of a run, given by the options or by a cluster that JAX detects."""
    options = (launch.coordinator, launch.num_processes, launch.process_id)
    try:
        jax.distributed.initialize(*options, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        # JAX's messages if there is no cluster, or if this process has used JAX already.
        alone = ("coordinator_address should be defined", "must be called before any JAX calls")
        if options != (None, None, None) or not any(text in str(error) for text in alone):
            raise
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an AssertionError without a word, for CUDA
        asked = [f"{k}={v}" for k, v in os.environ.items() if k.startswith(("JAX_P", "JAX_NUM"))]
        reason = (str(error) or "it gives no reason").splitlines()[0]
        raise UserError(
            f"JAX finds no device ({reason}); it was asked for {' '.join(asked) or 'the default'}. "
            "Unset that, or install what it needs, such as jax[cuda13] or jax[tpu]"
        ) from error
    if jax.process_count() > 1:
        explain_an_early_end()
        if not is_first_process():
            print(f"{_name()}: process 0 shows the progress", file=sys.stderr, flush=True)


def explain_an_early_end() -> None:
    """Has a small process say what to do if this one dies before it exits by itself.

    When process 0 dies, JAX aborts the others: none of their code runs any more, and the last thing
    printed would be a stack trace.
    """
    advice = (
        f"{_name()}: terminated early, most often because another process stopped; "
        "start all of them again with --resume"
    )
    watcher = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read() or sys.exit(sys.argv[1])", advice],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that Ctrl-C does not reach it
    )
    atexit.register(watcher.communicate, "exited")


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """In a run of several processes, an error prints its message and ends this one at once.

    An ordinary exit would wait for the others, which may be gone, or be waiting for this one.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        print(f"{_name()}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        exit_at_once(1)


def exit_at_once(code: int) -> NoReturn:
    """Exits immediately, without waiting for anything."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h")  # the live view has hidden the cursor
    os._exit(code)


def _name() -> str:
    return f"train.py, process {jax.process_index()} of {jax.process_count()}"


def is_first_process() -> bool:
    """Whether this process is the one that writes records and shows progress."""
    return jax.process_index() == 0


def make_mesh() -> Mesh:
    """All devices of all processes in one row, over which batches are split."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def by_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, P("data"))


def state_shardings(state: Any, mesh: Mesh, *, fsdp: bool) -> Any:
    """The sharding of each array of a state, or of its shapes: a copy of it on every device.

    With `fsdp`, large arrays are split instead, along their longest axis that the devices divide.
    """

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not fsdp or not axes or leaf.size < SMALLEST_SHARDED:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*[None] * longest, "data"))

    return jax.tree.map(sharding, state)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts an array that every process has on the devices of all of them."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def on_first_process(make: Callable[[], T]) -> T | None:
    """Calls `make` in the first process only; if it fails there, all processes fail."""
    result, error = None, None
    if is_first_process():
        try:
            result = make()
        except Exception as failure:
            error = failure
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and error is None:
            raise OSError("process 0 could not start the run; its own message says why")
    if error is not None:
        raise error
    return result
