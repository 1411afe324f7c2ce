"""One training run, from the command line: `python train.py --help`."""

import contextlib
import logging
import sys
import time
from collections import deque
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from training import cpu, data, devices
from training.checkpoints import CheckpointError, Checkpoints
from training.choices import show_choices
from training.config import Config, check_continues, parse
from training.display import Display
from training.interruption import SAVE, Interrupted, Requests
from training.program import Program
from training.record import Record
from training.run_folder import RunFolder, save_model

AHEAD = 2  # steps that the host has handed to the devices before it looks at the oldest one's loss


class NotFinite(ArithmeticError):
    """A loss or gradient is NaN or infinite."""


def train(config: Config) -> list[Record]:
    """Trains as `config` says, and writes the results to `config.folder`.

    Args:
      config: the options; with `resume`, those of the run that is continued.

    Returns:
      The records of all epochs; none in a process other than the first.

    Raises:
      ValueError: for an impossible option, or data that cannot be had.
      OSError: if the folder is in use, or cannot be written.
      CheckpointError: if a checkpoint cannot be written, or none of those there can be read.
      NotFinite: at a NaN or infinite loss or gradient. What was written until then stays.
      Interrupted: after a signal to stop, once a checkpoint is written.
    """
    config.validate()
    if config.resume:
        check_continues(config)
    dataset = data.load(
        config.dataset, config.data_dir, train_size=config.train_size, seed=config.seed
    )
    mesh = devices.make_mesh()
    program = Program(config, dataset, mesh)
    folder = devices.on_first_process(lambda: RunFolder(config, dataset))

    with contextlib.ExitStack() as stack:
        display = stack.enter_context(
            Display(config, program.steps_per_epoch, program.evaluation_steps, quiet=folder is None)
        )
        checkpoints = stack.enter_context(Checkpoints(config.folder / "checkpoints"))
        state = program.first_state()
        if config.resume:
            state = checkpoints.restore(state, display.say) or state
        done = int(state.step)
        if done > config.epochs * program.steps_per_epoch:
            raise ValueError(
                f"--epochs is {config.epochs}, and the run in {config.folder} has done "
                f"{done / program.steps_per_epoch:.3g} already; give as many or more"
            )
        if folder:
            folder.begin(done // program.steps_per_epoch)
            stack.enter_context(folder)
        display.say(f"{config.folder}: {describe(mesh)}, compiling ...")
        if not done:  # shows at once whether the folder can hold checkpoints
            checkpoints.save(0, state)
        program.compile(state)
        display.start(done, folder.records if folder else [])

        requests = stack.enter_context(Requests(mesh, config.checkpoint_minutes))
        stack.enter_context(devices.ending_together())
        for epoch in range(done // program.steps_per_epoch + 1, config.epochs + 1):
            start, first, last = time.perf_counter(), done + 1, epoch * program.steps_per_epoch
            order = program.epoch_order(np.int32(epoch))
            in_flight: deque[tuple[int, jax.Array, jax.Array, jax.Array | None, Any]] = deque()
            stop, grads = 0, None
            for done in range(first, last + 1):
                state, measured = program.train_step(state, order)
                loss, global_std, scale_factor, grads = measured
                in_flight.append((done, loss, global_std, scale_factor, requests.next()))
                request = 0
                while len(in_flight) > (AHEAD if done < last else 0):
                    request = max(request, look_at(*in_flight.popleft(), display))
                if request and done < last:
                    checkpoints.save(done, state)
                if request > SAVE:
                    stop = request
                    break
            trained = time.perf_counter()

            if done == last:
                test_loss, test_accuracy = program.evaluate(state)
                if not np.isfinite(test_loss):
                    raise NotFinite(f"after step {last}: the test loss is {test_loss}")
                means = program.epoch_means(state)
                layers = program.layer_entries(parameters=state.params, gradients=grads)
                images = (last + 1 - first) * config.batch_size
                if folder:
                    record = Record(
                        epoch=epoch,
                        step=last,
                        test_loss=test_loss,
                        test_accuracy=test_accuracy,
                        learning_rate=program.learning_rate(epoch),
                        images_per_second=images / (trained - start),
                        seconds=time.perf_counter() - start,
                        **means,
                    )
                    folder.write(record, layers)
                    display.epoch(record)
                # After the record: no checkpoint is ahead of the records.
                checkpoints.save(last, state)
            if stop:
                checkpoints.wait()
                raise Interrupted(stop, done, config.folder)

        save_model(config.folder, state.params, state.batch_stats)
        display.say(f"{config.folder} holds the records, the pictures and the parameters")
    return folder.records if folder else []


def look_at(
    step: int,
    loss: jax.Array,
    global_std: jax.Array,
    scale_factor: jax.Array | None,
    request: Any,
    display: Display,
) -> int:
    """Shows a step that was handed to the devices a while ago; returns what was requested there."""
    if not np.isfinite([float(loss), float(global_std)]).all():
        raise NotFinite(
            f"step {step}: the training loss is {loss} and the gradients' standard deviation is "
            f"{global_std}; the finished epochs are kept. A smaller --learning-rate may help"
        )
    scale = None if scale_factor is None else float(scale_factor)
    display.step(step, float(loss), float(global_std), scale)
    return int(request)


def describe(mesh: Mesh) -> str:
    """The devices of the run, in words."""
    kind = mesh.devices.flat[0].device_kind
    words = kind if mesh.size == 1 else f"{mesh.size} x {kind}"
    return words if jax.process_count() == 1 else f"{words} in {jax.process_count()} processes"


def main() -> None:
    debug = "--debug" in sys.argv
    if not debug:  # Orbax logs errors with their tracebacks, and raises them as well
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        config = parse()
        if config.list:
            return show_choices(config)
        cpu.use_cores(config.batch_size)
        cpu.keep_memory()
        devices.start_processes(config)
        train(config)
    except Interrupted as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("train.py: stopped before the first step", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, CheckpointError, NotFinite) as error:
        if debug:
            raise
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
