"""The layer that ResNet and VGG share: a convolution followed by batch normalization."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from models.convolution import conv_general_dilated


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over the last axis, as one product and one sum per entry.

    Differentiated in this form it saves only its input, and takes two sums of its gradient: of `g`
    and of `g * x`.
    """

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        if use_running_average is None:
            use_running_average = self.use_running_average
        x = x.astype(jnp.float32)
        if use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes, where=mask)
            var = jnp.maximum(0, (x * x).mean(axes, where=mask) - mean * mean)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var
        assert self.scale is not None
        assert self.bias is not None
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        return (x * scale + (self.bias[...] - mean * scale)).astype(self.dtype)


class ConvNorm(nnx.Module):
    """A square convolution followed by batch normalization, with PyTorch's alignment and settings.

    The padding is `size // 2` on every side; at stride 2, "SAME" would pad an even image on the far
    side only. Parameters are float32, and batch statistics are computed and stored in float32,
    whatever `dtype` is. One difference from PyTorch remains: its running variance is unbiased,
    larger by `n / (n - 1)` for the n pixels of a batch.

    Args:
      in_features: number of channels read.
      out_features: number of channels written.
      size: height and width of the kernel.
      stride: distance between two outputs, in pixels.
      use_bias: whether the convolution has a bias.
      kernel_init: initializer of the kernel, of shape `(size, size, in_features, out_features)`.
      dtype: dtype of the convolution and of the result.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        size: int = 3,
        stride: int = 1,
        use_bias: bool = False,
        kernel_init: Initializer,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            in_features,
            out_features,
            kernel_size=(size, size),
            strides=stride,
            padding=size // 2,
            use_bias=use_bias,
            kernel_init=kernel_init,
            conv_general_dilated=conv_general_dilated,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = BatchNorm(out_features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))
