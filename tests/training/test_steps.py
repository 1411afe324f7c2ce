import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from training.config import Experiment
from training.program import Program, TrainState

from models import MODELS, resnet8
from tests import oracle
from training.data import Dataset

EXPERIMENT = Experiment(batch_size=16, learning_rate=3e-3)
NUM_TRAIN, NUM_TEST = 70, 23
STEPS = NUM_TRAIN // EXPERIMENT.batch_size


def make_data() -> Dataset:
    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 3, count).astype(np.int32)
        images = rng.integers(0, 60, (count, 16, 16, 1)) + 60 * labels[:, None, None, None]
        return images.astype(np.uint8), labels

    return Dataset(*split(NUM_TRAIN), *split(NUM_TEST), num_classes=3, mean=(0.4,), std=(0.25,))


DATA = make_data()


TINY = MODELS["resnet20"]._replace(make=functools.partial(resnet8, widths=(8,)))


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(MODELS, "resnet20", TINY)


@functools.cache
def program(it: Experiment = EXPERIMENT) -> Program:
    """The program on one device."""
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    return Program(it, DATA, mesh)


def take_step(it: Experiment, state: TrainState, images: np.ndarray = DATA.train_images, **kwargs):
    """The next state, and what the step measured."""
    data = program(it).put(images, DATA.train_labels)
    order = program(it).epoch_order(np.int32(1 + int(state.step) // program(it).steps_per_epoch))
    return program(it).train_step(state, data, order, **kwargs)


@functools.cache
def run(it: Experiment = EXPERIMENT, epochs: int = 1):
    """The state after some epochs, and what each step returned."""
    state, history = program(it).first_state(), []
    for _ in range(epochs * STEPS):
        state, measured = take_step(it, state)
        history.append(tuple(map(float, (measured.loss, measured.global_std))))
    return state, np.array(history)


def test_epochs_are_permutations_keyed_by_seed_and_epoch():
    orders = [
        np.asarray(program(dataclasses.replace(EXPERIMENT, seed=seed)).epoch_order(np.int32(epoch)))
        for seed, epoch in ((0, 1), (0, 2), (1, 1))
    ]
    for order in orders:
        assert sorted(order) == list(range(NUM_TRAIN))
    assert len({tuple(order.tolist()) for order in orders}) == 3
    np.testing.assert_array_equal(program().epoch_order(np.int32(1)), orders[0])


def test_recorded_statistics_are_means_over_the_epochs_steps():
    state, history = run(epochs=2)
    means = program().epoch_means(state)
    second = history[STEPS:]
    np.testing.assert_allclose(means["train_loss"], second[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(means["global_std"], second[:, 1].mean(), rtol=1e-5)
    ratios = (4 / np.abs(np.log(history[:, 1]))) ** 2
    assert means["exponent"] == (1 if ratios[0] < 0.5 else 2)
    np.testing.assert_allclose(
        means["scale_factor"], (ratios[STEPS:] ** (means["exponent"] / 2)).mean(), rtol=1e-4
    )
    assert int(state.step) == 2 * STEPS


def updates_by_step(it: Experiment, epochs: int) -> list[np.ndarray]:
    """What each step changed, all parameters in one vector."""
    state, updates = program(it).first_state(), []
    for _ in range(epochs * STEPS):
        before = state.params  # a step leaves it as it is, and a checkpoint may be reading it
        state, _ = take_step(it, state)
        change = jax.tree.map(lambda new, old: oracle.float64(new - old), state.params, before)
        updates.append(np.concatenate([*map(np.ravel, jax.tree.leaves(change))]))
    return updates


def test_the_effect_of_the_first_step_is_that_of_two_runs():
    """Both runs start from the same parameters and see the same batch."""
    it = dataclasses.replace(EXPERIMENT, optimizer="sgd", learning_rate=1.0, effect=True)
    _, measured = take_step(it, program(it).first_state())
    ours = updates_by_step(it, 1)[0]
    plain = updates_by_step(dataclasses.replace(it, method="none"), 1)[0]
    assert float(measured.norm_ratio) == pytest.approx(
        np.linalg.norm(ours) / np.linalg.norm(plain), rel=1e-4
    )


def test_the_recorded_effect_is_that_of_the_epochs_sums():
    it = dataclasses.replace(EXPERIMENT, effect=True)
    first, _ = run(it)
    state, history = run(it, epochs=2)
    means = [program().epoch_means(s) for s in (first, state)]
    by_step = means[0]["update_norm_ratio_by_step"]
    assert len(by_step) == STEPS
    assert min(by_step) <= means[0]["update_norm_ratio"] <= max(by_step)
    assert means[1]["update_norm_ratio_by_step"] is None
    assert 0.3 < means[1]["update_norm_ratio"] < 1.5
    assert 0.9 < means[1]["update_cosine"] < 1
    np.testing.assert_array_equal(history, run(epochs=2)[1])  # training is what it was


def test_no_method_has_no_effect():
    state, _ = run(dataclasses.replace(EXPERIMENT, method="none", effect=True))
    means = program().epoch_means(state)
    assert (means["update_norm_ratio"], means["update_cosine"]) == (1.0, 1.0)
    assert means["update_norm_ratio_by_step"] == [1.0] * STEPS
    assert program().epoch_means(run()[0])["update_norm_ratio"] is None


# All pixels 0, as the padding is: a crop changes nothing.
BLANK = np.zeros_like(DATA.train_images)


@functools.cache
def first_gradients():
    """The loss and the gradients of a first step on all blank images, computed otherwise."""
    graph, params, batch_stats = nnx.split(
        TINY.make(num_classes=3, channels=1, rngs=nnx.Rngs(EXPERIMENT.seed)),
        *(nnx.Param, nnx.BatchStat),
    )

    @jax.jit
    def loss_and_grads(params):
        def loss_fn(params):
            network = nnx.merge(graph, params, batch_stats, copy=True)
            log_probabilities = jax.nn.log_softmax(network((BLANK / 255 - 0.4) / 0.25))
            labels = 0.9 * np.eye(3)[DATA.train_labels] + 0.1 / 3
            return -(log_probabilities * labels).sum(axis=1).mean()

        return jax.value_and_grad(loss_fn)(params)

    return loss_and_grads(params)


# One that changes nothing, one with a state, one without, and one that a second optimizer follows.
@pytest.mark.parametrize("method", ["none", "autoscale", "zscore", "autoscale_direction"])
def test_a_record_is_of_the_raw_gradients_whatever_the_method(method):
    it = dataclasses.replace(EXPERIMENT, method=method, batch_size=NUM_TRAIN)
    state, (loss, global_std, scale_factor, _, raw) = take_step(
        it, program(it).first_state(), BLANK, gradients=True
    )
    expected_loss, grads = first_gradients()
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(global_std, oracle.global_std(jax.tree.leaves(grads)), rtol=1e-4)
    for a, b in zip(jax.tree.leaves(raw), jax.tree.leaves(nnx.to_pure_dict(grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    means = program(it).epoch_means(state)
    assert means["scale_factor"] == scale_factor
    scales = method.startswith("autoscale")
    assert (means["scale_factor"] is not None) == scales
    assert (means["exponent"] is not None) == scales
    kernel = oracle.float64(grads["classifier"]["kernel"][...])
    np.testing.assert_allclose(
        means["layer_std"]["classifier/kernel"], kernel.std(ddof=1), rtol=1e-4
    )


def test_training_learns_and_repeats_itself():
    state, history = run(epochs=8)
    again, history_again = run.__wrapped__(epochs=8)
    assert history[-STEPS:, 0].mean() < 0.75 * history[:STEPS, 0].mean()
    np.testing.assert_array_equal(history, history_again)
    for a, b in zip(*map(jax.tree.leaves, (state, again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_seed_is_another_run():
    _, other = run(dataclasses.replace(EXPERIMENT, seed=1))
    assert (other != run()[1]).all()


def test_cutmix_and_flip_are_part_of_the_cifar_step():
    plain = dataclasses.replace(EXPERIMENT, dataset="cifar10")
    mixed = dataclasses.replace(plain, cutmix_probability=1.0)
    losses = [run(config)[1][0, 0] for config in (EXPERIMENT, plain, mixed)]
    assert len(set(losses)) == 3


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    state, history = run(dataclasses.replace(EXPERIMENT, precision="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"int32", "uint32", "float32"}
    _, expected = run()
    np.testing.assert_allclose(history[0], expected[0], rtol=0.05)
    assert (history[0] != expected[0]).all()
