"""The compiled functions of a run, with its data in place on the devices."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models import MODELS
from training import devices, steps
from training.config import MAX_STEPS, Experiment, option
from training.data import Dataset
from training.layers import LayerPaths, layer_entries, layer_paths
from training.optimizers import learning_rate_schedule, make_optimizer

EVAL_BATCH = 512


class Program:
    """What a run does with its state; the same on one device and on many processes'.

    Args:
      experiment: what is trained.
      dataset: what it trains on.
      mesh: the devices.
      fsdp: whether parameters and optimizer state are sharded.

    Raises:
      ValueError: if the batches do not fit the data or the devices, or the steps cannot be counted.
    """

    def __init__(self, experiment: Experiment, dataset: Dataset, mesh: Mesh, *, fsdp: bool = False):
        size, num_images = experiment.batch_size, len(dataset.train_labels)
        if size > num_images:
            raise ValueError(
                f"--batch-size is {size}, more than the {num_images} training images; "
                "choose a smaller one"
            )
        if size % mesh.size:
            raise ValueError(
                f"--batch-size is {size}, which {mesh.size} devices cannot share equally; "
                f"choose a multiple of {mesh.size}"
            )
        self.steps_per_epoch = num_images // size
        for name in ("epochs", "decay_epochs", "warmup_epochs"):
            epochs, most = getattr(experiment, name), MAX_STEPS // self.steps_per_epoch
            if epochs > most:
                raise ValueError(
                    f"{option(name)} is {epochs}; it must be at most {most}, as an epoch has "
                    f"{self.steps_per_epoch} steps, and {MAX_STEPS} can be counted"
                )
        self._schedule = learning_rate_schedule(
            experiment.learning_rate,
            experiment.decay_epochs,
            experiment.warmup_epochs,
            self.steps_per_epoch,
        )
        self._num_test = len(dataset.test_labels)
        # The time of an evaluation, in steps: gradients are two thirds of a step's work.
        self.evaluation_steps = self._num_test / size / 3
        per_device = -(-min(EVAL_BATCH, self._num_test) // mesh.size)
        self._eval_batch = per_device * mesh.size

        make_model = partial(
            MODELS[experiment.model].make,
            num_classes=dataset.num_classes,
            channels=dataset.train_images.shape[-1],
            dtype=experiment.precision,
        )
        tx = make_optimizer(
            experiment.method,
            experiment.optimizer,
            self._schedule,
            experiment.weight_decay,
            effect=experiment.effect,
        )

        # An argument, as constants would make another program of each seed.
        seed = np.uint32(experiment.seed)

        def structure() -> tuple[nnx.Module, LayerPaths]:
            model = make_model(rngs=nnx.Rngs(0))
            return model, layer_paths(model)

        model, self.layers = nnx.eval_shape(structure)

        def first_state(seed: jax.Array) -> steps.TrainState:
            model = make_model(rngs=nnx.Rngs(jax.random.key(seed)))
            return steps.init_state(model, tx, seed, self.layers, self.steps_per_epoch)

        everywhere, split = devices.replicated(mesh), devices.by_batch(mesh)
        place = devices.state_shardings(jax.eval_shape(first_state, seed), mesh, fsdp=fsdp)
        self._train_data = (
            devices.put(steps.flat_images(dataset.train_images), everywhere),
            devices.put(dataset.train_labels, everywhere),
        )
        self._test_data = (
            devices.put(steps.flat_images(dataset.test_images), everywhere),
            devices.put(dataset.test_labels, everywhere),
        )
        self.first_state = partial(jax.jit(first_state, out_shardings=place), seed)
        order = jax.jit(partial(steps.epoch_order, num_images=num_images), out_shardings=everywhere)
        self.epoch_order = partial(order, seed)
        one: Any = everywhere
        self._train_step: Any = jax.jit(
            steps.make_train_step(model, tx, experiment, dataset, split, self.layers),
            donate_argnums=0,
            out_shardings=(place, steps.Measured(one, one, one, one, place.params)),
        )
        self._eval_step: Any = jax.jit(
            steps.make_eval_step(model, dataset, self._eval_batch, split),
            out_shardings=everywhere,
        )
        self._layer_entries: Any = jax.jit(
            partial(layer_entries, paths=self.layers), out_shardings=everywhere
        )

    def compile(self, state: steps.TrainState) -> None:
        """Compiles all functions, so that no epoch's time has that in it."""
        order = self.epoch_order(np.int32(1))
        self._train_step = self._train_step.lower(state, *self._train_data, order).compile()
        start = np.int32(0)
        self._eval_step = self._eval_step.lower(state, *self._test_data, start).compile()
        self.layer_entries(parameters=state.params)

    def train_step(
        self, state: steps.TrainState, order: jax.Array
    ) -> tuple[steps.TrainState, steps.Measured]:
        """The next state (the argument's memory is reused), and what the step measured."""
        return self._train_step(state, *self._train_data, order)

    def evaluate(self, state: steps.TrainState) -> tuple[float, float]:
        """The mean loss and the accuracy over all test images, each counted once."""
        sums = [
            self._eval_step(state, *self._test_data, np.int32(first))
            for first in range(0, self._num_test, self._eval_batch)
        ]
        loss, correct = np.sum(jax.device_get(sums), axis=0) / self._num_test
        return float(loss), float(correct)

    def epoch_means(self, state: steps.TrainState) -> dict[str, Any]:
        """The statistics of the epoch that the state is at the end of; see `steps.epoch_means`."""
        return steps.epoch_means(state, self.layers, self.steps_per_epoch)

    def layer_entries(self, **trees: Any) -> dict[str, np.ndarray]:
        """See `layers.layer_entries`; names are those of the trees and of the layers."""
        return {
            f"{tree}/{layer}": entries
            for tree in trees
            for layer, entries in zip(
                self.layers.names, jax.device_get(self._layer_entries(trees[tree])), strict=True
            )
        }

    def learning_rate(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 1."""
        return np.asarray(self._schedule((epoch - 1) * self.steps_per_epoch)).item()
