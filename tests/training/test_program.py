"""The same program on one device and on eight, with and without split parameters."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from training.config import Experiment
from training.program import Program

from models import MODELS, resnet8
from tests import oracle
from training import program as program_module
from training.data import Dataset

NUM_TEST = 23
EXPERIMENT = Experiment(dataset="cifar10", batch_size=16, cutmix_probability=0.5)
METERED = dataclasses.replace(EXPERIMENT, effect=True)
TINY = MODELS["resnet20"]._replace(make=partial(resnet8, widths=(16,)))


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(MODELS, "resnet20", TINY)


def make_data() -> Dataset:
    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        images = rng.integers(0, 256, (count, 16, 16, 1)).astype(np.uint8)
        return images, rng.integers(0, 3, count).astype(np.int32)

    return Dataset(*split(70), *split(NUM_TEST), num_classes=3, mean=(0.5,), std=(0.25,))


DATA = make_data()


def mesh_of(count: int) -> Mesh:
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def run(count: int, *, fsdp: bool = False, steps: int = 6, experiment: Experiment = EXPERIMENT):
    program = Program(experiment, DATA, mesh_of(count), fsdp=fsdp)
    data = program.put(DATA.train_images, DATA.train_labels)
    state, history = program.first_state(), []
    for step in range(steps):
        order = program.epoch_order(np.int32(1 + step // program.steps_per_epoch))
        state, measured = program.train_step(state, data, order)
        history.append([float(v) for v in measured[:4] if v is not None])
    return program, state, np.array(history)


def evaluate(program, state):
    return program.evaluate(state, program.put(DATA.test_images, DATA.test_labels))


@pytest.fixture(scope="module")
def alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet20", TINY)
        return run(1, experiment=METERED)


# Measuring the effect changes nothing in the training, so one reference serves both.
@pytest.mark.parametrize(
    ("fsdp", "experiment"),
    [(False, EXPERIMENT), (True, METERED)],
    ids=["data parallel", "fsdp, with the effect"],
)
def test_eight_devices_equal_one(fsdp, experiment, alone):
    program, state, history = run(8, fsdp=fsdp, experiment=experiment)
    reference, reference_state, expected = alone
    np.testing.assert_allclose(history, expected[:, : 4 if experiment.effect else 3], rtol=1e-4)
    # BatchNorm has seen the whole batch, not an eighth of it.
    for a, b in zip(
        *(jax.tree.leaves(s.batch_stats) for s in (state, reference_state)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        evaluate(program, state), evaluate(reference, reference_state), rtol=1e-3
    )
    means, expected_means = program.epoch_means(state), reference.epoch_means(reference_state)
    for name in ("update_norm_ratio", "update_cosine"):
        if experiment.effect:
            assert means[name] == pytest.approx(expected_means[name], rel=1e-4)
        else:
            assert means[name] is None


def test_fsdp_splits_parameters_and_optimizer_state():
    _, state, _ = run(8, fsdp=True, steps=1)
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.size >= 1024]
    assert len(large) == 2 * 3  # two kernels, and the two moments that Adam has of each
    for leaf in large:
        assert 8 * leaf.addressable_shards[0].data.size == leaf.size


@pytest.mark.parametrize("fsdp", [False, True], ids=["data parallel", "fsdp"])
def test_the_methods_part_of_the_step_gathers_nothing(fsdp):
    """Of autoscale: no gather, and at most one all-reduce, whatever the number of layers."""
    _, state, _ = run(8, fsdp=fsdp, steps=1)
    from optax_autoscale import autoscale

    tx = autoscale()
    compiled = jax.jit(tx.update).lower(state.params, tx.init(state.params)).compile()
    found = re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)\(", compiled.as_text())
    assert found == (["all-reduce"] if fsdp else [])


@pytest.mark.parametrize(("eval_batch", "devices"), [(5, 1), (23, 1), (100, 1), (16, 8)])
def test_evaluation_counts_every_image_once(eval_batch, devices, alone, monkeypatch):
    _, state, _ = alone
    monkeypatch.setattr(program_module, "EVAL_BATCH", eval_batch)
    program = Program(EXPERIMENT, DATA, mesh_of(devices))
    model = alone[0].model(state)
    logits = oracle.float64(model(jnp.asarray((DATA.test_images / 255 - 0.5) / 0.25, jnp.float32)))
    log_sum = np.log(np.exp(logits).sum(axis=1))
    expected = (log_sum - logits[np.arange(NUM_TEST), DATA.test_labels]).mean()
    state = jax.device_put(state, jax.tree.leaves(program.first_state())[0].sharding)
    loss, accuracy = evaluate(program, state)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert accuracy == pytest.approx((logits.argmax(axis=1) == DATA.test_labels).mean())


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [(100, "more than the 70 training images"), (20, "which is not a multiple of the 8 devices")],
)
def test_batches_that_do_not_fit(batch_size, message):
    with pytest.raises(ValueError, match=f"--batch-size is {batch_size}, {message}"):
        Program(Experiment(batch_size=batch_size), DATA, mesh_of(8))


def test_the_learning_rate_is_the_optimizers():
    program = Program(EXPERIMENT, DATA, mesh_of(1))
    assert program.learning_rate(30) == pytest.approx(1e-3)
    assert program.learning_rate(31) == pytest.approx(0.75e-3)
