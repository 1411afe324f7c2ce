"""The gradient methods by name, and the optimizer behind them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

import optax_autoscale
from training.config import Config


def fixed_exponent(exponent: int) -> optax.GradientTransformation:
    """`autoscale` whose exponent was decided before the first step."""
    tx = optax_autoscale.autoscale()

    def init(params: optax.Params) -> optax_autoscale.AutoscaleState:
        state: Any = tx.init(params)
        return state._replace(exponent=jnp.int32(exponent))

    return optax.GradientTransformationExtraArgs(init, tx.update)


def centering_by_constant(factor: float) -> optax.GradientTransformation:
    """Centres each weight gradient and scales all of them by a constant."""
    return optax.chain(optax.scale(factor), optax_autoscale.center_layers())


METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": optax.identity,
    "autoscale": optax_autoscale.autoscale,
    "gradient_centralization": optax_autoscale.gradient_centralization,
    "gradient_normalization": optax_autoscale.gradient_normalization,
    "zscore": optax_autoscale.zscore_normalization,
    "clip": partial(optax.clip_by_global_norm, 1.0),
    "centering": optax_autoscale.center_layers,
    "scaling": optax_autoscale.scale_by_global_std,
    "constant": partial(centering_by_constant, 0.4),
    "autoscale_p1": partial(fixed_exponent, 1),
    "autoscale_p2": partial(fixed_exponent, 2),
    "autoscale_max1": partial(optax_autoscale.autoscale, max_scale=1.0),
}


def learning_rate_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """The paper's step decay, from steps to learning rates: times 0.75 every 30 epochs."""
    transition_steps = max(1, round(config.decay_epochs * steps_per_epoch))
    return optax.exponential_decay(
        config.learning_rate, transition_steps, decay_rate=0.75, staircase=True
    )


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """The method's transformation, chained before the optimizer."""
    learning_rate = learning_rate_schedule(config, steps_per_epoch)
    method = METHODS[config.method]()
    if config.optimizer == "adamw":
        return optax.chain(method, optax.adamw(learning_rate, weight_decay=config.weight_decay))
    return optax.chain(
        method,
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate, momentum=0.9),
    )
