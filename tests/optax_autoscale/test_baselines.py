import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_autoscale import (
    gradient_centralization,
    gradient_normalization,
    zscore_normalization,
)
from tests import oracle

METHODS = {
    "centralization": gradient_centralization,
    "normalization": gradient_normalization,
    "zscore": zscore_normalization,
}


def random_grads(scale: float = 1e-3, dtype: str = "float32"):
    rng = np.random.default_rng(0)
    return {
        "conv": jnp.asarray(scale * (rng.standard_normal((3, 3, 4, 8)) + 0.5), dtype),
        "bias": jnp.asarray(scale * rng.standard_normal(8), dtype),
        "dense": jnp.asarray(scale * (rng.standard_normal((8, 10)) - 1), dtype),
    }


def apply(tx, grads):
    updates, _ = tx.update(grads, tx.init(grads))
    return updates


def assert_equals(updates, expected):
    for name, reference in expected.items():
        ulp = float(jnp.finfo(updates[name].dtype).eps)
        np.testing.assert_allclose(
            oracle.float64(updates[name]),
            reference,
            rtol=max(ulp, 1e-5),
            atol=1e-5 * np.abs(reference).max(),
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_centralization_has_one_mean_per_output_feature(dtype):
    grads = random_grads(dtype=dtype)
    expected = {name: oracle.float64(grad) for name, grad in grads.items()}
    for name in ("conv", "dense"):
        rows = expected[name].reshape(-1, expected[name].shape[-1])
        expected[name] = (rows - rows.mean(0)).reshape(expected[name].shape)
    assert_equals(apply(gradient_centralization(), grads), expected)


def test_optax_centralize_is_another_method_on_flax_kernels():
    grads = random_grads()
    ours, theirs = apply(gradient_centralization(), grads), apply(optax.centralize(), grads)
    np.testing.assert_allclose(ours["conv"].mean((0, 1, 2)), 0, atol=1e-9)
    assert jnp.abs(theirs["conv"].mean((0, 1, 2))).max() > 1e-5
    np.testing.assert_allclose(theirs["conv"].mean((1, 2, 3)), 0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_normalization_gives_all_leaves_together_the_norm_alpha(alpha, dtype):
    grads = random_grads(dtype=dtype)
    wide = {name: oracle.float64(grad) for name, grad in grads.items()}
    norm = np.sqrt(sum((grad**2).sum() for grad in wide.values()))
    expected = {name: alpha * grad / norm for name, grad in wide.items()}
    assert_equals(apply(gradient_normalization(alpha), grads), expected)


def test_zero_gradients_stay_zero():
    zeros = jax.tree.map(jnp.zeros_like, random_grads())
    for method in METHODS.values():
        for update in jax.tree.leaves(apply(method(), zeros)):
            np.testing.assert_array_equal(update, 0)


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e3])
def test_zscore_standardizes_each_layer(scale):
    grads = random_grads(scale)
    expected = {name: oracle.float64(grad) for name, grad in grads.items()}
    for name in ("conv", "dense"):
        grad = expected[name]
        expected[name] = (grad - grad.mean()) / (np.std(grad, ddof=1) + 1e-8)
    assert_equals(apply(zscore_normalization(), grads), expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_contract(method):
    grads = random_grads(dtype="bfloat16") | {"none": None, "scalar": jnp.float16(0.5)}
    eager = apply(method(), grads)
    jitted = jax.jit(lambda grads: apply(method(), grads))(grads)
    assert jax.tree.structure(eager) == jax.tree.structure(grads)
    for grad, update, compiled in zip(*map(jax.tree.leaves, (grads, eager, jitted)), strict=True):
        assert update.dtype == compiled.dtype == grad.dtype
        np.testing.assert_allclose(
            oracle.float64(update), oracle.float64(compiled), rtol=1e-2, atol=1e-6
        )
    assert apply(method(), {}) == {}
    with pytest.raises(TypeError, match=r"\['steps'\] is int32"):
        apply(method(), {"steps": jnp.ones((2, 2), jnp.int32)})


def test_hyperparameters_may_be_traced():
    grads = random_grads()
    tx = optax.inject_hyperparams(gradient_normalization)(alpha=2.0)
    state = tx.init(grads)
    updates, _ = jax.jit(tx.update)(grads, state)
    np.testing.assert_allclose(optax.tree.norm(updates), 2.0, rtol=1e-5)
