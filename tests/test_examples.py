"""The examples train successfully."""

import re
import runpy
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from examples import transformer
from optax_autoscale import autoscale, exclude

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_faster")]

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(capsys):
    def run(name, **settings):
        runpy.run_path(str(EXAMPLES / name))["main"](**settings)
        return capsys.readouterr().out

    return run


def test_flax_classifier(run):
    out = run("flax_classifier.py", epochs=3)
    accuracies = [float(percent) for percent in re.findall(r"accuracy ([\d.]+)%", out)]
    assert len(accuracies) == 3
    assert accuracies[-1] > 65  # the largest of the four classes is less than half of the points


def test_equinox_recurrent(run):
    out = run("equinox_recurrent.py", epochs=5)
    errors = [float(error) for error in re.findall(r"error ([\d.]+)", out)]
    assert len(errors) == 5
    assert errors[-1] < 0.1  # that of the best constant is 0.225


@pytest.fixture
def small(monkeypatch):
    for name, size in {"WIDTH": 16, "DEPTH": 3, "CONTEXT": 24}.items():
        monkeypatch.setattr(transformer, name, size)


def test_transformer(small, capsys, tmp_path):
    transformer.main(learning_rate=1e-2, steps=200, picture=tmp_path / "stds.png")
    losses = [float(loss) for loss in re.findall(r"validation ([\d.]+)", capsys.readouterr().out)]
    _, validation = transformer.load_text()
    frequencies = np.bincount(validation) / len(validation)
    assert losses[1] < losses[0] < stats.entropy(frequencies)  # it knows more than letters' shares
    picture = matplotlib.image.imread(tmp_path / "stds.png")
    assert picture.shape == (900, 1200, 4)
    assert picture.std() > 0.1


def test_the_transformer_sees_the_past_alone_and_starts_from_uniform_bytes(small):
    model = transformer.Transformer(nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (8, 24), 0, 256)
    before, after = model(tokens), model(tokens.at[:, 10].add(1))
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(-1).all()
    assert transformer.losses(model, tokens).mean() == pytest.approx(np.log(256), abs=0.02)


def test_a_scan_over_blocks_is_the_blocks_one_after_the_other(small):
    model = transformer.Transformer(nnx.Rngs(0))
    tokens = jnp.arange(48).reshape(2, 24)
    x = model.tokens(tokens) + model.positions(jnp.arange(24))
    for block in range(3):
        x = jax.tree.map(lambda leaf, i=block: leaf[i], model.blocks)(x)
    np.testing.assert_allclose(model(tokens), model.head(model.norm(x)), rtol=1e-4, atol=1e-5)


def test_stacked_blocks_are_scaled_as_written_out(small):
    grads = nnx.to_pure_dict(nnx.state(transformer.Transformer(nnx.Rngs(0)), nnx.Param))
    blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], grads["blocks"]) for i in range(3)]
    tx = autoscale(layer_axes=exclude("embedding"))
    expected, _ = tx.update(written_out := grads | {"blocks": blocks}, tx.init(written_out))
    tx = transformer.METHODS["autoscale_no_embeddings"]
    updates, _ = tx.update(grads, tx.init(grads))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected["blocks"])
    chex.assert_trees_all_close(updates, expected | {"blocks": stacked}, rtol=1e-4, atol=1e-7)
