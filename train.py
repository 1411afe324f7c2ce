"""One training run, from the command line: `python train.py --help`."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from models import MODELS
from training import data, steps
from training.config import Config, parse
from training.display import Display
from training.optimizers import learning_rate_schedule, make_optimizer
from training.record import Record
from training.run_folder import RunFolder

EVAL_BATCH = 500
AHEAD = 4  # steps that the host has handed to the device before it looks at the oldest one's loss


class NotFinite(ArithmeticError):
    """A step's loss or gradient is NaN or infinite."""


def train(config: Config) -> list[Record]:
    """Trains as `config` says and writes the results to `config.folder`.

    Returns:
      The records of all epochs.

    Raises:
      ValueError: for an impossible option, or data that cannot be had.
      FileExistsError: if the folder is in use.
      NotFinite: at a NaN or infinite loss or gradient. What was written until then stays.
    """
    config.validate()
    dataset = data.load(
        config.dataset, config.data_dir, train_size=config.train_size, seed=config.seed
    )
    steps_per_epoch = len(dataset.train_labels) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"--batch-size is {config.batch_size}, more than the {len(dataset.train_labels)} "
            "training images; choose a smaller one"
        )
    folder = RunFolder(config, dataset)

    model = MODELS[config.model](
        num_classes=dataset.num_classes,
        channels=dataset.train_images.shape[-1],
        dtype=config.precision,
        rngs=nnx.Rngs(config.seed),
    )
    tx = make_optimizer(config, steps_per_epoch)
    learning_rate = learning_rate_schedule(config, steps_per_epoch)
    state = steps.init_state(model, tx)
    train_data = jax.device_put((dataset.train_images, dataset.train_labels))
    test_data = jax.device_put((dataset.test_images, dataset.test_labels))
    epoch_order = steps.make_epoch_order(config, len(dataset.train_labels))
    train_step = jax.jit(steps.make_train_step(model, tx, config, dataset), donate_argnums=0)
    eval_step = jax.jit(steps.make_eval_step(model, dataset, EVAL_BATCH))

    with contextlib.closing(folder), Display(config, steps_per_epoch) as display:
        display.say(f"{folder.path}: {jax.devices()[0].device_kind}, compiling ...")
        train_step = train_step.lower(state, *train_data, epoch_order(1)).compile()
        eval_step = eval_step.lower(state, *test_data, np.int32(0)).compile()
        display.start()

        for epoch in range(1, config.epochs + 1):
            start = time.perf_counter()
            order = epoch_order(epoch)
            pending: deque[tuple[int, tuple[jax.Array, jax.Array]]] = deque()
            for step in range((epoch - 1) * steps_per_epoch + 1, epoch * steps_per_epoch + 1):
                state, measured = train_step(state, *train_data, order)
                pending.append((step, measured))
                if len(pending) > AHEAD:
                    look_at(pending.popleft(), display)
            while pending:
                look_at(pending.popleft(), display)
            trained = time.perf_counter()

            test_loss, test_accuracy = evaluate(eval_step, state, test_data)
            if not np.isfinite(test_loss):
                raise NotFinite(
                    f"after step {epoch * steps_per_epoch}: the test loss is {test_loss}"
                )
            record = Record(
                epoch=epoch,
                step=epoch * steps_per_epoch,
                test_loss=test_loss,
                test_accuracy=test_accuracy,
                learning_rate=np.asarray(learning_rate((epoch - 1) * steps_per_epoch)).item(),
                **steps.epoch_means(state, model, steps_per_epoch),
                images_per_second=steps_per_epoch * config.batch_size / (trained - start),
                seconds=time.perf_counter() - start,
            )
            folder.write(record)
            display.epoch(record)

        folder.save_model(nnx.merge_state(state.params, state.batch_stats))
        display.say(f"{folder.path} holds the records, the pictures and the parameters")
    return folder.records


def look_at(dispatched: tuple[int, tuple[jax.Array, jax.Array]], display: Display) -> None:
    """Shows a step that was handed to the device a while ago, and stops the run if it failed."""
    step, measured = dispatched
    loss, global_std = map(float, measured)
    if not np.isfinite([loss, global_std]).all():
        raise NotFinite(
            f"step {step}: the training loss is {loss} and the gradients' standard deviation is "
            f"{global_std}; the finished epochs are kept. A smaller --learning-rate may help"
        )
    display.step(step, loss)


def evaluate(
    eval_step: Callable[..., Any], state: steps.TrainState, test_data: tuple[jax.Array, jax.Array]
) -> tuple[float, float]:
    """The mean loss and the accuracy over all test images, each counted once."""
    num_images = len(test_data[1])
    sums = [
        eval_step(state, *test_data, np.int32(first)) for first in range(0, num_images, EVAL_BATCH)
    ]
    loss, correct = np.sum(jax.device_get(sums), axis=0) / num_images
    return float(loss), float(correct)


def main() -> None:
    config = parse()
    try:
        train(config)
    except (ValueError, OSError, NotFinite) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
