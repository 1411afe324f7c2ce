"""The layer that ResNet and VGG share, a convolution and its batch normalization.

Convolutions have the form that XLA's CPU backend runs fastest; other devices use the plain one.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike


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
      batch_norm: whether batch normalization follows.
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
        batch_norm: bool = True,
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
        norm = partial(BatchNorm, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.norm = norm(out_features) if batch_norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


def _materialized(x: jax.Array, witness: jax.Array) -> jax.Array:
    """The same array, stored in memory instead of recomputed by each operation that reads it.

    XLA's CPU backend fuses the whole computation of an array into each operation that reads it. The
    gradient of a kernel is a convolution whose two operands are read transposed, and each of the
    two reads would repeat the normalizations, activations and additions since the last
    convolutions. `lax.optimization_barrier` does not prevent that; a branch does, as nothing is
    fused across it.
    """

    def branch(x: jax.Array) -> jax.Array:
        # True, but XLA cannot know: it might be NaN. Equal branches would be merged.
        first = witness.ravel()[0].astype(x.dtype)
        return lax.cond(first == first, lambda x: x, lambda x: x * first, x)

    return lax.platform_dependent(x, cpu=branch, default=lambda x: x)


def _conv_as_dot(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution in which every output depends on every pixel, as one matrix product.

    XLA's CPU backend swaps the operands of a convolution whose kernel is larger than the image, and
    computes the result by a loop that is a hundred times slower.
    """
    images, height, width, _ = x.shape
    rows, columns = range(0, height, stride), range(0, width, stride)
    middle = kernel.shape[0] // 2
    parts = [
        kernel[middle - i : middle - i + height, middle - j : middle - j + width]
        for i in rows
        for j in columns
    ]
    y = jnp.einsum("nhwc,hwcpo->npo", x, jnp.stack(parts, axis=-2))
    return y.reshape(images, len(rows), len(columns), -1)


def _conv_in_pairs(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """A convolution of stride 1 that computes two adjacent outputs as the channels of one.

    XLA's CPU backend takes almost as long for 16 output channels as for 32. The kernel becomes one
    pixel wider, and each of the two outputs ignores one column of it.
    """
    left, right = (jnp.pad(kernel, ((0, 0), side, (0, 0), (0, 0))) for side in ((0, 1), (1, 0)))
    pairs = jnp.concatenate([left, right], axis=-1)
    y = lax.conv_general_dilated(x, pairs, window_strides=(1, 2), **options)
    return y.reshape(*x.shape[:3], kernel.shape[-1])


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, window_strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` in the form that a CPU runs and differentiates fastest.

    Args:
      x: images of shape `(batch, height, width, in_features)`.
      kernel: array of shape `(size, size, in_features, out_features)`, where `size` is odd.
      window_strides: the same number, twice.
      padding: `size // 2` on every side.
      **options: as for `lax.conv_general_dilated`, without dilation and groups.

    Returns:
      Images of shape `(batch, height / stride, width / stride, out_features)`, rounded up. They
      can be differentiated in reverse mode only.
    """
    stride, size = window_strides[0], kernel.shape[0]
    is_dot = max(x.shape[1:3]) <= size // 2 + 1
    plain = partial(
        lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options
    )

    def fastest(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if is_dot:
            return _conv_as_dot(x, kernel, stride)
        if stride == 1 < size and x.shape[2] % 2 == 0 and kernel.shape[-1] <= 16:
            return _conv_in_pairs(x, kernel, padding=padding, **options)
        return plain(x, kernel)

    def gradients(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> Any:
        if is_dot or stride > 1:
            return jax.vjp(fastest, x, kernel)[1](grad)
        # The gradient with respect to the images is a convolution of the same kind.
        x_grad = fastest(grad, kernel[::-1, ::-1].swapaxes(2, 3)).astype(x.dtype)
        return x_grad, *jax.vjp(partial(plain, x), kernel)[1](grad)

    @jax.custom_vjp
    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.platform_dependent(x, kernel, cpu=fastest, default=plain)

    def forward(x: jax.Array, kernel: jax.Array) -> Any:
        x = _materialized(x, kernel)
        return conv(x, kernel), (x, kernel)

    def backward(operands: tuple[jax.Array, jax.Array], grad: jax.Array) -> Any:
        grad = _materialized(grad, operands[1])
        return lax.platform_dependent(
            *operands,
            grad,
            cpu=gradients,
            default=lambda x, kernel, grad: jax.vjp(plain, x, kernel)[1](grad),
        )

    conv.defvjp(forward, backward)
    return conv(x, kernel)
