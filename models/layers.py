"""What the two families share: a convolution with its batch normalisation."""

import jax
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike


class ConvNorm(nnx.Module):
    """A square convolution, then batch normalisation, as PyTorch aligns and configures them.

    The padding is `size // 2` on every side; "SAME" would pad an even image on the far side only at
    stride 2. Parameters are float32, and batch statistics are computed and kept in float32,
    whatever `dtype` is. One difference from PyTorch is left: its running variance is unbiased,
    larger by `n / (n - 1)` for the n pixels of a batch.

    Args:
        in_features: Number of channels read.
        out_features: Number of channels written.
        size: Height and width of the kernel.
        stride: Distance between two outputs, in pixels.
        use_bias: Whether the convolution has a bias.
        kernel_init: Initializer of the kernel, of shape `(size, size, in_features, out_features)`.
        dtype: Dtype of the convolution and of the result.
        rngs: Source of the initial parameters.
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
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(out_features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))
