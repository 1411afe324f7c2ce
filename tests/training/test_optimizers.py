"""The chains of method and optimizer, against equations, NumPy and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from training.optimizers import METHODS, OPTIMIZERS, graft, learning_rate_schedule, make_optimizer

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, 1.0])}
GRADS = {"kernel": jnp.array([[0.1, 0.2], [-0.3, 0.4]]), "bias": jnp.array([0.5, -0.5])}


def updates_of(tx: optax.GradientTransformation, steps: int = 1, grads=GRADS):
    """The last update of some steps with the same gradients, at the same parameters."""
    state, updates = tx.init(PARAMS), None
    for _ in range(steps):
        updates, state = tx.update(grads, state, PARAMS)
    return jax.tree.map(np.asarray, updates)


@pytest.mark.parametrize(
    ("decay", "warmup", "rates"),
    [
        (30, 0, {0: 1, 299: 1, 300: 0.75, 599: 0.75, 600: 0.75**2, 1800: 0.75**6, 1999: 0.75**6}),
        # The warm-up rises step by step, and counts as epochs of the decay.
        (30, 5, {0: 0, 1: 0.02, 25: 0.5, 49: 0.98, 50: 1, 299: 1, 300: 0.75}),
        (1, 2, {15: 0.75 * 0.75}),
    ],
)
def test_the_learning_rate_decays_after_a_warm_up(decay, warmup, rates):
    schedule = learning_rate_schedule(1e-3, decay, warmup, steps_per_epoch=10)
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(1e-3 * rate, rel=1e-6)


def test_without_a_method_it_is_adamw_and_sgd_has_momentum_and_an_l2_penalty():
    adamw = updates_of(make_optimizer("none", "adamw", 1e-3, 0.1))
    expected = updates_of(optax.adamw(1e-3, weight_decay=0.1))
    sgd = updates_of(make_optimizer("none", "sgd", 0.1, 0.01), steps=2)
    for name in GRADS:
        np.testing.assert_allclose(adamw[name], expected[name], rtol=1e-6)
        grad = np.asarray(GRADS[name]) + 0.01 * np.asarray(PARAMS[name])
        np.testing.assert_allclose(sgd[name], -0.1 * (grad + 0.9 * grad), rtol=1e-5)


# After five steps of torch.optim.Adam([w], lr=0.01, weight_decay=0.1) in float64, PyTorch 2.13.0,
# with gradients of factor * [sin t, cos t, t / 10, -1 / t], from [1, -2, 0.5, 3]; by factor.
PYTORCH_ADAM = {
    1.0: [0.967013022, -1.985852794, 0.450787873, 3.034018193],
    0.1: [0.955081954, -1.950632490, 0.449782766, 2.949841771],
}


@pytest.mark.parametrize("factor", PYTORCH_ADAM)
def test_adam_is_that_of_pytorch_after_what_stands_before_it(factor, monkeypatch):
    """A factor before it changes the weight of the L2 penalty, which comes after the method."""
    shrink = METHODS["constant"]._replace(make=lambda: optax.scale(factor))
    monkeypatch.setitem(METHODS, "constant", shrink)
    tx = make_optimizer("constant", "adam", 0.01, 0.1)
    params = jnp.array([1.0, -2.0, 0.5, 3.0])
    state = tx.init(params)
    for t in range(1, 6):
        grads = jnp.array([np.sin(t), np.cos(t), t / 10, -1 / t])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, PYTORCH_ADAM[factor], rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 0.01], ids=["p = 2", "p = 1"])
def test_each_form_of_the_method_is_its_equation(size):
    """The second update, whose exponent is the one that the first step decided."""
    grads = jax.tree.map(lambda grad: size * grad, GRADS)
    kernel = np.asarray(grads["kernel"], np.float64)
    ratio, centered = 4 / abs(np.log(kernel.std(ddof=1))), kernel - kernel.mean()
    factor = ratio if ratio**2 < 0.5 else ratio**2
    for method, update in {
        "none": kernel,
        "centering": centered,
        "constant": 0.4 * centered,
        "scaling": factor * kernel,
        "autoscale": factor * centered,
        "autoscale_p1": ratio * centered,
    }.items():
        updates = updates_of(METHODS[method].make(), 2, grads)
        np.testing.assert_allclose(updates["kernel"], update, rtol=1e-5, atol=1e-6 * size)
        bias = 0.4 * grads["bias"] if method == "constant" else grads["bias"]
        np.testing.assert_allclose(updates["bias"], bias, rtol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grafts_have_one_updates_direction_and_the_others_norm(optimizer):
    flat = {}
    for method in ("none", "autoscale", "autoscale_direction", "autoscale_norm"):
        updates = updates_of(make_optimizer(method, optimizer, 1e-3, 5e-5), steps=3)
        flat[method] = np.concatenate([*map(np.ravel, updates.values())])
    norms = {name: np.linalg.norm(vector) for name, vector in flat.items()}
    for name, direction, norm in [
        ("autoscale_direction", "autoscale", "none"),
        ("autoscale_norm", "none", "autoscale"),
    ]:
        expected = flat[direction] / norms[direction] * norms[norm]
        np.testing.assert_allclose(flat[name], expected, rtol=1e-5, atol=1e-9)
    if optimizer == "sgd":
        assert abs(np.log(norms["none"] / norms["autoscale"])) > 0.4
    nothing = updates_of(graft(optax.set_to_zero(), optax.sgd(0.1)))
    assert not any(np.any(leaf) for leaf in nothing.values())


def test_clip_bounds_the_norm_at_one():
    tx = make_optimizer("clip", "sgd", 1.0, 0.0)
    large = {name: 100 * grad for name, grad in GRADS.items()}
    np.testing.assert_allclose(optax.tree.norm(updates_of(tx, grads=large)), 1, rtol=1e-5)
    np.testing.assert_allclose(updates_of(tx)["bias"], -GRADS["bias"])


def test_the_effect_is_measured_against_the_plain_optimizer():
    tx = make_optimizer("constant", "sgd", 1e-3, 0.0, effect=True)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    plain = updates_of(make_optimizer("none", "sgd", 1e-3, 0.0))
    ratio = optax.tree.norm(updates) / optax.tree.norm(plain)
    assert float(optax.tree.get(state, "norm_ratio")) == pytest.approx(float(ratio), rel=1e-5)
