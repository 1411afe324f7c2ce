"""The state of a run, and the compiled functions that act on it; data stay on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Sharding

from optax_autoscale import EffectSums, global_std
from training.augmentation import cutmix, normalize, random_crop, random_flip
from training.config import Experiment
from training.data import Dataset
from training.layers import LayerPaths, layer_stds


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array  # steps taken; shape=(), dtype=int32
    seed: jax.Array  # of everything random; with `step` it is the random state; () and uint32
    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState
    totals: dict[str, Any]  # the epoch's sums so far of what `measure` gives
    norm_ratios: jax.Array | None  # of the epoch's steps; shape=(steps,), dtype=float32


class Measured(NamedTuple):
    """What a step tells of itself; all of the gradients as they come, before the method."""

    loss: jax.Array  # shape=(), dtype=float32
    global_std: jax.Array  # shape=(), dtype=float32
    scale_factor: jax.Array | None  # shape=(), dtype=float32; None where the method has none
    norm_ratio: jax.Array | None  # shape=(), dtype=float32; None where no effect is measured
    grads: nnx.State | None  # as the parameters


def init_state(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    seed: jax.typing.ArrayLike,
    layers: LayerPaths,
    steps_per_epoch: int,
) -> TrainState:
    """The state before the first step."""
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    opt_state = tx.init(params)
    totals = jax.tree.map(jnp.zeros_like, measure(jnp.float32(0), params, opt_state, layers))
    norm_ratios = None if totals["effect"] is None else jnp.ones(steps_per_epoch)
    return TrainState(
        *(jnp.int32(0), jnp.uint32(seed), params, batch_stats, opt_state, totals, norm_ratios)
    )


def measure(
    loss: jax.Array, grads: nnx.State, opt_state: optax.OptState, layers: LayerPaths
) -> dict[str, Any]:
    """What is recorded of each step; all of the gradients as they come, before the method."""
    return {
        "train_loss": loss,
        "global_std": global_std(grads),
        "layer_std": layer_stds(grads, layers),
        "scale_factor": optax.tree.get(opt_state, "scale_factor", None),
        "effect": optax.tree.get(opt_state, "effect_sums", None),
    }


def epoch_means(state: TrainState, layers: LayerPaths, steps: int) -> dict[str, Any]:
    """The means over an epoch's steps of what `measure` gives, and what else a record needs.

    Args:
      state: the state after the epoch's last step.
      layers: the layers' paths.
      steps: the number of steps in the epoch.

    Returns:
      Python numbers, None where the method has no such thing; `layer_std` is a dictionary from
      names such as `"stem/conv/kernel"`, from the network's input to its output.
    """
    totals, exponent = jax.device_get(
        (state.totals, optax.tree.get(state.opt_state, "exponent", None))
    )
    stds = (totals.pop("layer_std") / steps).tolist()
    effect: EffectSums | None = totals.pop("effect")
    first = int(state.step) == steps
    return {
        **{name: None if total is None else float(total) / steps for name, total in totals.items()},
        "exponent": None if exponent is None else int(exponent),
        "layer_std": dict(zip(layers.names, stds, strict=True)),
        "update_norm_ratio": effect and float(effect.norm_ratio),
        "update_cosine": effect and float(effect.cosine),
        "update_norm_ratio_by_step": np.asarray(state.norm_ratios).tolist()
        if effect and first
        else None,
    }


def flat_images(images: np.ndarray) -> np.ndarray:
    """Images as rows of bytes, of shape `(n, height * width * channels)`.

    A TPU copies an array of small images whole before it gathers a batch from it, but not rows.
    """
    return images.reshape(len(images), -1)


def epoch_order(seed: jax.typing.ArrayLike, epoch: jax.Array, num_images: int) -> jax.Array:
    """The order of the training images in an epoch: a permutation of shape `(num_images,)`."""
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    return jax.random.permutation(key, num_images)


def make_train_step(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    experiment: Experiment,
    data: Dataset,
    batch_sharding: Sharding,
    layers: LayerPaths,
) -> Callable[..., tuple[TrainState, Measured]]:
    """Builds the training step.

    Args:
      model: its structure is used, in training mode; its parameters are those of the state.
      tx: the method and the optimizer.
      experiment: the recipe.
      data: its constants are used.
      batch_sharding: how the first axis of a batch is split over the devices.
      layers: the layers' paths.

    Returns:
      A function of the state, all training images (as `flat_images` gives them) and labels and the
      epoch's order, that returns the next state and what the step measured. The batch is the one of
      that order that the state's step is at.
    """
    model.train()
    graph, *_ = nnx.split(model, nnx.Param, nnx.BatchStat)
    num_images, *shape = data.train_images.shape
    steps_per_epoch = num_images // experiment.batch_size
    padding = shape[0] // 8

    def augmented_batch(
        state: TrainState, images: jax.Array, labels: jax.Array, order: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # Another stream than that of the epochs' orders.
        stream = jax.random.fold_in(jax.random.key(state.seed), 2**31)
        crop_key, flip_key, mix_key = jax.random.split(jax.random.fold_in(stream, state.step), 3)
        start = state.step % steps_per_epoch * experiment.batch_size
        chosen = jax.lax.dynamic_slice_in_dim(order, start, experiment.batch_size)
        chosen = jax.lax.with_sharding_constraint(chosen, batch_sharding)
        x = random_crop(crop_key, images[chosen].reshape(-1, *shape), padding)
        if experiment.dataset != "digits":  # a mirrored digit is not a digit
            x = random_flip(flip_key, x)
        y = jax.nn.one_hot(labels[chosen], data.num_classes)
        y = optax.smooth_labels(y, experiment.label_smoothing)
        x, y = cutmix(mix_key, x, y, experiment.cutmix_probability)
        return normalize(x, data.mean, data.std), y

    def train_step(
        state: TrainState, images: jax.Array, labels: jax.Array, order: jax.Array
    ) -> tuple[TrainState, Measured]:
        x, y = augmented_batch(state, images, labels, order)

        def loss_fn(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            network = nnx.merge(graph, params, state.batch_stats, copy=True)
            loss = optax.softmax_cross_entropy(network(x), y).mean()
            return loss, nnx.state(network, nnx.BatchStat)

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = cast(nnx.State, optax.apply_updates(state.params, updates))

        measured = measure(loss, grads, opt_state, layers)
        first = state.step % steps_per_epoch == 0
        totals = jax.tree.map(
            lambda total, value: jnp.where(first, 0, total) + value, state.totals, measured
        )
        norm_ratio = optax.tree.get(opt_state, "norm_ratio", None)
        norm_ratios = state.norm_ratios
        if norm_ratios is not None:
            norm_ratios = norm_ratios.at[state.step % steps_per_epoch].set(norm_ratio)
        state = TrainState(
            *(state.step + 1, state.seed, params, batch_stats, opt_state, totals, norm_ratios)
        )
        global_std, scale_factor = measured["global_std"], measured["scale_factor"]
        return state, Measured(loss, global_std, scale_factor, norm_ratio, grads)

    return train_step


def make_eval_step(
    model: nnx.Module, data: Dataset, batch_size: int, batch_sharding: Sharding
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Builds the evaluation of one batch of test images, the last of which may be partial.

    Args:
      model: its structure is used, in evaluation mode.
      data: its constants are used.
      batch_size: the number of images in a batch.
      batch_sharding: how the first axis of a batch is split over the devices.

    Returns:
      A function of the state, all test images (as `flat_images` gives them) and labels, and the
      index of the batch's first image;
      it returns the sum of the losses (cross-entropy) and the number of correct answers.
    """
    model.eval()
    graph, *_ = nnx.split(model, nnx.Param, nnx.BatchStat)
    num_images, *shape = data.test_images.shape

    def eval_step(
        state: TrainState, images: jax.Array, labels: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        network = nnx.merge(graph, state.params, state.batch_stats, copy=True)
        index = start + jnp.arange(batch_size)
        index = jax.lax.with_sharding_constraint(index, batch_sharding)
        within = index < num_images
        x = images.at[index].get(mode="clip").reshape(-1, *shape)
        x = normalize(x, data.mean, data.std)
        y = labels.at[index].get(mode="clip")
        logits = network(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        correct = jnp.argmax(logits, axis=-1) == y
        return jnp.sum(losses, where=within), jnp.sum(correct, where=within)

    return eval_step
