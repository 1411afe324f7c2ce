"""The training step of a run: its batch, loss, gradients, update and measurements."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from models import MODELS
from optax_autoscale import EffectSums, global_std, layer_std
from training import UserError, devices
from training.data import Dataset, cutmix, normalize, random_crop, random_flip
from training.optimizers import learning_rate_schedule, make_optimizer
from training.options import MAX_STEPS, Experiment, option

EVAL_BATCH = 512

Arrays = dict[str, Any]  # nested dictionaries of arrays: what NNX holds in variables, without them
Path = tuple[Any, ...]
Data = tuple[jax.Array, jax.Array]  # images, shape=(n, height * width * channels), and labels


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array  # steps taken; shape=(), dtype=int32
    seed: jax.Array  # of everything random; with `step` it is the random state; () and uint32
    params: Arrays
    batch_stats: Arrays
    opt_state: optax.OptState
    totals: Arrays  # the epoch's sums so far of what is recorded
    scale_max: jax.Array | None  # the epoch's largest scale factor; shape=(), dtype=float32
    norm_ratios: jax.Array | None  # of the epoch's steps; shape=(steps,), dtype=float32


class Measured(NamedTuple):
    """The measurements of a step, all on the raw gradients, before the method."""

    loss: jax.Array  # shape=(), dtype=float32
    global_std: jax.Array  # shape=(), dtype=float32
    scale_factor: jax.Array | None  # shape=(), dtype=float32; None where the method has none
    norm_ratio: jax.Array | None  # shape=(), dtype=float32; None where no effect is measured


class Program:
    """The compiled functions of a run; the same on one device and on several processes.

    Of the data set, shapes and constants are used; with `fsdp`, parameters and optimizer state are
    sharded over the devices of the mesh.

    Raises:
      ValueError: if the batches do not fit the data or the devices, or the steps cannot be counted.
    """

    def __init__(self, experiment: Experiment, dataset: Dataset, mesh: Mesh, *, fsdp: bool = False):
        self._experiment, self._dataset, self._mesh = experiment, dataset, mesh
        self.steps_per_epoch = count_steps(experiment, dataset, mesh)
        self.schedule = learning_rate_schedule(
            experiment.learning_rate,
            experiment.decay_epochs,
            experiment.warmup_epochs,
            self.steps_per_epoch,
        )
        self.tx = make_optimizer(
            experiment.method,
            experiment.optimizer,
            self.schedule,
            experiment.weight_decay,
            effect=experiment.effect,
        )
        num_test = len(dataset.test_labels)
        # The time of an evaluation, in steps: gradients are two thirds of a step's work.
        evaluated = num_test + experiment.validation_size
        self.evaluation_steps = evaluated / experiment.batch_size / 3
        self._eval_batch = -(-min(EVAL_BATCH, num_test) // mesh.size) * mesh.size

        paths: list[Path] = []

        def structure() -> nnx.Module:
            model = self._make_model(0)
            paths.extend(layer_paths(model))
            return model

        model, self.layers = nnx.eval_shape(structure), paths
        model.train()
        self._training = nnx.graphdef(model)
        model.eval()
        self._evaluation = nnx.graphdef(model)

        # An argument, as constants would make another program of each seed.
        seed = np.uint32(experiment.seed)
        everywhere: Any = devices.replicated(mesh)
        place = devices.state_shardings(jax.eval_shape(self._first_state, seed), mesh, fsdp=fsdp)
        # Initial parameters are drawn once: with optimization, to compile that would take a CPU as
        # long as the training step does.
        quick = (
            {"xla_backend_optimization_level": 0}
            if mesh.devices.flat[0].platform == "cpu"
            else None
        )
        first_state = jax.jit(self._first_state, out_shardings=place, compiler_options=quick)
        self.first_state = partial(first_state, seed)
        self.epoch_order = partial(jax.jit(self._epoch_order, out_shardings=everywhere), seed)
        # The state is not donated: XLA would copy most of what the optimizer writes into its
        # memory, on a GPU with two launches per layer.
        self.train_step: Any = jax.jit(self._step, out_shardings=(place, everywhere))
        self._eval_step: Any = jax.jit(self._evaluate, out_shardings=everywhere)
        self._compiled: dict[int, Any] = {}  # the same, by the number of images

    def put(self, images: np.ndarray, labels: np.ndarray) -> Data:
        """Puts a data set on all devices.

        Images become rows of bytes: a TPU copies an array of small images whole before it gathers a
        batch from it, but not rows.
        """
        everywhere = devices.replicated(self._mesh)
        rows = images.reshape(len(images), -1)
        return devices.put(rows, everywhere), devices.put(labels, everywhere)

    def compile(self, state: TrainState, train_data: Data, *evaluated: Data) -> None:
        """Compiles all functions, so that compile time is not part of an epoch's time."""
        order = self.epoch_order(np.int32(1))
        self.train_step = self.train_step.lower(state, train_data, order).compile()
        for data in evaluated:
            compiled = self._eval_step.lower(state, data, np.int32(0)).compile()
            self._compiled[len(data[1])] = compiled

    def evaluate(
        self, state: TrainState, data: Data, evaluated: Callable[[int], object] = lambda _: None
    ) -> tuple[float, float]:
        """The mean loss and the accuracy over all images, each counted once.

        Calls `evaluated` with the number of images of a batch when it is done.
        """
        count = len(data[1])
        eval_step = self._compiled.get(count, self._eval_step)
        sums: list[Any] = []
        for first in range(0, count, self._eval_batch):
            sums.append(eval_step(state, data, np.int32(first)))
            if first > 0:  # one is computed while the next is dispatched
                jax.block_until_ready(sums[-2])
                evaluated(self._eval_batch)
        loss, correct = np.sum(jax.device_get(sums), axis=0) / count
        return float(loss), float(correct)

    def epoch_means(self, state: TrainState) -> dict[str, Any]:
        """What a record needs of the epoch that the state is at the end of, in Python numbers."""
        steps = self.steps_per_epoch
        exponent = optax.tree.get(state.opt_state, "exponent", None)
        totals, largest, ratios, exponent = jax.device_get(
            (state.totals, state.scale_max, state.norm_ratios, exponent)
        )
        stds, scale = (totals["layer_std"] / steps).tolist(), totals["scale_factor"]
        effect: EffectSums | None = totals["effect"]
        first = int(state.step) == steps
        return {
            "train_loss": float(totals["train_loss"]) / steps,
            "global_std": float(totals["global_std"]) / steps,
            "scale_factor": None if scale is None else float(scale) / steps,
            "scale_factor_max": None if largest is None else float(largest),
            "exponent": None if exponent is None else int(exponent),
            "layer_std": dict(zip(map(name_of, self.layers), stds, strict=True)),
            "update_norm_ratio": effect and float(effect.norm_ratio),
            "update_cosine": effect and float(effect.cosine),
            "update_norm_ratio_by_step": ratios.tolist() if effect and first else None,
        }

    def model(self, state: TrainState) -> nnx.Module:
        """The network with the parameters of a state, in evaluation mode."""
        return nnx.merge(self._evaluation, nnx.State(state.params), nnx.State(state.batch_stats))

    def learning_rate(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 1."""
        return np.asarray(self.schedule((epoch - 1) * self.steps_per_epoch)).item()

    # What follows are pure functions, which the above compiles.

    def _make_model(self, seed: jax.typing.ArrayLike) -> nnx.Module:
        return MODELS[self._experiment.model].make(
            num_classes=self._dataset.num_classes,
            channels=self._dataset.train_images.shape[-1],
            dtype=self._experiment.precision,
            rngs=nnx.Rngs(jax.random.key(seed)),
        )

    def _first_state(self, seed: jax.Array) -> TrainState:
        """The state before the first step."""
        model = self._make_model(seed)
        params = arrays_of(model, nnx.Param)
        opt_state = self.tx.init(params)
        recorded = self._recorded(jnp.float32(0), params, opt_state)
        totals = jax.tree.map(jnp.zeros_like, recorded)
        return TrainState(
            step=jnp.int32(0),
            seed=seed,
            params=params,
            batch_stats=arrays_of(model, nnx.BatchStat),
            opt_state=opt_state,
            totals=totals,
            scale_max=totals["scale_factor"],
            norm_ratios=None if totals["effect"] is None else jnp.zeros(self.steps_per_epoch),
        )

    def _epoch_order(self, seed: jax.Array, epoch: jax.Array) -> jax.Array:
        """The order of the training images in an epoch; shape=(n,), dtype=int32."""
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        return jax.random.permutation(key, len(self._dataset.train_labels))

    def _step(self, state: TrainState, data: Data, order: jax.Array) -> tuple[TrainState, Measured]:
        """The state after a step on the batch of the epoch's order that it is at."""
        x, y = self.batch(state, data, order)
        (loss, batch_stats), grads = jax.value_and_grad(self.loss, has_aux=True)(
            state.params, state.batch_stats, x, y
        )
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)

        recorded = self._recorded(loss, grads, opt_state)
        scale, ratios = recorded["scale_factor"], cast(Any, state.norm_ratios)
        ratio = optax.tree.get(opt_state, "norm_ratio", None)
        index = state.step % self.steps_per_epoch  # of the step in its epoch

        def of_epoch(total: Any) -> jax.Array:
            return jnp.where(index == 0, 0, total)

        state = TrainState(
            step=state.step + 1,
            seed=state.seed,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            totals=jax.tree.map(
                lambda total, value: of_epoch(total) + value, state.totals, recorded
            ),
            scale_max=None if scale is None else jnp.maximum(of_epoch(state.scale_max), scale),
            norm_ratios=None if ratio is None else ratios.at[index].set(ratio),
        )
        return state, Measured(loss, recorded["global_std"], scale, ratio)

    def batch(self, state: TrainState, data: Data, order: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The images, augmented, and the labels as probabilities."""
        it, (images, labels), shape = self._experiment, data, self._dataset.train_images.shape[1:]
        # Another stream than that of the epochs' orders.
        stream = jax.random.fold_in(jax.random.key(state.seed), 2**31)
        crop_key, flip_key, mix_key = jax.random.split(jax.random.fold_in(stream, state.step), 3)
        start = state.step % self.steps_per_epoch * it.batch_size
        chosen = jax.lax.dynamic_slice_in_dim(order, start, it.batch_size)
        chosen = jax.lax.with_sharding_constraint(chosen, devices.by_batch(self._mesh))
        x = random_crop(crop_key, images[chosen].reshape(-1, *shape), padding=shape[0] // 8)
        if it.dataset != "digits":  # a mirrored digit is not a digit
            x = random_flip(flip_key, x)
        y = jax.nn.one_hot(labels[chosen], self._dataset.num_classes)
        y = optax.smooth_labels(y, it.label_smoothing)
        x, y = cutmix(mix_key, x, y, it.cutmix_probability)
        return normalize(x, self._dataset.mean, self._dataset.std), y

    def loss(
        self, params: Arrays, batch_stats: Arrays, x: jax.Array, y: jax.Array
    ) -> tuple[jax.Array, Arrays]:
        """The mean cross-entropy of a batch, and BatchNorm's statistics after it."""
        model = nnx.merge(self._training, nnx.State(params), nnx.State(batch_stats))
        loss = optax.softmax_cross_entropy(model(x), y).mean()
        return loss, arrays_of(model, nnx.BatchStat)

    def _recorded(self, loss: jax.Array, grads: Arrays, opt_state: optax.OptState) -> Arrays:
        """What is summed over an epoch; all of the gradients as they come, before the method."""
        layers = [functools.reduce(operator.getitem, path, grads) for path in self.layers]
        return {
            "train_loss": loss,
            "global_std": global_std(grads),
            "layer_std": jnp.stack(layer_std(layers)),
            "scale_factor": optax.tree.get(opt_state, "scale_factor", None),
            "effect": optax.tree.get(opt_state, "effect_sums", None),
        }

    def _evaluate(
        self, state: TrainState, data: Data, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The sums of the loss and of correct answers over a batch; the last may be partial."""
        (images, labels), shape = data, self._dataset.test_images.shape[1:]
        index = start + jnp.arange(self._eval_batch)
        index = jax.lax.with_sharding_constraint(index, devices.by_batch(self._mesh))
        within = index < len(labels)
        x = images.at[index].get(mode="clip").reshape(-1, *shape)
        y = labels.at[index].get(mode="clip")
        logits = self.model(state)(normalize(x, self._dataset.mean, self._dataset.std))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        correct = jnp.argmax(logits, axis=-1) == y
        return jnp.sum(losses, where=within), jnp.sum(correct, where=within)


def arrays_of(model: nnx.Module, kind: type[nnx.Variable[Any]]) -> Arrays:
    """A model's variables of a kind as nested dictionaries of their arrays."""
    return nnx.to_pure_dict(nnx.state(model, kind))


def layer_paths(model: nnx.Module) -> list[Path]:
    """The paths of a network's layers, parameters with more than one axis, from input to output.

    That is the order in which its constructor declared them; `nnx.eval_shape` sorts the attributes.

    Example:
      >>> from models import vit_tiny
      >>> list(map(name_of, layer_paths(vit_tiny(num_classes=10, rngs=nnx.Rngs(0)))))[:3]
      ['stem/kernel', 'blocks/0/attention/qkv/0/kernel', 'blocks/0/attention/qkv/1/kernel']
    """
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return [path for path in _declared(model) if path in parameters and parameters[path].ndim > 1]


def name_of(path: Path) -> str:
    """A layer's name in records, such as `"stem/conv/kernel"`."""
    return "/".join(map(str, path))


def _declared(node: Any, path: Path = ()) -> Iterator[Path]:
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, nnx.Variable):
        yield path
    elif isinstance(node, nnx.List | list | tuple):
        children = enumerate(node)
    elif isinstance(node, nnx.Module):
        children = vars(node).items()
    for key, child in children:
        yield from _declared(child, (*path, key))


def count_steps(experiment: Experiment, dataset: Dataset, mesh: Mesh) -> int:
    """The steps in an epoch; ValueError if batches do not fit, or the steps cannot be counted."""
    size, most = experiment.batch_size, len(dataset.train_labels)
    if size > most:
        raise UserError(f"--batch-size is {size}; it must be at most {most}, the training images")
    if size % mesh.size:
        raise UserError(
            f"--batch-size is {size}; it must be a multiple of {mesh.size}, the devices"
        )
    steps = most // size
    for name in ("epochs", "decay_epochs", "warmup_epochs"):
        epochs, most = getattr(experiment, name), MAX_STEPS // steps
        if epochs > most:
            raise UserError(
                f"{option(name)} is {epochs}; it must be at most {most}, as an epoch has "
                f"{steps} steps, and {MAX_STEPS} can be counted"
            )
    return steps
