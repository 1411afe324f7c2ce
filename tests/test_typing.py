# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false
"""Typical uses, run here and accepted by pyright in its strict mode: `make types`.

What is switched off above is about Optax, which is not marked as typed, and functions of JAX that
are typed in part.
"""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

from optax_autoscale import (
    AutoscaleState,
    EffectSums,
    autoscale,
    center_layers,
    default_layer_axes,
    exclude,
    global_std,
    gradient_centralization,
    gradient_normalization,
    layer_std,
    layers,
    measure_effect,
    scale_by_global_std,
    zscore_normalization,
)

PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3) / 100, "bias": jnp.ones(3)}


def only_kernels(path: tuple[Any, ...], leaf: jax.Array) -> tuple[int, ...] | None:
    return default_layer_axes(path, leaf) if "kernel" in jax.tree_util.keystr(path) else None


def test_the_transformations():
    tx = autoscale(eps=1e-8, max_scale=1.0, layer_axes=only_kernels, axis_name=None)
    assert_type(tx, optax.GradientTransformationExtraArgs)
    autoscale(eps=jnp.float32(1e-8), max_scale=jnp.float32(1.0), axis_name="model")
    autoscale(layer_axes=exclude("embedding", "positions"), axis_name=("data", "model"))
    autoscale(layer_axes=lambda path, leaf: [0, 1] if leaf.ndim == 2 else None)
    assert_type(scale_by_global_std(max_scale=1.0), optax.GradientTransformationExtraArgs)
    assert_type(center_layers(layer_axes=only_kernels), optax.GradientTransformation)
    assert_type(gradient_normalization(alpha=2.0), optax.GradientTransformation)
    assert_type(zscore_normalization(layer_axes=only_kernels), optax.GradientTransformation)
    methods = [autoscale, gradient_centralization, gradient_normalization, zscore_normalization]
    for method in methods:
        tx: optax.GradientTransformation = method()
        tx.init(PARAMS)


def test_the_measurements():
    assert assert_type(global_std(PARAMS), jax.Array).shape == ()
    assert set(layer_std(PARAMS, layer_axes=only_kernels)) == {"kernel", "bias"}
    assert assert_type(layers(PARAMS), dict[str, tuple[int, ...]]) == {"kernel": (2, 3)}
    tx = optax.chain(optax.snapshot("layer_std", layer_std), autoscale(), optax.adamw(1e-3))
    tx = assert_type(measure_effect(tx, optax.adamw(1e-3)), optax.GradientTransformationExtraArgs)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    optax.apply_updates(PARAMS, updates)
    sums: EffectSums = optax.tree.get(state, "effect_sums")
    assert -1 <= float(assert_type(sums.cosine, jax.Array)) <= 1
    assert float(optax.tree.get(state, "scale_factor")) > 0


def test_the_state():
    def describe(state: AutoscaleState) -> str:
        exponent = assert_type(state.exponent, jax.Array)
        return f"s={state.global_std:.3f} a={state.scale_factor:.3f} p={int(exponent)}"

    state = AutoscaleState(jnp.int32(1), jnp.float32(0.25), jnp.float32(0.5))
    assert describe(state) == "s=0.250 a=0.500 p=1"
