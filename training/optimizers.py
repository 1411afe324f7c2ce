"""The gradient methods and the optimizers by name, and how a run chains the two."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax

import optax_autoscale

Transformation: TypeAlias = optax.GradientTransformation


class MethodSpec(NamedTuple):
    """A transformation of the gradients before the optimizer."""

    make: Callable[[], Transformation]
    label: str  # in titles, tables and figures
    description: str  # in `train.py --list`
    # Combines the chain and the plain optimizer, where the method is not the chain alone.
    combine: Callable[[Transformation, Transformation], Transformation] | None = None


class OptimizerSpec(NamedTuple):
    """An optimizer with its weight decay."""

    make: Callable[[optax.ScalarOrSchedule, float], Transformation]
    label: str
    description: str
    learning_rate: float  # the default


def fixed_exponent(exponent: int) -> Transformation:
    """`autoscale` with its exponent fixed before the first step."""
    tx = optax_autoscale.autoscale()

    def init(params: optax.Params) -> optax_autoscale.AutoscaleState:
        state: Any = tx.init(params)
        return state._replace(exponent=jnp.int32(exponent))

    return optax.GradientTransformationExtraArgs(init, tx.update)


def centering_by_constant(factor: float) -> Transformation:
    """Centers each weight gradient and multiplies all of them by a constant."""
    return optax.chain(optax.scale(factor), optax_autoscale.center_layers())


def graft(direction: Transformation, norm: Transformation) -> Transformation:
    """The updates of one transformation with the norm, over all leaves, of another's.

    Where the direction's updates are all 0, so are the results.

    References:
      Agarwal et al., `Disentangling Adaptive Gradient Methods from Learning Rates
      <https://arxiv.org/abs/2002.11803>`_, 2020, who do so by layer
    """

    def init(params: optax.Params) -> Any:
        return direction.init(params), norm.init(params)

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> Any:
        turned, direction_state = direction.update(updates, state[0], params)
        sized, norm_state = norm.update(updates, state[1], params)
        length = optax.tree.norm(turned)
        factor = jnp.where(length == 0, 0, optax.tree.norm(sized) / length)
        return optax.tree.scale(factor, turned), (direction_state, norm_state)

    return optax.GradientTransformation(init, update)


def adamw(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> Transformation:
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def adam(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> Transformation:
    """Adam with an L2 penalty in the loss, as `torch.optim.Adam(weight_decay=...)`.

    The penalty is added after the method, which sees the loss's gradient alone: a factor of 0.5
    there doubles the penalty's share of the gradient.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))


def sgd(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> Transformation:
    penalty = optax.add_decayed_weights(weight_decay)
    return optax.chain(penalty, optax.sgd(learning_rate, momentum=0.9))


METHODS = {
    "none": MethodSpec(optax.identity, "None", "gradients unchanged, the baseline"),
    "gradient_normalization": MethodSpec(
        optax_autoscale.gradient_normalization,
        "Gradient Normalization",
        "divides all gradients by their global norm",
    ),
    "gradient_centralization": MethodSpec(
        optax_autoscale.gradient_centralization,
        "Gradient Centralization",
        "subtracts the mean of each output feature (Yong et al. 2020)",
    ),
    "zscore": MethodSpec(
        optax_autoscale.zscore_normalization,
        "Z-Score Normalization",
        "normalizes each layer to mean 0 and standard deviation 1 (Yun 2024)",
    ),
    "clip": MethodSpec(
        partial(optax.clip_by_global_norm, 1.0), "Clipping", "clips the global norm to 1"
    ),
    "centering": MethodSpec(
        optax_autoscale.center_layers,
        "centering only",
        "subtracts each layer's mean, as autoscale does, and does not scale",
    ),
    "scaling": MethodSpec(
        optax_autoscale.scale_by_global_std,
        "scaling only",
        "multiplies by autoscale's factor, and does not center",
    ),
    "constant": MethodSpec(
        partial(centering_by_constant, 0.4),
        "centering, constant factor",
        "centers each layer, and multiplies all by 0.4",
    ),
    "autoscale": MethodSpec(
        optax_autoscale.autoscale,
        "Autoscale",
        "the paper's method: centers each layer, and multiplies all by one factor",
    ),
    "autoscale_p1": MethodSpec(
        partial(fixed_exponent, 1), "Autoscale, p = 1", "autoscale with its exponent fixed at 1"
    ),
    "autoscale_direction": MethodSpec(
        optax_autoscale.autoscale,
        "Autoscale's direction, plain norm",
        "autoscale's update, rescaled to the norm of the plain optimizer's",
        combine=graft,
    ),
    "autoscale_norm": MethodSpec(
        optax_autoscale.autoscale,
        "plain direction, Autoscale's norm",
        "the plain optimizer's update, rescaled to the norm of autoscale's",
        combine=lambda chain, plain: graft(plain, chain),
    ),
}

OPTIMIZERS = {
    "adamw": OptimizerSpec(adamw, "AdamW", "Adam with decoupled weight decay", 1e-3),
    "adam": OptimizerSpec(
        adam, "Adam + L2", "Adam with an L2 penalty in the loss, as torch.optim.Adam", 1e-3
    ),
    "sgd": OptimizerSpec(
        sgd, "SGD", "gradient descent with momentum 0.9 and an L2 penalty in the loss", 0.1
    ),
}


def method_label(method: str, optimizer: str) -> str:
    """A method's name in tables and legends; without any it is the optimizer's."""
    return OPTIMIZERS[optimizer].label if method == "none" else METHODS[method].label


def learning_rate_schedule(
    learning_rate: float, decay_epochs: float, warmup_epochs: float, steps_per_epoch: int
) -> optax.Schedule:
    """The paper's step decay, times 0.75 every `decay_epochs` epochs, after a linear warm-up.

    Epochs of the warm-up, over which the learning rate rises from 0, count as those of the decay.
    """
    decay_steps = max(1, round(decay_epochs * steps_per_epoch))
    decay = optax.exponential_decay(learning_rate, decay_steps, 0.75, staircase=True)
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, 1.0, warmup_steps)
    return lambda count: warmup(count) * decay(count)


def make_optimizer(
    method: str,
    optimizer: str,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    *,
    effect: bool = False,
) -> Transformation:
    """The method's transformation, chained before the optimizer; in `METHODS` and `OPTIMIZERS`.

    With `effect`, each update is compared with the plain optimizer's.
    """
    make, spec = OPTIMIZERS[optimizer].make, METHODS[method]
    tx = optax.chain(spec.make(), make(learning_rate, weight_decay))
    if spec.combine:
        tx = spec.combine(tx, make(learning_rate, weight_decay))
    if effect:
        tx = optax_autoscale.measure_effect(tx, make(learning_rate, weight_decay))
    return tx
