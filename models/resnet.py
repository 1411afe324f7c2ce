"""The residual networks for CIFAR: He et al. 2016, section 4.2."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike

from models.layers import ConvNorm

Shortcut = Literal["identity", "projection"]

# `he_normal` would truncate the normal distribution.
kaiming_fan_in = variance_scaling(2.0, "fan_in", "normal")


class PaddedIdentity(nnx.Module):
    """Option A: every `stride`-th pixel, with zero channels on both sides of the input's."""

    def __init__(self, in_features: int, out_features: int, *, stride: int):
        self.stride = stride
        before = (out_features - in_features) // 2
        self.padding = (before, out_features - in_features - before)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.padding))


class Block(nnx.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        stride: int,
        shortcut: Shortcut,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        conv = partial(ConvNorm, kernel_init=kaiming_fan_in, dtype=dtype, rngs=rngs)
        self.first = conv(in_features, out_features, stride=stride)
        self.second = conv(out_features, out_features)
        if shortcut == "projection" and (stride, in_features) != (1, out_features):
            self.shortcut = conv(in_features, out_features, size=1, stride=stride)
        else:
            self.shortcut = PaddedIdentity(in_features, out_features, stride=stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.second(nnx.relu(self.first(x)))
        return nnx.relu(y + self.shortcut(x))


class ResNet(nnx.Module):
    """A residual network for small images, of depth `2 * len(widths) * blocks + 2`.

    A 3x3 convolution, one stage of residual blocks per width, the mean over all pixels and a linear
    classifier. Every stage but the first starts by halving height and width. Convolutions have no
    bias. Kernels, the classifier's included, start from a normal distribution of variance
    `2 / fan_in` (He et al. 2015, section 2.2).

    Where a stage changes the shape, the shortcut of its first block is one of two from He et al.:

    - `"identity"` (option A, which they use for CIFAR): every second pixel, with zeros for the new
      channels, half of them on each side. It has no parameters.
    - `"projection"` (option B): a 1x1 convolution of stride 2 and batch normalization.

    Call it on images of shape `(batch, height, width, channels)`; the logits have shape
    `(batch, num_classes)`. `model.train()` normalizes by the batch and updates the running
    statistics, `model.eval()` normalizes by those. A new model is in training mode.

    Args:
      blocks: number of residual blocks per stage: n in the paper.
      widths: number of channels of each stage; they must not decrease.
      num_classes: number of logits.
      channels: number of channels of the images.
      shortcut: `"identity"` or `"projection"`.
      dtype: dtype of the computation, such as `jnp.bfloat16`. Parameters, batch statistics, the
        classifier and its logits are always float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: if `shortcut` is neither of the two.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import resnet8
      >>> model = resnet8(widths=(8, 8), num_classes=10, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 16, 16, 3))).shape
      (2, 10)

    References:
      He et al., `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2016, section 4.2

      He et al., `Delving Deep into Rectifiers <https://arxiv.org/abs/1502.01852>`_, 2015
    """

    def __init__(
        self,
        *,
        blocks: int,
        widths: Sequence[int] = (16, 32, 64),
        num_classes: int,
        channels: int = 3,
        shortcut: Shortcut = "identity",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if shortcut not in get_args(Shortcut):
            valid = " or ".join(map(repr, get_args(Shortcut)))
            raise ValueError(f"shortcut must be {valid}, got {shortcut!r}.")
        features = widths[0]
        self.stem = ConvNorm(channels, features, kernel_init=kaiming_fan_in, dtype=dtype, rngs=rngs)
        block = partial(Block, shortcut=shortcut, dtype=dtype, rngs=rngs)
        self.stages = nnx.List()
        for width in widths:
            first = block(features, width, stride=2 if self.stages else 1)
            rest = [block(width, width, stride=1) for _ in range(blocks - 1)]
            self.stages.append(nnx.List([first, *rest]))
            features = width
        self.classifier = nnx.Linear(features, num_classes, kernel_init=kaiming_fan_in, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(images))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.classifier(x.mean(axis=(1, 2), dtype=jnp.float32))


resnet8 = partial(ResNet, blocks=1)  # for tests, with narrow `widths`
resnet20 = partial(ResNet, blocks=3)
resnet56 = partial(ResNet, blocks=9)
resnet110 = partial(ResNet, blocks=18)
