import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_autoscale import global_std, layer_std
from tests import oracle


def tree(seed: int, scale: float = 1.0, mean: float = 0.0, dtype: str = "float32"):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(scale * (rng.standard_normal((5, 7)) + mean), dtype),
        "bias": jnp.asarray(rng.standard_normal(7), dtype),
        "conv": jnp.asarray(scale * (rng.standard_normal((3, 3, 2, 4)) - mean), dtype),
    }


def test_global_std_of_a_hand_worked_case():
    # Entries 0, 2, 2, 4, 2: mean 2, squared deviations 4 + 4, over N - 1 = 4.
    grads = {"a": jnp.array([[0.0, 2.0]]), "b": jnp.array([[2.0], [4.0], [2.0]]), "c": jnp.ones(9)}
    np.testing.assert_allclose(global_std(grads), np.sqrt(2.0), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-14, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_global_std_equals_the_oracle(scale, mean):
    grads = tree(0, scale, mean)
    expected = oracle.global_std(list(grads.values()))
    np.testing.assert_allclose(global_std(grads), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_std_is_float32_or_wider(dtype):
    grads = tree(0, dtype=dtype)
    stds = layer_std(grads)
    assert global_std(grads).dtype == jnp.float32
    assert stds["bias"] is None
    for name in ("kernel", "conv"):
        assert (stds[name].shape, stds[name].dtype) == ((), jnp.float32)
        expected = np.std(oracle.float64(grads[name]), ddof=1)
        np.testing.assert_allclose(stds[name], expected, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(
    ("shape", "dtype", "scale"),
    [
        ((1, 7), "float32", 1e-14),
        ((16, 16), "float32", 1e8),
        ((3, 3, 16, 16), "float32", 1.0),
        ((32, 32), "float16", 1e-3),
        ((64, 100), "bfloat16", 1e8),
        ((3, 3, 64, 64), "float32", 1e-14),
        ((1000, 1000), "float32", 1.0),
    ],
)
def test_the_promised_accuracy(shape, dtype, scale, ratio):
    """Within 1e-5 up to a mean of one deviation; beyond that the error grows with its square."""
    rng = np.random.default_rng(0)
    grad = jnp.asarray(scale * (rng.standard_normal(shape) + ratio), dtype)
    wide = oracle.float64(grad)
    bound = 5e-6 * (1 + (wide.mean() / wide.std()) ** 2)
    expected = oracle.global_std([grad])
    np.testing.assert_allclose(global_std({"w": grad}), expected, rtol=bound)


def test_beyond_the_range_of_float32_squares():
    signs = jnp.where(jnp.arange(64).reshape(8, 8) % 2, 1.0, -1.0)
    deviations = [float(global_std({"w": signs * scale})) for scale in (1e-18, 1e-24, 1e18, 1e20)]
    exact = np.sqrt(64 / 63)
    np.testing.assert_allclose(deviations, [1e-18 * exact, 0, 1e18 * exact, np.inf], rtol=1e-5)


def test_a_million_half_precision_entries_do_not_stagnate():
    rng = np.random.default_rng(0)
    grads = {"w": jnp.asarray(rng.standard_normal((1000, 1000)) + 1, jnp.bfloat16)}
    expected = oracle.global_std(list(grads.values()))
    np.testing.assert_allclose(global_std(grads), expected, rtol=1e-5)


def test_an_empty_tree_has_no_deviation():
    assert global_std({}) == 0
    assert layer_std({"bias": jnp.ones(3)}) == {"bias": None}


def test_layer_std_of_stacked_layers():
    kernels = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 5)))
    stds = layer_std({"kernel": kernels}, layer_axes=lambda path, leaf: (-1, -2))
    np.testing.assert_allclose(stds["kernel"], np.std(kernels, axis=(1, 2), ddof=1), rtol=1e-5)


def test_snapshot_follows_the_raw_gradients():
    params = tree(0)
    tx = optax.chain(optax.snapshot("layer_std", layer_std), optax.adam(1e-3))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in (1, 2):
        grads = tree(seed, 1e-3)
        _, state = update(grads, state, params)
        stds = optax.tree.get(state, "layer_std")
        np.testing.assert_allclose(stds["conv"], np.std(grads["conv"], ddof=1), rtol=1e-5)
