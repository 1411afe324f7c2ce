import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training.config import Experiment

from training.optimizers import METHODS, OPTIMIZERS, graft, learning_rate_schedule, make_optimizer


def updates_of(it: Experiment, grads, params, steps: int = 1):
    tx = make_optimizer(it.method, it.optimizer, it.learning_rate, it.weight_decay)
    state, updates = tx.init(params), None
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
    return jax.tree.map(np.asarray, updates)


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, 1.0])}
GRADS = {"kernel": jnp.array([[0.1, 0.2], [-0.3, 0.4]]), "bias": jnp.array([0.5, -0.5])}


def test_the_learning_rate_decays_every_thirty_epochs():
    schedule = learning_rate_schedule(1e-3, 30, 0, steps_per_epoch=195)
    epochs = [0, 29, 30, 59, 60, 180, 199]
    rates = [float(schedule(epoch * 195)) for epoch in epochs] + [float(schedule(30 * 195 - 1))]
    powers = [0, 0, 1, 1, 2, 6, 6, 0]
    np.testing.assert_allclose(rates, [1e-3 * 0.75**power for power in powers], rtol=1e-6)


def test_the_warm_up_rises_from_zero_step_by_step_and_counts_as_epochs_of_the_decay():
    schedule = learning_rate_schedule(1e-3, 30, 5, steps_per_epoch=10)
    for step, rate in [(0, 0), (1, 2e-5), (25, 5e-4), (49, 9.8e-4), (50, 1e-3), (299, 1e-3)]:
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-6)
    assert float(schedule(300)) == pytest.approx(0.75e-3)
    longer = learning_rate_schedule(1e-3, 1, 2, steps_per_epoch=10)
    assert float(longer(15)) == pytest.approx(0.75 * 0.75e-3)


def test_the_plain_method_is_adamw():
    config = Experiment(method="none", weight_decay=0.1)
    expected, _ = (tx := optax.adamw(1e-3, weight_decay=0.1)).update(GRADS, tx.init(PARAMS), PARAMS)
    updates = updates_of(config, GRADS, PARAMS)
    for name in GRADS:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)


# Five steps of torch.optim.Adam([w], lr=0.01, weight_decay=0.1) in float64, PyTorch 2.13.0, with
# gradients of factor * [sin t, cos t, t / 10, -1 / t], from [1, -2, 0.5, 3]; by factor.
PYTORCH_ADAM = {
    1.0: [
        [0.990000000, -2.010000000, 0.490000001, 3.010000000],
        [0.979988012, -2.006717140, 0.480168702, 3.018480743],
        [0.971270782, -1.999926935, 0.470394584, 3.025306631],
        [0.967292083, -1.992141305, 0.460613796, 3.030464848],
        [0.967013022, -1.985852794, 0.450787873, 3.034018193],
    ],
    0.1: [
        [0.990000001, -1.990000001, 0.490000002, 2.990000000],
        [0.979993138, -1.980162839, 0.479987969, 2.980002463],
        [0.970377576, -1.970295903, 0.469954131, 2.969975901],
        [0.962091544, -1.960355064, 0.459888780, 2.959920893],
        [0.955081954, -1.950632490, 0.449782766, 2.949841771],
    ],
}


@pytest.mark.parametrize("factor", PYTORCH_ADAM)
def test_adam_is_that_of_pytorch_after_what_stands_before_it(factor, monkeypatch):
    """A factor before it changes the weight of the L2 penalty, which comes after the method."""
    shrink = METHODS["constant"]._replace(make=lambda: optax.scale(factor))
    monkeypatch.setitem(METHODS, "constant", shrink)
    tx = make_optimizer("constant", "adam", 0.01, 0.1)
    params = {"w": jnp.array([1.0, -2.0, 0.5, 3.0])}
    state = tx.init(params)
    for t, expected in enumerate(PYTORCH_ADAM[factor], start=1):
        grads = {"w": jnp.array([np.sin(t), np.cos(t), t / 10, -1 / t])}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], expected, rtol=1e-6)


def test_before_adam_with_a_penalty_a_factor_is_a_penalty_divided_by_it():
    scaled = optax.chain(optax.scale(0.4), make_optimizer("none", "adam", 1e-2, 0.1))
    stronger = make_optimizer("none", "adam", 1e-2, 0.1 / 0.4)
    results = []
    for tx in (scaled, stronger):
        params = PARAMS
        state = tx.init(params)
        for _ in range(20):
            updates, state = tx.update(GRADS, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params["kernel"])
    np.testing.assert_allclose(*results, rtol=1e-5)


def test_sgd_has_momentum_and_an_l2_penalty():
    config = Experiment(method="none", optimizer="sgd", learning_rate=0.1, weight_decay=0.01)
    updates = updates_of(config, GRADS, PARAMS, steps=2)
    for name in GRADS:
        grad = np.asarray(GRADS[name]) + 0.01 * np.asarray(PARAMS[name])
        np.testing.assert_allclose(updates[name], -0.1 * (grad + 0.9 * grad), rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 0.01], ids=["p = 2", "p = 1"])
def test_each_form_of_the_method_is_its_equation(size):
    """The second update, whose exponent is the one that the first step decided."""
    grads = jax.tree.map(lambda grad: size * grad, GRADS)
    kernel = np.asarray(grads["kernel"], np.float64)
    ratio = 4 / abs(np.log(kernel.std(ddof=1)))
    factor = ratio if ratio**2 < 0.5 else ratio**2
    centered = kernel - kernel.mean()
    expected = {
        "none": kernel,
        "centering": centered,
        "scaling": factor * kernel,
        "autoscale": factor * centered,
        "autoscale_p1": ratio * centered,
        "autoscale_p2": ratio**2 * centered,
        "autoscale_max1": min(factor, 1) * centered,
    }
    for method, update in expected.items():
        tx = METHODS[method].make()
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        updates, _ = tx.update(grads, state, PARAMS)
        np.testing.assert_allclose(updates["kernel"], update, rtol=1e-5, atol=1e-6 * size)
        np.testing.assert_array_equal(updates["bias"], grads["bias"])


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("none", "clip")])
def test_methods_act_on_the_gradient(method):
    plain = updates_of(Experiment(method="none", optimizer="sgd"), GRADS, PARAMS)
    treated = updates_of(Experiment(method=method, optimizer="sgd"), GRADS, PARAMS)
    assert np.abs(plain["kernel"] - treated["kernel"]).max() > 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grafts_have_one_updates_direction_and_the_others_norm(optimizer):
    updates = {
        method: updates_of(Experiment(method=method, optimizer=optimizer), GRADS, PARAMS, steps=3)
        for method in ("none", "autoscale", "autoscale_direction", "autoscale_norm")
    }
    flat = {name: np.concatenate([*map(np.ravel, tree.values())]) for name, tree in updates.items()}
    norms = {name: np.linalg.norm(vector) for name, vector in flat.items()}
    for name, direction, norm in [
        ("autoscale_direction", "autoscale", "none"),
        ("autoscale_norm", "none", "autoscale"),
    ]:
        expected = flat[direction] / norms[direction] * norms[norm]
        np.testing.assert_allclose(flat[name], expected, rtol=1e-5, atol=1e-9)
    if optimizer == "sgd":
        assert abs(np.log(norms["none"] / norms["autoscale"])) > 0.4


def test_a_graft_onto_nothing_is_nothing():
    tx = graft(optax.set_to_zero(), optax.sgd(0.1))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert not any(np.any(leaf) for leaf in updates.values())


def test_clip_bounds_the_norm_at_one():
    config = Experiment(method="clip", optimizer="sgd", learning_rate=1.0, weight_decay=0.0)
    large = {name: 100 * grad for name, grad in GRADS.items()}
    np.testing.assert_allclose(optax.tree.norm(updates_of(config, large, PARAMS)), 1, rtol=1e-5)
    np.testing.assert_allclose(updates_of(config, GRADS, PARAMS)["bias"], -GRADS["bias"])
