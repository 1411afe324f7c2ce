"""Layers are named in the order of the data flow, everywhere the same."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from training.layers import layer_entries, layer_paths, layer_stds

from models import MODELS, resnet8, vgg_tiny, vit_tiny
from tests import oracle
from training import layers

TINY = {
    "resnet": partial(resnet8, widths=(4, 8), shortcut="projection"),
    "vgg": vgg_tiny,
    "vit": vit_tiny,
}


def model_of(name: str) -> nnx.Module:
    return TINY[name](num_classes=3, channels=1, rngs=nnx.Rngs(0))


def test_resnets_go_through_the_stem_the_stages_and_the_classifier():
    assert layer_paths(model_of("resnet")).names == [
        "stem/conv/kernel",
        "stages/0/0/first/conv/kernel",
        "stages/0/0/second/conv/kernel",
        "stages/1/0/first/conv/kernel",
        "stages/1/0/second/conv/kernel",
        "stages/1/0/shortcut/conv/kernel",
        "classifier/kernel",
    ]


def test_attention_reads_before_it_writes():
    names = layer_paths(model_of("vit")).names
    block = [
        "attention/qkv/0",
        "attention/qkv/1",
        "attention/qkv/2",
        "attention/out",
        "mlp1",
        "mlp2",
    ]
    assert names == [
        "stem/kernel",
        *(f"blocks/{i}/{layer}/kernel" for i in range(2) for layer in block),
        "classifier/kernel",
    ]


def test_more_than_ten_blocks_are_in_the_order_of_numbers():
    deep = partial(vit_tiny.func, width=16, depth=11, heads=2)
    names = layer_paths(deep(num_classes=3, channels=1, rngs=nnx.Rngs(0))).names
    blocks = [int(name.split("/")[1]) for name in names if name.startswith("blocks/")]
    assert blocks == sorted(blocks)


@pytest.mark.parametrize("name", MODELS)
def test_paths_leave_a_trace_and_are_all_of_the_layers(name):
    def structure() -> tuple[nnx.Module, layers.LayerPaths]:
        model = MODELS[name].make(num_classes=3, channels=1, rngs=nnx.Rngs(0))
        return model, layer_paths(model)

    model, paths = nnx.eval_shape(structure)
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert sorted(paths.names) == sorted(
        "/".join(map(str, path)) for path, leaf in state if leaf.ndim > 1
    )
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("name", TINY)
def test_statistics_are_those_of_the_layers_with_the_names(name):
    model = model_of(name)
    params, paths = nnx.to_pure_dict(nnx.state(model, nnx.Param)), layer_paths(model)
    stds = jax.jit(partial(layer_stds, paths=paths))(params)
    assert (stds.shape, stds.dtype) == ((len(paths),), jnp.float32)
    for std, path in zip(stds, paths, strict=True):
        leaf = params
        for key in path:
            leaf = leaf[key]
        np.testing.assert_allclose(std, oracle.float64(leaf[...]).std(ddof=1), rtol=1e-5)


def test_entries_are_those_of_the_layers_and_large_ones_are_thinned_out(monkeypatch):
    model = model_of("resnet")
    params, paths = nnx.to_pure_dict(nnx.state(model, nnx.Param)), layer_paths(model)
    kernel = np.ravel(params["classifier"]["kernel"][...])
    np.testing.assert_array_equal(layer_entries(params, paths)[-1], kernel)
    monkeypatch.setattr(layers, "LARGEST_HISTOGRAM", 10)
    np.testing.assert_array_equal(
        layer_entries(params, paths)[-1], kernel[:: len(kernel) // 10 | 1]
    )
