"""The mathematics on the guide's pages: the identity before Adam, Lemma 1 and Theorem 2.

Lemma and theorem are measured on quadratics with known smoothness and noise. The loss is L(w) =
sum(h * w**2) / 2, so that beta = max(h). One example's gradient has noise of variance sigma**2 in
all, a batch of b examples sigma**2 / b: the paper's sigma_b squared. Both statements treat a_t as a
number that does not depend on the noise of step t. The method computes it from that very sample;
how much that matters is measured too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_autoscale import (
    AutoscaleState,
    autoscale,
    center_layers,
    global_std,
    scale_by_global_std,
)
from tests import pages

SHAPE = (16, 12)
VARIED = np.linspace(0.2, 1.0, 192).reshape(SHAPE)
EQUAL = np.ones(SHAPE)
BETA = 1.0
START = 1e-2 * np.random.default_rng(0).standard_normal(SHAPE)
SIGMA = 0.3  # the norm of START is about 0.14


def loss(w, h=EQUAL):
    return np.sum(h * w**2, (-2, -1)) / 2


def noise(seed, batch_size, *samples):
    normal = np.random.default_rng(seed).standard_normal((*samples, *SHAPE))
    return SIGMA / np.sqrt(normal[0].size * batch_size) * normal


def scaled(grads):
    """Updates and factors of the method's first step, each gradient on its own."""
    tx = scale_by_global_std()
    update = jax.jit(jax.vmap(lambda grad: tx.update(grad, tx.init(None))))
    updates, state = update(jnp.asarray(grads, jnp.float32))
    return np.asarray(updates, np.float64), np.asarray(state.scale_factor, np.float64)


def mean_and_error(values):
    """The mean, and its standard error."""
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def known_scale_factors(h, steps):
    """a_1 ... a_T of a run without noise: known before any noise is drawn."""
    tx = scale_by_global_std()
    w, state, factors = jnp.asarray(START, jnp.float32), tx.init(None), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(h * w, state)
        w = w - updates
        factors.append(float(state.scale_factor))
    return np.array(factors)


def noisy_runs(h, step_sizes, batch_size, runs=200):
    """Squared gradient norms (runs, T) and final losses (runs,) of SGD with given step sizes."""
    w, norms = np.broadcast_to(START, (runs, *SHAPE)), []
    for t, step_size in enumerate(step_sizes):
        grads = h * w
        norms.append(np.sum(grads**2, (1, 2)))
        w = w - step_size * (grads + noise(100 + t, batch_size, runs))
    return np.stack(norms, 1), loss(w, h)


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("falling", [False, True])
def test_theorem_2_holds_as_a_mean_weighted_by_the_step_sizes(falling, batch_size):
    """Equation 4 moves eta * a_t out of the sum over t, which is right where it is constant."""
    a = known_scale_factors(VARIED, steps=40)
    assert a[-1] < 0.7 * a[0]
    step_sizes = a / (a.max() * BETA) if falling else np.full(40, 0.5 / BETA)
    norms, final = noisy_runs(VARIED, step_sizes, batch_size)
    bound = 2 * (loss(START, VARIED) - final)
    bound = bound + np.sum(step_sizes**2) * BETA * SIGMA**2 / batch_size
    slack, error = mean_and_error(bound - norms @ step_sizes)
    assert slack > 5 * error


def test_centring_turns_the_gradient_of_the_bound_into_the_centered_gradient():
    """Centering is an orthogonal projection P: <grad, P grad> = |P grad|^2, and noise only shrinks.

    Lemma 1 then bounds the descent by the centered gradient, which is 0 at more points than the
    gradient is: those where all entries of a layer's gradient are equal.
    """
    w = START + 0.01
    grads = VARIED * w + noise(2, 16, 1000)
    updates, state = jax.jit(
        jax.vmap(lambda grad: autoscale().update(grad, autoscale().init(None)))
    )(jnp.asarray(grads, jnp.float32))
    a = np.asarray(state.scale_factor).reshape(-1, 1, 1)
    centered = np.asarray(updates) / a
    measured, error = mean_and_error(loss(w - centered / BETA, VARIED))
    bound = loss(w, VARIED) - SHAPE[0] * SHAPE[1] / 2 * np.var(VARIED * w) + SIGMA**2 / 32
    assert measured + 5 * error < bound

    stuck, _ = autoscale().update(jnp.full(SHAPE, 0.5), autoscale().init(None))
    np.testing.assert_array_equal(stuck, 0)


def test_with_many_entries_the_scale_factor_hardly_depends_on_the_noise():
    """Computed from the sample, a_t varies by less than p / |ln s| / sqrt(2 N), here 2.4 %."""
    grads = VARIED * START + noise(3, 16, 1000)
    updates, a = scaled(grads)
    assert 0.005 < a.std() / a.mean() < 2 / 4.3 / np.sqrt(2 * START.size)

    eta = 1 / (BETA * a.max())
    measured, error = mean_and_error(loss(START - eta * updates, VARIED))
    bound = loss(START, VARIED) - eta * a.mean() / 2 * np.sum((VARIED * START) ** 2)
    bound += eta**2 * np.mean(a**2) * BETA * SIGMA**2 / 32
    assert measured + 5 * error < bound


def test_with_two_entries_a_scale_factor_read_off_the_sample_breaks_lemma_1():
    """Two equally likely noises, both steps within eta * a_t <= 1 / beta: exact, no sampling.

    The larger of the two gradients gets the larger factor. The proof takes a_t out of the
    expectation, as if it did not go together with the noise.
    """
    direction = np.array([[1.0, -1.0]]) / np.sqrt(2.0)
    w, sigma = 2e-3 * direction, 1.5e-3  # beta = 1: the gradient is w
    grads = np.stack([w + sigma * direction, w - sigma * direction])
    updates, a = scaled(grads)
    eta = 1 / a.max()
    after = np.mean(loss(w - eta * updates, 1.0))
    bound = loss(w, 1.0) - np.mean(eta * a) / 2 * np.sum(w**2)
    bound += np.mean((eta * a) ** 2) * sigma**2 / 2
    assert after > 1.05 * bound

    after = np.mean(loss(w - grads, 1.0))  # eta * a_t = 1 for both noises: the lemma again
    np.testing.assert_allclose(after, loss(w, 1.0) - np.sum(w**2) / 2 + sigma**2 / 2)


@pytest.mark.parametrize("std", [1.001, 0.7, 3.0])
def test_near_one_the_scale_factor_leaves_its_claimed_range_and_descent_fails(std):
    """A rate of 0.5 / beta is safe for every a_t in (0, 1]; here a_t is 16 / ln(s)^2 > 13."""
    w = jnp.asarray(START / START.std(ddof=1) * std, jnp.float32)

    def ratio(**kwargs):
        tx = optax.chain(scale_by_global_std(**kwargs), optax.sgd(0.5 / BETA))
        return loss(w + tx.update(BETA * w, tx.init(w))[0]) / loss(w)

    assert ratio() > 10
    assert ratio(max_scale=1.0) < 0.3


@pytest.mark.parametrize("exponent", [1, 2])
def test_the_scale_factor_is_in_its_claimed_range_exactly_outside_the_band(exponent):
    """0 < a_t <= 1 where s <= e^-4 or s >= e^4, for either exponent."""
    state = AutoscaleState(jnp.int32(exponent), jnp.float32(0), jnp.float32(1))
    tx, base = scale_by_global_std(), jnp.array([[0.0], [np.sqrt(2.0)]])

    def factor(log_std):
        return tx.update(base * jnp.exp(log_std), state)[1].scale_factor

    logs = np.linspace(-20, 20, 402)
    factors = np.asarray(jax.jit(jax.vmap(factor))(jnp.asarray(logs, jnp.float32)))
    assert (factors > 0).all()
    np.testing.assert_array_equal(factors <= 1, abs(logs) >= 4)


@pytest.fixture(scope="module")
def page():
    return pages.run(pages.DOCS / "behavior.md")


def test_the_table_of_the_page_on_behavior(page):
    losses, factors, distances = [], [], []
    for optimizer in (optax.adam(1e-2), optax.sgd(0.1)):
        rows = (optax.identity(), optax.scale(0.1), center_layers(), autoscale())
        params, last = zip(
            *(page["train"](optax.chain(row, optimizer)) for row in rows), strict=True
        )
        losses.append([page["loss_fn"](w) for w in params])
        factors.append(last[-1])
        size = optax.tree.norm(optax.tree.sub(params[0], page["start"]))
        distances.append([optax.tree.norm(optax.tree.sub(w, params[0])) / size for w in params])
    np.testing.assert_allclose(losses[0], [0.0075, 0.0075, 0.0071, 0.035], rtol=0.03)
    np.testing.assert_allclose(losses[1], [0.087, 0.183, 0.087, 0.111], rtol=0.01)
    np.testing.assert_allclose(distances[0], [0, 0.00002, 0.53, 0.59], rtol=0.02, atol=1e-5)
    np.testing.assert_allclose(factors, [0.39, 0.48], rtol=0.02)
    grads = jax.grad(page["loss_fn"])(page["start"])
    _, state = autoscale().update(grads, autoscale().init(grads))
    np.testing.assert_allclose(state.scale_factor, 2.35, rtol=0.01)


def adam_with_other_memories(penalty, learning_rate=1e-2, b1=0.9, b2=0.999, eps=1e-8):
    """What `docs/method.md` proves `autoscale` before Adam to be, with a penalty in between."""

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return zeros, zeros, jnp.ones(()), 0, 0

    def update(grads, state, params):
        mu, nu, before, exponent, count = state
        ratio = 4 / (jnp.abs(jnp.log(global_std(grads))) + 1e-8)
        a = jnp.where(exponent == 1, ratio, ratio**2)
        exponent = jnp.where(exponent == 0, jnp.where(a < 0.5, 1, 2), exponent)
        centered, _ = center_layers().update(grads, ())
        grads = jax.tree.map(lambda g, w: g + penalty / a * w, centered, params)
        mu = jax.tree.map(lambda m, g: b1 * before / a * m + (1 - b1) * g, mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * (before / a) ** 2 * v + (1 - b2) * g**2, nu, grads)
        count += 1

        def step(m, v):
            m, v = m / (1 - b1**count), v / (1 - b2**count)
            return -learning_rate * m / (jnp.sqrt(v) + eps / a)

        return jax.tree.map(step, mu, nu), (mu, nu, a, exponent, count)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(("decay", "penalty"), [(0, 0), (0.1, 0), (0, 1e-3)])
def test_before_adam_the_scaling_is_exactly_adam_with_other_memories(page, decay, penalty):
    with jax.enable_x64(True):
        start = {name: layer["kernel"].astype(float) for name, layer in page["start"].items()}
        x, y = page["x"].astype(float), page["y"].astype(float)

        def loss_fn(params):
            return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["output"] - y) ** 2)

        def train(*transformations):
            tx = optax.chain(*transformations)

            def step(carry, _):
                params, state = carry
                updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
                factor = optax.tree.get(state, "scale_factor", 1.0)
                return (optax.apply_updates(params, updates), state), factor

            carry = start, tx.init(start)
            (params, _), factors = jax.jit(lambda: jax.lax.scan(step, carry, length=400))()
            return np.concatenate([leaf.ravel() for leaf in params.values()]), factors

        adam = optax.adamw(1e-2, weight_decay=decay)
        scaled, factors = train(autoscale(), optax.add_decayed_weights(penalty), adam)
        decoupled = optax.add_decayed_weights(-1e-2 * decay)
        expected, _ = train(adam_with_other_memories(penalty), decoupled)
        moved = scaled - np.concatenate([leaf.ravel() for leaf in start.values()])
    assert factors.max() > 3 * factors.min()
    assert np.abs(moved).max() > 0.8
    assert np.abs(scaled - expected).max() < 1e-13
