"""The folder of a run: who owns it, and what is in it."""

import contextlib
import dataclasses
import errno
import functools
import importlib
import json
import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

from models import MODELS
from training import UserError, is_full, plots
from training.data import DATASETS, Dataset
from training.optimizers import METHODS, OPTIMIZERS
from training.options import Experiment, Launch
from training.record import SCHEMA, Record, RecordError, environment, parse_records, read_records

PICTURES = ("curves.png", "gradients.png", "layers.png")
LOCK = "run.lock"  # stays in the folder: whoever removed it might remove the next owner's


class InUse(OSError):
    """Another process holds the folder; `owner` is its process id and host, in words."""

    def __init__(self, folder: Path, owner: str):
        super().__init__(f"{folder} is in use by {owner}")
        self.owner = owner


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, which is created if it is missing.

    The kernel holds the lock, and releases it when the process ends, however that happens; programs
    that the process starts do not inherit it. A process that holds it may enter it again. On a
    file system without locks, a warning is printed and no process is kept out.

    Raises:
      InUse: if another process holds the folder.
      OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK
    held = FileLock(path, blocking=False, is_singleton=True, on_acquired=_sign)
    try:
        held.acquire()
    except Timeout:
        time.sleep(0.1)  # its owner may have only just taken it
        raise InUse(folder, path.read_text().strip() or "another process") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        print(
            f"the file system of {folder} does not support locks ({error.strerror}): do not let "
            "two processes use the folder of one run",
            file=sys.stderr,
        )
    try:
        yield
    finally:
        held.release()


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


class OpenFolder:
    """A folder that is held open, to detect that it was moved, removed or replaced."""

    def __init__(self, path: Path):
        self._path = path
        self._absolute = path.absolute()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.close = functools.partial(os.close, self._descriptor)

    def is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        except OSError:
            return False

    def check(self) -> None:
        """Raises FileNotFoundError, and says where the folder is now, unless it is still there."""
        if self.is_at(self._absolute):
            return
        path, during = self._path, "while the run was in progress"
        link = f"/proc/self/fd/{self._descriptor}"  # as Linux knows it
        now = os.readlink(link) if os.path.islink(link) else ""
        if not self.is_at(Path(now)):
            raise FileNotFoundError(f"{path} was moved or removed {during}; resume where it is now")
        raise FileNotFoundError(
            f"{path} was moved to {now} {during}; resume with: "
            f"python train.py --resume --out {shlex.quote(now)}"
        )


class RunFolder:
    """The files of one run in `launch.out`, as a context manager that draws the pictures at exit.

    No other process can enter it meanwhile. In a run of several processes, only the first one has
    any files.

    Raises:
      ValueError: if `launch.wandb` is set and the package is not installed.
    """

    def __init__(self, experiment: Experiment, launch: Launch, dataset: Dataset):
        assert launch.out is not None
        self.path = launch.out
        self.records: list[Record] = []
        self._experiment = experiment
        self._launch = launch
        self._description = {
            "schema": SCHEMA,
            "config": dataclasses.asdict(experiment),
            "launch": dataclasses.asdict(launch),
            "command": shlex.join(["python", *sys.argv]),
            "num_classes": dataset.num_classes,
            "channels": dataset.train_images.shape[-1],
            "mean": dataset.mean,
            "std": dataset.std,
            "data": dataset.digest(),
            **environment(),
        }
        self._trackers: list[Callable[[Record], None]] = []
        if launch.wandb and not find_spec("wandb"):
            raise UserError(
                "--wandb needs a package that is missing: pip install wandb, or leave --wandb out"
            )

    def __enter__(self) -> Self:
        """Takes the folder.

        Raises:
          OSError: if another process holds the folder, if it cannot be written, or if it holds
            something and `launch.resume` is not set; nothing in it is touched then.
          ValueError: if the data are not those with which the run began.
        """
        new = not self._launch.resume
        if new and not (self.path / LOCK).exists():  # the lock would touch what is there
            try:
                self._check_vacant()
            except FileExistsError:
                if not (self.path / LOCK).exists():  # else another run took the folder just now
                    raise
        with contextlib.ExitStack() as stack:
            with _explained(self.path):
                stack.enter_context(lock(self.path))
                self._opened = OpenFolder(self.path)
            stack.callback(self._opened.close)
            if new:  # looked at under the lock: of two runs that start at once, one wins
                self._check_vacant()
                self._save_config()
            else:
                self._check_data()
            stack.push(self._draw)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._held.__exit__(*exception)

    def begin(self, epochs: int, say: Callable[[str], None]) -> None:
        """Opens the records, and keeps those of the epochs before the checkpoint.

        Those of later epochs are made again; `say` is told about them.

        Raises:
          RecordError: if the records of these epochs are not all there, or there are some of
            several epochs and no checkpoint.
        """
        path = self.path / "metrics.jsonl"
        with _explained(path):
            lines = path.read_bytes().splitlines() if path.exists() else []
        # The record of the first epoch may be written before the first checkpoint is.
        if len(lines) > 1 and not any((self.path / "checkpoints").glob("[0-9]*")):
            raise RecordError(
                f"{path} holds {len(lines)} epochs, and there is no checkpoint to resume from; "
                "copy the run's checkpoints/ here, or start it again with another --out"
            )
        try:
            records = parse_records(lines[:epochs], path)
            if len(lines) < epochs:
                raise RecordError(f"{path} holds {len(lines)} epochs")
        except RecordError as error:
            raise RecordError(
                f"{error}; the checkpoint is after epoch {epochs}, and needs the records of all "
                "epochs until then. Put back a copy of the file, or start the run again with "
                "another --out"
            ) from error
        self.records = records
        if len(lines) > epochs:
            say(
                f"training resumes with epoch {epochs + 1}: the records from there to epoch "
                f"{len(lines)} in {path} are replaced"
            )
        if lines:
            self._replace(path, b"".join(line + b"\n" for line in lines[:epochs]))
        self._save_config()
        with _explained(self.path):
            trackers = [tensorboard(self.path / "tensorboard", epochs)]
            if self._launch.wandb:
                trackers.append(weights_and_biases(self.path, self._experiment))
            self._trackers = [self._held.enter_context(tracker) for tracker in trackers]

    def write(self, record: Record) -> None:
        """Adds an epoch to all records."""
        self._opened.check()
        path = self.path / "metrics.jsonl"
        line = json.dumps({name: record[name] for name in Record.__annotations__}) + "\n"
        with _explained(path), open(path, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        with _explained(self.path):
            for track in self._trackers:
                track(record)

    def _draw(self, kind: object, error: object, traceback: object) -> None:
        # After another error, do not report pictures that cannot be written.
        with contextlib.suppress(OSError) if error else _explained(self.path):
            if self.records and self._opened.is_at(self.path):
                curves, gradients, layers = (self.path / name for name in PICTURES)
                it = self._experiment
                chain = f"{METHODS[it.method].label} before " if it.method != "none" else ""
                chain += OPTIMIZERS[it.optimizer].label
                model, data = MODELS[it.model].label, DATASETS[it.dataset].label
                title = f"{chain}: {model} on {data}, seed {it.seed}"
                plots.plot_curves(self.records, it, title, curves)
                plots.plot_gradients(self.records, title, gradients)
                plots.plot_layer_map(self.records, title, layers)

    def _check_vacant(self) -> None:
        path = self.path
        for each in (path, *path.parents):
            if each.is_symlink() and not each.exists():
                raise FileNotFoundError(
                    f"{each} is a link to {os.readlink(each)}, which does not exist; create that, "
                    "remove the link, or give another folder with --out"
                )
        if path.exists() and not (
            # Left by a process that was killed before it started.
            path.is_dir() and {each.name for each in path.iterdir()} <= {LOCK, "config.part"}
        ):
            raise FileExistsError(
                f"{path} already exists and was not changed; "
                "resume it with --resume, give another folder with --out, or remove it"
            )

    def _check_data(self) -> None:
        begun = json.loads((self.path / "config.json").read_text()).get("data")
        if begun != self._description["data"]:
            raise UserError(
                f"the images of {self._experiment.dataset} are not those with which the run in "
                f"{self.path} began; resume it with its own --data-dir"
            )

    def _save_config(self) -> None:
        text = json.dumps(self._description, indent=2, default=str) + "\n"
        self._replace(self.path / "config.json", text.encode())

    def _replace(self, path: Path, content: bytes) -> None:
        part = path.with_suffix(".part")
        with _explained(self.path):
            part.write_bytes(content)
            part.replace(path)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Adds to an OSError where it happened, and a remedy."""
    try:
        yield
    except InUse:
        raise
    except OSError as error:
        full = "free some space and resume with --resume"
        remedy = full if is_full(error) else "choose another folder with --out"
        raise type(error)(f"{path} cannot be written: {error.strerror}; {remedy}") from error


def finished_records(folder: Path, epochs: int) -> list[Record]:
    """The records of a run of `epochs` epochs that has finished; none where it has not.

    It has where all that a run ends with, parameters and pictures, is newer than the last record.
    """
    metrics = folder / "metrics.jsonl"
    try:
        last = metrics.stat().st_mtime_ns
        if any((folder / name).stat().st_mtime_ns < last for name in ("parameters", *PICTURES)):
            return []
        records = read_records(folder)
    except (OSError, RecordError):
        return []
    return records if len(records) == epochs else []


@contextlib.contextmanager
def tensorboard(folder: Path, epochs: int) -> Iterator[Callable[[Record], None]]:
    """Gives a function that adds an epoch's scalars to TensorBoard's event files.

    What these hold of epochs after the first `epochs` is hidden.
    """
    folder.mkdir(exist_ok=True)
    # TensorBoard reads files in the order of their names, whatever the clock said.
    number = len(list(folder.iterdir()))
    # `SummaryWriter` writes in a thread, which a full disk ends, and waits for it for ever.
    writer = EventsWriter(str(folder / f"{number:04}"))

    def write(step: int, **content: Any) -> None:
        writer.write_event(Event(wall_time=time.time(), step=step, **content))
        writer.flush()

    def track(record: Record) -> None:
        scalars = [summary.scalar(*item).value[0] for item in _scalars(record).items()]
        write(record["epoch"], summary=Summary(value=scalars))

    write(epochs + 1, session_log=SessionLog(status=SessionLog.START))  # hides what is later
    try:
        yield track
    finally:
        with contextlib.suppress(OSError):  # all was flushed
            writer.close()


@contextlib.contextmanager
def weights_and_biases(folder: Path, experiment: Experiment) -> Iterator[Callable[[Record], None]]:
    """Gives a function that adds an epoch's scalars to a run in Weights & Biases.

    Raises:
      ValueError: if the service cannot be used.
    """
    wandb: Any = importlib.import_module("wandb")
    known = folder / "wandb_id"  # so that a finished run can go on, offline as well
    if not known.exists():
        known.write_text(secrets.token_hex(4))
    try:
        run = wandb.init(
            project="optax-autoscale",
            name=folder.name,
            dir=folder,
            config=dataclasses.asdict(experiment),
            id=known.read_text(),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases cannot be used: {error}; log in with `wandb login`, set "
            "WANDB_MODE=offline, or resume without --wandb"
        ) from error
    failed = True
    try:
        yield lambda record: run.log(_scalars(record), step=record["epoch"])
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def _scalars(record: Record) -> dict[str, float]:
    """A record under TensorBoard's names, without entries that are None."""
    scalars = {
        "train/loss": record["train_loss"],
        "train/learning_rate": record["learning_rate"],
        "train/images_per_second": record["images_per_second"],
        "test/loss": record["test_loss"],
        "test/accuracy": record["test_accuracy"],
        "validation/loss": record["validation_loss"],
        "validation/accuracy": record["validation_accuracy"],
        "autoscale/global_std": record["global_std"],
        "autoscale/scale_factor": record["scale_factor"],
        "autoscale/exponent": record["exponent"],
        "effect/update_norm_ratio": record["update_norm_ratio"],
        "effect/update_cosine": record["update_cosine"],
    } | {f"layer_std/{path}": std for path, std in record["layer_std"].items()}
    return {name: value for name, value in scalars.items() if value is not None}
