"""The methods of Table 1."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import collectives, in_shard_map, make_mesh, mesh_grads, random_grads
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optax_autoscale import (
    gradient_centralization,
    gradient_normalization,
    zscore_normalization,
)
from tests import oracle

settings = hypothesis.settings(deadline=None, max_examples=60)


def apply(tx, grads):
    return tx.update(grads, tx.init(grads))[0]


def centralize(grad):
    rows = grad.reshape(-1, grad.shape[-1])
    return (rows - rows.mean(0)).reshape(grad.shape) if grad.ndim > 1 else grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e3])
def test_equal_their_equations(scale, dtype):
    grads = random_grads(0, scale, dtype=dtype)
    wide = {name: oracle.float64(grad) for name, grad in grads.items()}
    norm = np.sqrt(sum((grad**2).sum() for grad in wide.values()))
    zscores = {name: oracle.zscore(g) if g.ndim > 1 else g for name, g in wide.items()}
    for tx, expected in [
        (gradient_centralization(), {name: centralize(g) for name, g in wide.items()}),
        (gradient_normalization(), {name: g / norm for name, g in wide.items()}),
        (gradient_normalization(alpha=2.5), {name: 2.5 * g / norm for name, g in wide.items()}),
        (zscore_normalization(), zscores),
    ]:
        for name, update in apply(tx, grads).items():
            assert update.dtype == dtype
            rtol = max(float(jnp.finfo(dtype).eps), 1e-5)
            atol = 1e-5 * np.abs(expected[name]).max()
            np.testing.assert_allclose(oracle.float64(update), expected[name], rtol, atol)


def test_zero_gradients_stay_zero():
    zeros = jax.tree.map(jnp.zeros_like, random_grads())
    for method in (gradient_centralization, gradient_normalization, zscore_normalization):
        for update in jax.tree.leaves(apply(method(), zeros)):
            np.testing.assert_array_equal(update, 0)


def test_the_norm_may_be_traced():
    tx = optax.inject_hyperparams(gradient_normalization)(alpha=2.0)
    updates, _ = jax.jit(tx.update)(random_grads(), tx.init(random_grads()))
    np.testing.assert_allclose(optax.tree.norm(updates), 2.0, rtol=1e-5)


zscore = jax.jit(lambda grad: apply(zscore_normalization(), {"w": grad})["w"])


def assert_standardized(grad, tolerance=1e-6):
    """Close to the oracle, relative to the largest entry, and within the bound for n entries."""
    expected, got = oracle.zscore(grad), oracle.float64(zscore(grad))
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)
    assert np.abs(got).max() <= (grad.size - 1) / np.sqrt(grad.size) * (1 + tolerance)


@hypothesis.given(
    shape=st.sampled_from([(1, 2), (3, 5), (16, 16), (3, 3, 16, 33)]),
    seed=st.integers(0, 2**31),
    log_scale=st.floats(-6, 6),
    log_ratio=st.floats(-2, 5),
    sign=st.sampled_from([-1, 1]),
)
@settings
def test_zscore_of_layers_whose_mean_is_up_to_100_000_deviations(
    shape, seed, log_scale, log_ratio, sign
):
    entries = np.random.default_rng(seed).standard_normal(shape)
    deviations = (entries - entries.mean()) / entries.std(ddof=1)
    grad = jnp.asarray(10**log_scale * (deviations + sign * 10**log_ratio), jnp.float32)
    hypothesis.assume(jnp.ptp(grad) > 0)  # of two entries, rounding may have left one
    assert_standardized(grad)


def test_zscore_of_a_million_entries_with_a_large_mean():
    entries = np.random.default_rng(0).standard_normal((1000, 1000))
    assert_standardized(jnp.asarray(entries + 1e5, jnp.float32))


@hypothesis.given(
    base=st.floats(2.0**-40, 2.0**40, width=32),
    ulps=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    zeros=st.integers(0, 2000),
)
@settings
def test_no_zscore_exceeds_its_bound(base, ulps, zeros):
    """The worst layers: all but a few entries equal, and those are the next numbers of float32."""
    grad = np.full((1, 2007), base, np.float32)
    grad[0, zeros : zeros + 7] += np.array(ulps) * np.spacing(np.float32(base))
    assert np.abs(zscore(grad)).max() <= (grad.size - 1) / np.sqrt(grad.size) * (1 + 1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1, 1e6 / 3, 7e17, 1 + 2j])
@pytest.mark.parametrize("size", [1, 3, 37, 100_003])
def test_zscore_of_equal_entries_is_zero(size, value):
    grad = jnp.full((1, size), value)
    np.testing.assert_array_equal(zscore(grad), 0)
    np.testing.assert_array_equal(apply(zscore_normalization(eps=0.0), grad), 0)


def test_zscore_of_other_types_and_of_stacks():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((3, 8, 9)) + 1j * rng.standard_normal((3, 8, 9))
    kernels = {
        "complex64": jnp.asarray(noise + 1000j, jnp.complex64),
        "bfloat16": jnp.asarray(noise.real + 20, jnp.bfloat16),
        "float32": jnp.asarray(noise.real + np.array([0, 1e3, 1e5]).reshape(3, 1, 1), jnp.float32),
    }
    updates = apply(zscore_normalization(layer_axes=lambda path, leaf: (1, 2)), kernels)
    for name, got in updates.items():
        assert got.dtype == name
        for layer, kernel in zip(got, kernels[name], strict=True):
            wide = np.asarray(layer.astype(jnp.float32) if name == "bfloat16" else layer)
            rtol = 2.0**-8 if name == "bfloat16" else 0
            np.testing.assert_allclose(wide, oracle.zscore(kernel), rtol=rtol, atol=4e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_entry_shows_in_its_own_layer_only(bad):
    grads = random_grads(0, 1e-3)
    expected = apply(zscore_normalization(), grads)["conv"]
    updates = apply(zscore_normalization(), grads | {"dense": grads["dense"].at[0, 0].set(bad)})
    assert np.isnan(updates["dense"]).all()
    np.testing.assert_array_equal(updates["conv"], expected)


@pytest.mark.parametrize("manual", [False, True], ids=["jit", "shard_map"])
def test_zscore_takes_two_all_reduces(manual):
    """Their means are up to 50,000 deviations, where a single pass in float32 sees none."""
    mesh, spec = make_mesh(), P(("data", "model"))
    grads = {name: g + 100 * i for i, (name, g) in enumerate(mesh_grads().items())}
    del grads["conv"]
    sharded = jax.device_put(grads, NamedSharding(mesh, spec))

    def normalize(grads, axis_name=None):
        return zscore_normalization(axis_name=axis_name).update(grads, ())[0]

    update = jax.jit(normalize)
    if manual:
        update = in_shard_map(lambda grads: normalize(grads, ("data", "model")), spec, spec)
    updates = update(sharded)
    for name, grad in grads.items():
        expected = grad if name == "bias" else oracle.zscore(grad)
        np.testing.assert_allclose(updates[name], expected, rtol=0, atol=1e-5)
    # The CPU backend removes the barrier between the two passes before it merges all-reduces.
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    compiled = update.lower(sharded).compile(compiler_options=options)
    assert collectives(compiled) == ["all-reduce"] * 2
