"""A step and what it records, on one device and on eight, and the order of a network's layers."""

import dataclasses
import functools
import logging
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from models import MODELS, resnet8, vgg_tiny, vit_tiny
from optax_autoscale import autoscale
from tests import oracle
from training import step as step_module
from training.data import Dataset
from training.options import Experiment, option
from training.step import Program, TrainState, count_steps, layer_paths, name_of

EXPERIMENT = Experiment(
    "cifar10", batch_size=16, learning_rate=3e-3, cutmix_probability=0.5, effect=True
)
NUM_TRAIN, NUM_TEST, STEPS = 70, 23, 4
EPOCHS = ("epochs", "decay_epochs", "warmup_epochs")
TINY = MODELS["resnet20"]._replace(make=partial(resnet8, widths=(16,)))


def make_data() -> Dataset:
    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 3, count).astype(np.int32)
        images = rng.integers(0, 60, (count, 16, 16, 1)) + 60 * labels[:, None, None, None]
        return images.astype(np.uint8), labels

    return Dataset(*split(NUM_TRAIN), *split(NUM_TEST), num_classes=3, mean=(0.4,), std=(0.25,))


DATA = make_data()
BLANK = np.zeros_like(DATA.train_images)  # as the padding is: a crop changes nothing
# One step of an epoch, on all images, that changes the parameters by what the method makes of it.
WHOLE = dataclasses.replace(EXPERIMENT, batch_size=NUM_TRAIN, cutmix_probability=0.0)
WHOLE = dataclasses.replace(WHOLE, optimizer="sgd", learning_rate=1.0)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch, compile_faster):
    monkeypatch.setitem(MODELS, "resnet20", TINY)


@functools.cache
def program(it: Experiment = EXPERIMENT, count: int = 1, fsdp: bool = False) -> Program:
    devices, axes = jax.devices()[:count], (AxisType.Auto,)
    return Program(it, DATA, jax.make_mesh((count,), ("data",), axes, devices=devices), fsdp=fsdp)


def take_step(of: Program, state: TrainState, images: np.ndarray = DATA.train_images):
    order = of.epoch_order(np.int32(1 + int(state.step) // of.steps_per_epoch))
    return of.train_step(state, of.put(images, DATA.train_labels), order)


@functools.cache
def run(it: Experiment = EXPERIMENT, epochs: int = 8, count: int = 1, fsdp: bool = False):
    """The states before the first epoch and after each, and what each step measured."""
    of = program(it, count, fsdp)
    states, history = [of.first_state()], []
    for _ in range(epochs):
        state = states[-1]
        for _ in range(STEPS):
            state, measured = take_step(of, state)
            history.append([float(value) for value in measured if value is not None])
        states.append(state)
    return states, np.array(history)


def test_epochs_are_permutations_keyed_by_seed_and_epoch():
    orders = [
        np.asarray(program(dataclasses.replace(EXPERIMENT, seed=seed)).epoch_order(np.int32(epoch)))
        for seed, epoch in ((0, 1), (0, 2), (1, 1))
    ]
    assert all(sorted(order) == list(range(NUM_TRAIN)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    np.testing.assert_array_equal(program().epoch_order(np.int32(1)), orders[0])


@pytest.mark.parametrize("epoch", [1, 2])
def test_recorded_statistics_are_means_over_the_epochs_steps(epoch):
    states, history = run()
    means, steps = program().epoch_means(states[epoch]), slice(STEPS * (epoch - 1), STEPS * epoch)
    loss, std, factors, ratios = history[steps].T
    np.testing.assert_allclose(means["train_loss"], loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(means["global_std"], std.mean(), rtol=1e-5)
    bases = 4 / np.abs(np.log(history[:, 1]))
    exponents = np.where(np.arange(len(bases)) == 0, 2, 1 if bases[0] ** 2 < 0.5 else 2)
    np.testing.assert_allclose(factors, (bases**exponents)[steps], rtol=1e-4)
    np.testing.assert_allclose(means["scale_factor"], factors.mean(), rtol=1e-6)
    np.testing.assert_allclose(means["scale_factor_max"], factors.max(), rtol=1e-6)
    assert means["exponent"] == exponents[-1]
    if epoch == 1:
        np.testing.assert_allclose(means["update_norm_ratio_by_step"], ratios, rtol=1e-6)
    else:
        assert means["update_norm_ratio_by_step"] is None
    assert ratios.min() <= means["update_norm_ratio"] <= ratios.max()  # from the epoch's sums
    assert 0.3 < means["update_norm_ratio"] < 1.5
    assert 0.9 < means["update_cosine"] < 1
    assert int(states[epoch].step) == STEPS * epoch


@functools.cache
def first_gradients() -> tuple[float, Any]:
    """The loss and the gradients of a first step on all blank images, computed otherwise."""
    graph, params, batch_stats = nnx.split(
        TINY.make(num_classes=3, channels=1, rngs=nnx.Rngs(EXPERIMENT.seed)),
        *(nnx.Param, nnx.BatchStat),
    )

    @jax.jit
    @jax.value_and_grad
    def loss_and_grads(params):
        network = nnx.merge(graph, params, batch_stats, copy=True)
        log_probabilities = jax.nn.log_softmax(network((BLANK / 255 - 0.4) / 0.25))
        labels = 0.9 * np.eye(3)[DATA.train_labels] + 0.1 / 3
        return -(log_probabilities * labels).sum(axis=1).mean()

    loss, grads = loss_and_grads(params)
    return loss, nnx.to_pure_dict(grads)


@functools.cache
def first_step(method: str):
    of = program(dataclasses.replace(WHOLE, method=method))
    return of, *take_step(of, of.first_state(), BLANK)


# One that changes nothing, one with a state, one without, and one that a second optimizer follows.
@pytest.mark.parametrize("method", ["none", "autoscale", "zscore", "autoscale_direction"])
def test_a_record_is_of_the_raw_gradients_whatever_the_method(method):
    of, state, measured = first_step(method)
    expected_loss, grads = first_gradients()
    np.testing.assert_allclose(measured.loss, expected_loss, rtol=1e-5)
    expected_std = oracle.global_std(jax.tree.leaves(grads))
    np.testing.assert_allclose(measured.global_std, expected_std, rtol=1e-4)
    means = of.epoch_means(state)
    assert list(means["layer_std"]) == list(map(name_of, of.layers))
    for path in of.layers:
        leaf = functools.reduce(lambda tree, key: tree[key], path, grads)
        std = oracle.float64(leaf).std(ddof=1)
        np.testing.assert_allclose(means["layer_std"][name_of(path)], std, rtol=1e-3)
    assert means["scale_factor"] == means["scale_factor_max"] == measured.scale_factor
    scales = method.startswith("autoscale")
    assert (means["scale_factor"] is not None) == (means["exponent"] is not None) == scales
    # Gradients stay on the device: all that a step hands out is a state and numbers.
    assert jax.tree.structure(state) == jax.tree.structure(of.first_state())
    assert all(leaf.shape == () for leaf in jax.tree.leaves(measured))


def test_the_effect_of_the_first_step_is_that_of_two_runs():
    """Both runs start from the same parameters and see the same batch."""

    def length(state: TrainState) -> float:
        changes = jax.tree.map(lambda new, old: oracle.float64(new - old), state.params, before)
        return float(optax.tree.norm(changes))

    (of, ours, measured), (_, plain, _) = first_step("autoscale"), first_step("none")
    before = of.first_state().params
    assert float(measured.norm_ratio) == pytest.approx(length(ours) / length(plain), rel=1e-4)
    means = of.epoch_means(plain)  # without a method there is no effect
    assert (means["update_norm_ratio"], means["update_cosine"]) == (1.0, 1.0)
    assert means["update_norm_ratio_by_step"] == [1.0]


def test_a_run_compiles_each_of_its_functions_once_and_is_the_same_without_the_meter(caplog):
    of, history = program(dataclasses.replace(EXPERIMENT, effect=False)), []
    data = of.put(DATA.train_images, DATA.train_labels)
    tests = of.put(DATA.test_images, DATA.test_labels)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        state = of.first_state()
        of.compile(state, data, tests)
        for epoch in (1, 2, 3):
            order = of.epoch_order(np.int32(epoch))
            for _ in range(STEPS):
                state, measured = of.train_step(state, data, order)
                history.append([float(value) for value in measured[:3]])
            of.evaluate(state, tests)
    compiled = re.findall(r"^Compiling jit\((_\w+)\)", "\n".join(caplog.messages), re.MULTILINE)
    assert sorted(compiled) == ["_epoch_order", "_evaluate", "_first_state", "_step"]
    np.testing.assert_array_equal(history, run()[1][: 3 * STEPS, :3])
    assert of.epoch_means(state)["update_norm_ratio"] is None


def test_training_learns_and_repeats_itself_and_another_seed_is_another_run():
    (states, history), (again, history_again) = run(), run.__wrapped__()
    assert history[-STEPS:, 0].mean() < 0.85 * history[:STEPS, 0].mean()
    np.testing.assert_array_equal(history, history_again)
    for a, b in zip(*map(jax.tree.leaves, (states[-1], again[-1])), strict=True):
        np.testing.assert_array_equal(a, b)
    other = program(dataclasses.replace(EXPERIMENT, seed=1)).first_state()
    assert (np.array(take_step(program(), other)[1]) != history[0]).all()


def test_batches_are_cropped_and_of_cifar_flipped_and_mixed():
    def batch(images: np.ndarray = DATA.train_images, **options) -> tuple[np.ndarray, np.ndarray]:
        of = program(dataclasses.replace(WHOLE, batch_size=16, **options))
        data = images.reshape(NUM_TRAIN, -1), DATA.train_labels
        x, y = jax.jit(of.batch)(run()[0][0], data, jnp.arange(NUM_TRAIN))
        return np.asarray(x), np.asarray(y)

    (plain, labels), (flipped, _) = batch(dataset="digits"), batch()
    mixed, mixed_labels = batch(cutmix_probability=1.0)
    expected = 0.9 * np.eye(3)[DATA.train_labels[:16]] + 0.1 / 3
    np.testing.assert_allclose(labels, expected, rtol=1e-6)
    np.testing.assert_allclose(batch(BLANK)[0], (0 / 255 - 0.4) / 0.25, rtol=1e-6)
    same = (flipped == plain).all(axis=(1, 2, 3))
    assert (same ^ (flipped[:, :, ::-1] == plain).all(axis=(1, 2, 3))).all()
    assert 0 < same.sum() < 16
    halves = np.where(np.arange(16)[:, None] < 8, 0, np.full_like(BLANK, 255))
    digits, _ = batch(halves, dataset="digits")  # which are not mirrored
    assert (digits[:, :, :8].sum(axis=(1, 2, 3)) <= digits[:, :, 8:].sum(axis=(1, 2, 3))).all()
    assert (mixed != flipped).any()
    assert (mixed_labels != labels).any()


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    of = program(dataclasses.replace(EXPERIMENT, precision="bfloat16"))
    state, measured = take_step(of, of.first_state())
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((state, measured))}
    assert dtypes == {"int32", "uint32", "float32"}
    half, full = np.array(measured)[:2], run()[1][0, :2]
    np.testing.assert_allclose(half, full, rtol=0.05)
    assert (half != full).all()


def evaluate(of: Program, state: TrainState) -> tuple[float, float]:
    return of.evaluate(state, of.put(DATA.test_images, DATA.test_labels))


@pytest.mark.parametrize("fsdp", [False, True], ids=["data parallel", "fsdp, with the effect"])
def test_eight_devices_equal_one(fsdp):
    it, (alone, expected) = dataclasses.replace(EXPERIMENT, effect=fsdp), run()
    (*_, split), history = run(it, 2, 8, fsdp)
    of, alone = program(it, 8, fsdp), alone[2]
    np.testing.assert_allclose(history, expected[: 2 * STEPS, : 3 + fsdp], rtol=1e-4)
    # BatchNorm has seen the whole batch, not an eighth of it.
    stats = (jax.tree.leaves(state.batch_stats) for state in (split, alone))
    for a, b in zip(*stats, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(evaluate(of, split), evaluate(program(), alone), rtol=1e-3)
    means, expected = of.epoch_means(split), program().epoch_means(alone)
    for name in ("update_norm_ratio", "update_cosine"):
        assert means[name] == (pytest.approx(expected[name], rel=1e-4) if fsdp else None)
    large = [leaf for leaf in jax.tree.leaves(split) if leaf.size >= 1024]
    assert len(large) == 2 * (3 + 2 * fsdp)  # kernels, and two moments of each for each Adam
    for leaf in large:
        assert leaf.addressable_shards[0].data.size * (8 if fsdp else 1) == leaf.size

    # Of autoscale: no gather, and at most one all-reduce, whatever the number of layers.
    tx, params = autoscale(), split.params
    text = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
    found = re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)\(", text)
    assert found == ["all-reduce"] * fsdp


@pytest.mark.parametrize(("eval_batch", "devices"), [(5, 1), (23, 1), (100, 1), (16, 8)])
def test_evaluation_counts_every_image_once(eval_batch, devices, monkeypatch):
    state = run()[0][-1]
    monkeypatch.setattr(step_module, "EVAL_BATCH", eval_batch)
    of = program.__wrapped__(count=devices)
    images = jnp.asarray((DATA.test_images / 255 - 0.4) / 0.25, jnp.float32)
    logits = oracle.float64(nnx.jit(lambda model, images: model(images))(of.model(state), images))
    log_sum = np.log(np.exp(logits).sum(axis=1))
    expected = (log_sum - logits[np.arange(NUM_TEST), DATA.test_labels]).mean()
    state = jax.device_put(state, jax.tree.leaves(of.first_state())[0].sharding)
    seen = []
    tests = of.put(DATA.test_images, DATA.test_labels)
    loss, accuracy = of.evaluate(state, tests, seen.append)
    assert len(seen) == -(-NUM_TEST // eval_batch) - 1  # of the last, `epoch` tells
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert accuracy == pytest.approx((logits.argmax(axis=1) == DATA.test_labels).mean())
    assert of.evaluation_steps == pytest.approx(23 / 16 / 3)


# Six steps an epoch: 357,913,941 epochs are 2,147,483,646 steps, and one more is too many.
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 51, "; it must be at most 50, the training images"),
        ("batch_size", 20, "; it must be a multiple of 8, the devices"),
        *((name, 357_913_942, "; it must be at most 357913941,") for name in EPOCHS),
    ],
)
def test_batches_that_do_not_fit_and_steps_that_cannot_be_counted(name, value, message):
    mesh, data = jax.make_mesh((8,), ("data",)), SimpleNamespace(train_labels=np.zeros(50))
    most = Experiment(batch_size=8, **dict.fromkeys(EPOCHS, 357_913_941))
    assert count_steps(most, data, mesh) == 6
    with pytest.raises(ValueError, match=f"^{option(name)} is {value}{message}"):
        count_steps(dataclasses.replace(most, **{name: value}), data, mesh)


def test_the_learning_rate_is_the_optimizers():
    rates = [program().learning_rate(epoch) for epoch in (1, 30, 31)]
    assert rates == pytest.approx([3e-3, 3e-3, 0.75 * 3e-3])


SMALL = {
    "resnet": partial(resnet8, widths=(4, 8), shortcut="projection"),
    "vgg": vgg_tiny,
    "vit": vit_tiny,
    "deep": partial(vit_tiny.func, width=16, depth=11, heads=2),
}
BLOCK = ("attention/qkv/0", "attention/qkv/1", "attention/qkv/2", "attention/out", "mlp1", "mlp2")


@pytest.mark.parametrize("make", [*SMALL, *MODELS])
def test_layers_are_in_the_order_of_the_data_flow_and_leave_a_trace(make):
    paths: list = []

    def structure() -> nnx.Module:
        build = SMALL[make] if make in SMALL else MODELS[make].make
        model = build(num_classes=3, channels=1, rngs=nnx.Rngs(0))
        paths.extend(layer_paths(model))
        return model

    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(structure), nnx.Param))
    names = list(map(name_of, paths))
    assert sorted(names) == sorted(name_of(path) for path, leaf in state if leaf.ndim > 1)
    if make == "resnet":
        block = "stages/1/0/"
        assert names == [
            *("stem/conv/kernel", "stages/0/0/first/conv/kernel", "stages/0/0/second/conv/kernel"),
            *(f"{block}{part}/conv/kernel" for part in ("first", "second", "shortcut")),
            "classifier/kernel",
        ]
    if make in ("vit", "deep"):  # attention reads before it writes; block 10 follows 9
        blocks = {name.split("/")[1] for name in names if name.startswith("blocks/")}
        inner = [f"blocks/{i}/{layer}/kernel" for i in range(len(blocks)) for layer in BLOCK]
        assert names == ["stem/kernel", *inner, "classifier/kernel"]
