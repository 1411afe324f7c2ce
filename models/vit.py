"""A Vision Transformer: Dosovitskiy et al. 2021, in the plain form of Beyer et al. 2022."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import xavier_uniform
from jax.typing import DTypeLike


class Attention(nnx.Module):
    """Multi-head self-attention, whose kernels are matrices and whose biases are vectors.

    `nnx.MultiHeadAttention` splits both by heads, and its biases, which have two axes, would count
    as weights.
    """

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, kernel_init=xavier_uniform(), dtype=dtype, rngs=rngs)
        self.heads = heads
        self.qkv = nnx.List([linear(width, width) for _ in range(3)])
        self.out = linear(width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            linear(x).reshape(*x.shape[:-1], self.heads, -1) for linear in self.qkv
        )
        return self.out(nnx.dot_product_attention(query, key, value).reshape(x.shape))


class Block(nnx.Module):
    """Attention, then two linear layers, both with LayerNorm first and a residual connection."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, kernel_init=xavier_uniform(), dtype=dtype, rngs=rngs)
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp1 = linear(width, 4 * width)
        self.mlp2 = linear(4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp2(nnx.gelu(self.mlp1(self.norm2(x))))


class ViT(nnx.Module):
    """A Vision Transformer for small images.

    Patches of `patch` pixels square become tokens by one linear map, to which fixed sines and
    cosines of the patch's place are added; then come `depth` blocks of attention and two linear
    layers, LayerNorm first in each; then a LayerNorm, the mean over all tokens and a linear
    classifier. There is no class token and no dropout.

    Call it on images of shape `(batch, height, width, channels)`; the logits have shape
    `(batch, num_classes)`.

    Args:
      width: number of features of a token, a multiple of `heads` and of 4.
      depth: number of blocks.
      heads: number of attention heads.
      patch: height and width of a patch, in pixels.
      num_classes: number of logits.
      channels: number of channels of the images.
      dtype: dtype of the computation, such as `jnp.bfloat16`. Parameters, the classifier and its
        logits are always float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: when called on images whose height or width is not a multiple of `patch`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import vit_tiny
      >>> model = vit_tiny(num_classes=10, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 16, 16, 3))).shape
      (2, 10)

    References:
      Dosovitskiy et al., `An Image is Worth 16x16 Words
      <https://arxiv.org/abs/2010.11929>`_, 2021

      Beyer et al., `Better plain ViT baselines for ImageNet-1k
      <https://arxiv.org/abs/2205.01580>`_, 2022
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int = 4,
        num_classes: int,
        channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch = patch
        self.stem = nnx.Linear(
            patch * patch * channels,
            width,
            kernel_init=xavier_uniform(),
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.classifier = nnx.Linear(width, num_classes, kernel_init=xavier_uniform(), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        size = self.patch
        if height % size or width % size:
            raise ValueError(
                f"Patches of {size}x{size} pixels do not tile images of {height}x{width}. Crop or "
                "pad the images, or choose another `patch`."
            )
        rows, columns = height // size, width // size
        x = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
        x = self.stem(x.reshape(batch, rows * columns, -1))
        x = x + sines_and_cosines(rows, columns, x.shape[-1]).astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(axis=1, dtype=jnp.float32))


def sines_and_cosines(rows: int, columns: int, width: int) -> jax.Array:
    """Positions on a grid, of shape `(rows * columns, width)`, row by row (Beyer et al. 2022).

    A quarter of the features each is the sine and the cosine of the column and of the row, at
    wavelengths from 2 pi to 10,000 times that.
    """
    y, x = jnp.mgrid[:rows, :columns]
    frequencies = 10_000.0 ** -jnp.linspace(0, 1, width // 4)
    angles = [place.reshape(-1, 1) * frequencies for place in (x, y)]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=1)


vit_tiny = partial(ViT, width=16, depth=2, heads=2)  # for tests
vit = partial(ViT, width=192, depth=6, heads=3)
