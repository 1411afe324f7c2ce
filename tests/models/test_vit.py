import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import vit, vit_tiny


def layer_norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def gelu(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(params, x, heads):
    query, key, value = (np.split(linear(params["qkv"][i], x), heads, -1) for i in range(3))
    mixed = []
    for q, k, v in zip(query, key, value, strict=True):
        weights = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
    return linear(params["out"], np.concatenate(mixed, -1))


def reference(params, images, width=16, depth=2, heads=2, patch=4):
    """The tiny network in NumPy and float64, patch by patch and head by head."""
    tokens = []
    for row in range(images.shape[1] // patch):
        for column in range(images.shape[2] // patch):
            rows = slice(row * patch, (row + 1) * patch)
            columns = slice(column * patch, (column + 1) * patch)
            pixels = images[:, rows, columns].reshape(len(images), -1)
            frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
            place = [f(at * frequencies) for at in (column, row) for f in (np.sin, np.cos)]
            tokens.append(linear(params["stem"], pixels) + np.concatenate(place))
    x = np.stack(tokens, 1)
    for i in range(depth):
        block = params["blocks"][i]
        x = x + attention(block["attention"], layer_norm(block["norm1"], x), heads)
        x = x + linear(block["mlp2"], gelu(linear(block["mlp1"], layer_norm(block["norm2"], x))))
    return linear(params["classifier"], layer_norm(params["norm"], x).mean(1))


def abstract(build, **options):
    return nnx.eval_shape(lambda: build(num_classes=3, **options, rngs=nnx.Rngs(0)))


def test_values_are_those_of_the_papers():
    graph, state = nnx.split(abstract(vit_tiny))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape)), state)
    images = rng.normal(size=(2, 8, 12, 3))

    logits = jax.jit(lambda state: nnx.merge(graph, state)(jnp.float32(images)))(state)
    params = jax.tree.map(np.float64, nnx.to_pure_dict(state))
    np.testing.assert_allclose(logits, reference(params, images), rtol=1e-4, atol=1e-5)


def test_the_size_is_that_of_its_matrices():
    params = nnx.state(abstract(vit), nnx.Param)
    block = 4 * (192 * 192 + 192) + 2 * 4 * 192 * 192 + 4 * 192 + 192 + 4 * 192
    expected = 48 * 192 + 192 + 6 * block + 2 * 192 + 192 * 3 + 3
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_computes_in_bfloat16_and_answers_in_float32():
    graph, state = nnx.split(abstract(vit_tiny, dtype=jnp.bfloat16))
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(
        state, jnp.ones((2, 16, 16, 3))
    )
    operands = [
        equation.invars[0].aval.dtype
        for equation in program.jaxpr.eqns
        if equation.primitive.name == "dot_general"
    ]
    assert operands[-1] == program.out_avals[0].dtype == jnp.float32
    assert set(operands[:-1]) == {jnp.dtype("bfloat16")}


def test_images_that_patches_do_not_tile_are_an_error():
    graph, state = nnx.split(abstract(vit_tiny))
    with pytest.raises(ValueError, match=r"4x4 pixels do not tile images of 10x16"):
        jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, jnp.ones((1, 10, 16, 3)))
