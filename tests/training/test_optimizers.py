import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from training.config import Experiment
from training.optimizers import METHODS, learning_rate_schedule, make_optimizer


def updates_of(it: Experiment, grads, params, steps: int = 1):
    tx = make_optimizer(it.method, it.optimizer, it.learning_rate, it.weight_decay)
    state, updates = tx.init(params), None
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
    return jax.tree.map(np.asarray, updates)


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, 1.0])}
GRADS = {"kernel": jnp.array([[0.1, 0.2], [-0.3, 0.4]]), "bias": jnp.array([0.5, -0.5])}


def test_the_learning_rate_decays_every_thirty_epochs():
    schedule = learning_rate_schedule(1e-3, 30, steps_per_epoch=195)
    epochs = [0, 29, 30, 59, 60, 180, 199]
    rates = [float(schedule(epoch * 195)) for epoch in epochs] + [float(schedule(30 * 195 - 1))]
    powers = [0, 0, 1, 1, 2, 6, 6, 0]
    np.testing.assert_allclose(rates, [1e-3 * 0.75**power for power in powers], rtol=1e-6)


def test_the_plain_method_is_adamw():
    config = Experiment(method="none", weight_decay=0.1)
    expected, _ = (tx := optax.adamw(1e-3, weight_decay=0.1)).update(GRADS, tx.init(PARAMS), PARAMS)
    updates = updates_of(config, GRADS, PARAMS)
    for name in GRADS:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)


def test_sgd_has_momentum_and_an_l2_penalty():
    config = Experiment(method="none", optimizer="sgd", learning_rate=0.1, weight_decay=0.01)
    updates = updates_of(config, GRADS, PARAMS, steps=2)
    for name in GRADS:
        grad = np.asarray(GRADS[name]) + 0.01 * np.asarray(PARAMS[name])
        np.testing.assert_allclose(updates[name], -0.1 * (grad + 0.9 * grad), rtol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("none", "clip")])
def test_methods_act_on_the_gradient(method):
    plain = updates_of(Experiment(method="none", optimizer="sgd"), GRADS, PARAMS)
    treated = updates_of(Experiment(method=method, optimizer="sgd"), GRADS, PARAMS)
    assert np.abs(plain["kernel"] - treated["kernel"]).max() > 1e-6


def test_clip_bounds_the_norm_at_one():
    config = Experiment(method="clip", optimizer="sgd", learning_rate=1.0, weight_decay=0.0)
    large = {name: 100 * grad for name, grad in GRADS.items()}
    np.testing.assert_allclose(optax.tree.norm(updates_of(config, large, PARAMS)), 1, rtol=1e-5)
    np.testing.assert_allclose(updates_of(config, GRADS, PARAMS)["bias"], -GRADS["bias"])
