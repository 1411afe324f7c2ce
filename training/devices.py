"""The processes and devices of a run, and where its arrays lie on them."""

import atexit
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from training.config import Launch

T = TypeVar("T")

HEARTBEAT_SECONDS = 30  # until the processes that are left notice that one has died
SMALLEST_SHARDED = 1024  # entries; smaller arrays are not worth a gather


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
    """Ends this process without waiting for anything."""
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
    """Where each array of a state lies: everywhere, or split over the devices with `fsdp`.

    Args:
      state: a tree of arrays or their shapes.
      mesh: the devices.
      fsdp: whether large arrays are split, along their longest axis that the devices divide.

    Returns:
      A tree of shardings.
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
