"""One training run, from the command line: `python train.py --help`."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from training import UserError, data, devices
from training.checkpoints import Checkpoints, save_model
from training.display import Display
from training.options import Experiment, Launch, check_resumes, parse, show_choices
from training.record import Record
from training.run_folder import PICTURES, RunFolder, finished_records
from training.signals import Interrupted, Request, Requests, interruptible, one_line_errors
from training.step import Measured, Program

AHEAD = 2  # steps dispatched to the devices before the host reads the oldest one's loss


class NotFinite(UserError):
    """A loss or gradient is NaN or infinite."""


def train(experiment: Experiment, launch: Launch) -> list[Record]:
    """Trains, and writes the results to the run's folder.

    Args:
      experiment: what is trained; with `launch.resume`, that of the run in the folder.
      launch: where and on what.

    Returns:
      The records of all epochs; none in a process other than the first.

    Raises:
      ValueError: for an impossible option, or data that is unavailable.
      OSError: if the folder is in use, cannot be written, or is moved while the run is in progress.
      RecordError: if records of epochs before the checkpoint are missing or damaged.
      CheckpointError: if a checkpoint cannot be written, or none of those there can be read.
      NotFinite: at a NaN or infinite loss or gradient. What was written until then stays.
      Interrupted: after a signal to stop, once a checkpoint is written.
    """
    path = launch.out or Path("runs", experiment.name)
    if launch.resume:
        check_resumes(experiment, path)
        # Several processes might see different states of a shared filesystem.
        if jax.process_count() == 1 and (records := finished_records(path, experiment.epochs)):
            print(f"{path} has finished already; with more --epochs it is trained further")
            print(summary(path, records))
            return records
    dataset = data.load(
        experiment.dataset,
        launch.data_dir,
        train_size=experiment.train_size,
        validation_size=experiment.validation_size,
        seed=experiment.seed,
    )
    mesh = devices.make_mesh()
    program = Program(experiment, dataset, mesh, fsdp=launch.fsdp)
    train_data = program.put(dataset.train_images, dataset.train_labels)
    evaluated = {"test": program.put(dataset.test_images, dataset.test_labels)}
    if dataset.validation:
        evaluated["validation"] = program.put(*dataset.validation)

    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(Requests(mesh, launch.checkpoint_minutes))
        # Before the checkpoints, whose cleanup would remove what another process is writing.
        folder = devices.on_first_process(
            lambda: stack.enter_context(RunFolder(experiment, launch, dataset))
        )
        display = stack.enter_context(
            Display(
                experiment,
                program.steps_per_epoch,
                program.evaluation_steps,
                quiet=folder is None,
            )
        )
        checkpoints = stack.enter_context(Checkpoints(path / "checkpoints", display.say))
        state = program.first_state()
        if launch.resume:
            state = checkpoints.restore(state) or state
        done = int(state.step)
        if done > experiment.epochs * program.steps_per_epoch:
            raise UserError(
                f"--epochs is {experiment.epochs}, and the run in {path} has already completed "
                f"{done / program.steps_per_epoch:.3g}; give as many or more"
            )
        finished = done // program.steps_per_epoch
        devices.on_first_process(lambda: folder and folder.begin(finished, display.say))
        if finished < experiment.epochs:
            with display.compiling(f"{path}: {describe(mesh)}"):
                if not done:  # shows at once whether the folder can hold checkpoints
                    checkpoints.save(0, state)
                interruptible(lambda: program.compile(state, train_data, *evaluated.values()))
            display.start(done, folder.records if folder else [])

        requests.begin()
        stack.enter_context(devices.ending_together())
        for epoch in range(finished + 1, experiment.epochs + 1):
            start, first, last = time.perf_counter(), done + 1, epoch * program.steps_per_epoch
            order = program.epoch_order(np.int32(epoch))
            in_flight: deque[tuple[int, Measured, Any]] = deque()
            save, stop = False, 0
            for done in range(first, last + 1):
                state, measured = program.train_step(state, train_data, order)
                in_flight.append((done, measured, requests.next()))
                save = False
                while len(in_flight) > (AHEAD if done < last else 0):
                    step, values, requested = in_flight.popleft()
                    show(step, values, display)
                    request = Request(*map(int, requested))
                    save, stop = save or request.save > 0, max(stop, request.signal)
                save = save or stop > 0
                if save and done < last:
                    checkpoints.save(done, state)
                if stop:
                    break
            trained = time.perf_counter()

            if done == last:
                display.evaluating(sum(len(labels) for _, labels in evaluated.values()))
                found: dict[str, Any] = {"validation_loss": None, "validation_accuracy": None}
                for name, images_and_labels in evaluated.items():
                    loss, accuracy = program.evaluate(state, images_and_labels, display.evaluated)
                    if not np.isfinite(loss):
                        raise NotFinite(f"after step {last}: the {name} loss is {loss}")
                    found |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
                means = program.epoch_means(state)
                images = (last + 1 - first) * experiment.batch_size
                if folder:
                    record = Record(
                        epoch=epoch,
                        step=last,
                        learning_rate=program.learning_rate(epoch),
                        images_per_second=images / (trained - start),
                        seconds=time.perf_counter() - start,
                        **found,
                        **means,
                    )
                    folder.write(record)
                    display.epoch(record)
                # After the record: no checkpoint is ahead of the records.
                if save or epoch == experiment.epochs:
                    checkpoints.save(last, state)
            if stop:
                checkpoints.wait()
                raise Interrupted(stop, done, path)

        save_model(path, program.model(state))
    if requests.signal:  # since the last step
        raise Interrupted(requests.signal, done, path)
    if folder is None:
        return []
    display.say(summary(path, folder.records))  # after the pictures are drawn
    return folder.records


def show(step: int, measured: Measured, display: Display) -> None:
    """Shows a finished step; raises NotFinite if its loss is not finite."""
    loss, std = float(measured.loss), float(measured.global_std)
    if not np.isfinite([loss, std]).all():
        raise NotFinite(
            f"step {step}: the training loss is {loss} and the gradients' standard deviation is "
            f"{std}; the finished epochs are kept. A smaller --learning-rate may help"
        )
    scale, ratio = (
        None if value is None else float(value)
        for value in (measured.scale_factor, measured.norm_ratio)
    )
    display.step(step, loss, std, scale, ratio)


def summary(path: Path, records: Sequence[Record]) -> str:
    """How a run ended, how long it took, and where its pictures are."""
    seconds = timedelta(seconds=round(sum(record["seconds"] for record in records)))
    epochs = "1 epoch" if len(records) == 1 else f"{len(records)} epochs"
    pictures = ",".join(Path(name).stem for name in PICTURES)
    return (
        f"Test accuracy {records[-1]['test_accuracy']:.2%} after {epochs} in {seconds}\n"
        f"Pictures: {path}/{{{pictures}}}.png"
    )


def describe(mesh: Mesh) -> str:
    """The devices of the run, in words."""
    kind = mesh.devices.flat[0].device_kind
    words = kind if mesh.size == 1 else f"{mesh.size} x {kind}"
    return words if jax.process_count() == 1 else f"{words} in {jax.process_count()} processes"


def main() -> None:
    with one_line_errors("train.py", debug="--debug" in sys.argv):
        experiment, launch = parse()
        if launch.list:
            return show_choices(experiment.dataset)
        devices.prepare(experiment.batch_size)
        devices.start_processes(launch)
        train(experiment, launch)


if __name__ == "__main__":
    main()
