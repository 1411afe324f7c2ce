"""The closed form against Optax's Adam, a small run, and the report from its records."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import MODELS
from optax_autoscale import measure_effect
from reproduction import effect
from tests.programs import TINY
from training import devices
from training.data import Dataset
from training.step import Program, TrainState

ROOT = Path(__file__).parents[2]
FIRST_AND_SECOND = [[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 8.0]]
EXPERIMENT = dataclasses.replace(effect.EXPERIMENT, batch_size=16)


@pytest.fixture
def small(compile_faster, monkeypatch):
    monkeypatch.setitem(MODELS, "resnet20", TINY)
    monkeypatch.setattr(effect, "COMPARED", ("scaling", "clip"))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    labels = rng.integers(0, 3, 40).astype(np.int32)
    return Dataset(*(images, labels, images[:8], labels[:8]), 3, mean=(0.5,), std=(0.25,))


def measured_by_optax(factors: np.ndarray, grads: jax.Array) -> jax.Array:
    """The ratio of norms that `measure_effect` gives for factors that differ from step to step."""
    scaled = optax.scale_by_schedule(lambda step: jnp.asarray(factors, jnp.float32)[step])
    adam = optax.adam(1e-3, eps=0)
    tx = measure_effect(optax.chain(scaled, adam), adam)

    def step(state, grad):
        _, state = tx.update(grad, state)
        return state, optax.tree.get(state, "norm_ratio")

    return jax.jit(lambda: jax.lax.scan(step, tx.init(grads[0]), grads)[1])()


def test_the_closed_form_is_exact_where_only_the_factor_changes():
    factors = 0.5 + 0.4 * np.cos(np.arange(30) / 4)
    direction = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    ratios = measured_by_optax(factors, jnp.stack([direction] * 30))
    np.testing.assert_allclose(ratios, effect.closed_form(np.ones(30), factors), rtol=1e-4)
    np.testing.assert_allclose(effect.closed_form(np.ones(30), np.full(30, 0.3)), 1, rtol=1e-12)


def test_the_closed_form_holds_for_noise_whose_size_falls():
    sizes = np.exp(-np.arange(60) / 40)
    factors = np.sqrt(sizes)
    noise = jax.random.normal(jax.random.key(0), (60, 4000))
    ratios = measured_by_optax(factors, noise * jnp.asarray(sizes[:, None], jnp.float32))
    expected = effect.closed_form(sizes, factors)
    assert expected[-1] < 0.75  # far from the 1 of a constant factor
    np.testing.assert_allclose(ratios, expected, rtol=0.05)


def test_entries_are_small_whose_rms_is_below_their_layers_mean():
    adam, params = optax.adam(1.0), {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    first, second = ({"kernel": jnp.array(it), "bias": jnp.ones(2)} for it in FIRST_AND_SECOND)
    start = TrainState(jnp.int32(0), None, params, None, adam.init(params), None, None, None)
    # Root mean squares 4 0 0 0 and the mean 1; 2.8 0 0 5.7 and the mean 2.
    assert effect.small_entries(first, start) == 0.75
    after = start._replace(step=jnp.int32(1), opt_state=adam.update(first, start.opt_state)[1])
    assert effect.small_entries(second, after) == 0.5


@pytest.mark.slow
def test_shadows_see_the_plain_runs_gradients_and_do_not_change_it(small):
    lines = list(effect.measure(EXPERIMENT, small, 4))
    program = Program(EXPERIMENT, small, devices.make_mesh())
    data = program.put(small.train_images, small.train_labels)
    state = program.first_state()
    for step, line in enumerate(lines):
        order = program.epoch_order(np.int32(1 + step // program.steps_per_epoch))
        state, measured = program.train_step(state, data, order)
        assert line["loss"] == pytest.approx(float(measured.loss), rel=1e-4)
        assert line["global_std"] == pytest.approx(float(measured.global_std), rel=1e-4)
        assert line["scale_factor"].keys() == {"scaling"}
        for name in ("scaling", "clip", *effect.OTHERS):
            # Adam's first step is the gradient's signs, whatever its size.
            assert step or line["norm_ratio"][name] == pytest.approx(1, rel=1e-3)
    assert lines[0]["cosine"]["scaling"] == pytest.approx(1, abs=1e-4)
    (first, second), *later = [[line["cosine"][it] for it in effect.OTHERS] for line in lines]
    assert first == second < 0.9  # without a past there is no difference yet
    assert all(second > first for first, second in later)


def test_a_seed_is_run_once_and_an_interrupted_one_again(monkeypatch, tmp_path):
    path, runs = tmp_path / "results" / "seed0.jsonl", []

    def measure(experiment, dataset, steps):
        runs.append((experiment, dataset))
        yield {"step": 1, "loss": 1.0}
        if len(runs) == 1:
            raise KeyboardInterrupt
        yield {"step": 2, "loss": 1.0}

    monkeypatch.setattr(effect, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        effect.record(EXPERIMENT, None, 2, path)
    for _ in range(2):
        effect.record(EXPERIMENT, None, 2, path)
    assert runs == [(EXPERIMENT, None)] * 2
    first, *steps = map(json.loads, path.read_text().splitlines())
    assert first["config"] == dataclasses.asdict(EXPERIMENT)
    assert [line["step"] for line in steps] == [1, 2]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_no_records_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no records"):
        effect.write_report(tmp_path)


def test_the_committed_report_is_that_of_the_committed_records(tmp_path):
    folder = ROOT / "results/effect"
    assert tuple(effect.read_all(folder)) == effect.NETWORKS
    for path in folder.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    effect.write_report(tmp_path)
    assert (tmp_path / "REPORT.md").read_text() == (folder / "REPORT.md").read_text()
    assert (tmp_path / "vgg7.png").exists()
