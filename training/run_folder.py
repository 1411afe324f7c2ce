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
from training import UserError, plots
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
    """Keeps other processes out of a folder, as a context manager.

    The kernel holds the lock, and releases it when the process ends, however that happens; programs
    that the process starts do not inherit it. A process that holds it may enter it again. On a
    file system without locks, a warning is printed and no process is kept out.

    Args:
      folder: created if it is missing. The file `run.lock` in it names the owner.

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
        yield
        return
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
        now = Path(os.readlink(link)) if os.path.islink(link) else Path()
        if not self.is_at(now):
            raise FileNotFoundError(f"{path} was moved or removed {during}; resume where it is now")
        raise FileNotFoundError(
            f"{path} was moved to {now} {during}; the finished part is there: resume with: "
            f"python train.py --resume --out {shlex.quote(str(now))}"
        )


class RunFolder:
    """The files of one run, as a context manager that draws the pictures at exit.

    No other process can enter it meanwhile. In a run of several processes, only the first one has
    any files.

    Args:
      experiment: what is trained.
      launch: how; the folder `out` is created, or with `resume` goes on.
      dataset: what it trains on.

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
        self._trackers: list[TensorBoard | WeightsAndBiases] = []
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
            self._held = stack.pop_all()
        return self

    def begin(self, epochs: int, say: Callable[[str], None]) -> None:
        """Opens the records, and keeps the first `epochs` of those that are there.

        Args:
          epochs: those before the checkpoint that the run resumes from.
          say: is told about records of later epochs, which are made again.

        Raises:
          RecordError: if the records of these epochs are not all there, or there are more of them
            than epochs before any checkpoint.
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
            self._trackers.append(TensorBoard(self.path / "tensorboard", epochs))
        if self._launch.wandb:
            self._trackers.append(WeightsAndBiases(self.path, self._experiment))

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
            for tracker in self._trackers:
                tracker.write(record)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # After another error, do not report pictures that cannot be written.
        with self._held, contextlib.suppress(OSError) if error else _explained(self.path):
            for tracker in self._trackers:
                tracker.close(failed=error is not None)
            if self.records and self._opened.is_at(self.path):
                curves, gradients, layers = (self.path / name for name in PICTURES)
                plots.plot_curves(self.records, self._experiment, self._title, curves)
                plots.plot_gradients(self.records, self._title, gradients)
                plots.plot_layer_map(self.records, self._title, layers)

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

    @property
    def _title(self) -> str:
        it = self._experiment
        optimizer, method = OPTIMIZERS[it.optimizer].label, METHODS[it.method].label
        chain = optimizer if it.method == "none" else f"{method} before {optimizer}"
        return f"{chain}: {MODELS[it.model].label} on {DATASETS[it.dataset].label}, seed {it.seed}"

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
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "free some space and resume with --resume"
            if full
            else "choose another folder with --out"
        )
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


class TensorBoard:
    """The scalars of each epoch, as TensorBoard's event files.

    Args:
      folder: where the files are; created where it is missing.
      epochs: those that the run has completed. What the files hold of later ones is hidden.
    """

    def __init__(self, folder: Path, epochs: int):
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names, whatever the clock said.
        number = len(list(folder.iterdir()))
        # `SummaryWriter` writes in a thread, which a full disk ends, and waits for it for ever.
        self._writer = EventsWriter(str(folder / f"{number:04}"))
        hide_later = SessionLog(status=SessionLog.START)
        self._writer.write_event(
            Event(wall_time=time.time(), step=epochs + 1, session_log=hide_later)
        )

    def write(self, record: Record) -> None:
        """Adds an epoch."""
        values = [
            value
            for name, scalar in _scalars(record).items()
            for value in summary.scalar(name, scalar).value
        ]
        self._writer.write_event(
            Event(wall_time=time.time(), step=record["epoch"], summary=Summary(value=values))
        )
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Closes the files, whether the run has failed or not."""
        del failed
        self._writer.close()


class WeightsAndBiases:
    """Scalars of each epoch, as a run in Weights & Biases.

    Args:
      folder: that of the run.
      experiment: what is trained.

    Raises:
      OSError: if the service cannot be used.
    """

    def __init__(self, folder: Path, experiment: Experiment):
        wandb: Any = importlib.import_module("wandb")
        known = folder / "wandb_id"  # so that a finished run can go on, offline as well
        if not known.exists():
            known.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project="optax-autoscale",
                name=folder.name,
                dir=folder,
                config=dataclasses.asdict(experiment),
                id=known.read_text(),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise OSError(
                f"Weights & Biases cannot be used: {error}; log in with `wandb login`, set "
                "WANDB_MODE=offline, or resume without --wandb"
            ) from error

    def write(self, record: Record) -> None:
        """Adds an epoch."""
        self._run.log(_scalars(record), step=record["epoch"])

    def close(self, *, failed: bool) -> None:
        """Ends the run, as a failed one or not."""
        self._run.finish(exit_code=int(failed))


def _scalars(record: Record) -> dict[str, float]:
    """A record under TensorBoard's names, without entries that are None."""
    scalars = {
        "train/loss": record["train_loss"],
        "train/learning_rate": record["learning_rate"],
        "train/images_per_second": record["images_per_second"],
        "test/loss": record["test_loss"],
        "test/accuracy": record["test_accuracy"],
        "autoscale/global_std": record["global_std"],
        "autoscale/scale_factor": record["scale_factor"],
        "autoscale/exponent": record["exponent"],
        "effect/update_norm_ratio": record["update_norm_ratio"],
        "effect/update_cosine": record["update_cosine"],
    } | {f"layer_std/{path}": std for path, std in record["layer_std"].items()}
    return {name: value for name, value in scalars.items() if value is not None}
