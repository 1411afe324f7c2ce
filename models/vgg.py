"""VGG with and without batch normalization, for CIFAR: Simonyan and Zisserman 2015, Table 1."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal, variance_scaling
from jax.typing import DTypeLike

from models.layers import ConvNorm

# `he_normal` would truncate the normal distribution, and take the fan-in.
kaiming_fan_out = variance_scaling(2.0, "fan_out", "normal")


class VGG(nnx.Module):
    """A plain convolutional network: stages of 3x3 convolutions with a max-pool between them.

    Every convolution has a bias; batch normalization follows unless `batch_norm` is false. After
    the last stage come the mean over all pixels and one linear classifier, in place of the paper's
    last max-pool and three linear layers. There is no dropout. Kernels start from a normal
    distribution of variance `2 / fan_out` (He et al. 2015, section 2.2), the classifier from one of
    standard deviation 0.01, biases from zero.

    Call it on images of shape `(batch, height, width, channels)`; the logits have shape
    `(batch, num_classes)`. `model.train()` normalizes by the batch and updates the running
    statistics, `model.eval()` normalizes by those. A new model is in training mode.

    Args:
      stages: number of channels of every convolution, stage by stage.
      num_classes: number of logits.
      channels: number of channels of the images.
      batch_norm: whether batch normalization follows each convolution.
      dtype: dtype of the computation, such as `jnp.bfloat16`. Parameters, batch statistics, the
        classifier and its logits are always float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: when called on images that are too small for the max-pools: height and width
        must be at least `2 ** (len(stages) - 1)`, 4 for `vgg7` and 16 for `vgg16_bn`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models import vgg_tiny
      >>> model = vgg_tiny(num_classes=10, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 16, 16, 3))).shape
      (2, 10)

    References:
      Simonyan and Zisserman, `Very Deep Convolutional Networks for Large-Scale Image Recognition
      <https://arxiv.org/abs/1409.1556>`_, 2015, Table 1

      He et al., `Delving Deep into Rectifiers <https://arxiv.org/abs/1502.01852>`_, 2015
    """

    def __init__(
        self,
        *,
        stages: Sequence[Sequence[int]],
        num_classes: int,
        channels: int = 3,
        batch_norm: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        conv = partial(
            ConvNorm,
            use_bias=True,
            batch_norm=batch_norm,
            kernel_init=kaiming_fan_out,
            dtype=dtype,
            rngs=rngs,
        )
        features = channels
        self.stages = nnx.List()
        for widths in stages:
            stage = nnx.List()
            for width in widths:
                stage.append(conv(features, width))
                features = width
            self.stages.append(stage)
        self.classifier = nnx.Linear(features, num_classes, kernel_init=normal(0.01), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        height, width = images.shape[1:3]
        smallest = 2 ** (len(self.stages) - 1)
        if min(height, width) < smallest:
            raise ValueError(
                f"The max-pools between {len(self.stages)} stages need images of at least "
                f"{smallest}x{smallest} pixels, got {height}x{width}. Enlarge the images, or use a "
                "ResNet."
            )
        x = images
        for index, stage in enumerate(self.stages):
            if index > 0:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for conv in stage:
                x = nnx.relu(conv(x))
        return self.classifier(x.mean(axis=(1, 2), dtype=jnp.float32))


vgg_tiny = partial(VGG, stages=((4, 4), (8,), (8,)))  # for tests
vgg7 = partial(VGG, stages=((32,) * 2, (64,) * 2, (128,) * 2), batch_norm=False)  # for small images
# Configuration D.
vgg16_bn = partial(VGG, stages=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3))
