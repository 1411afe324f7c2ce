"""The methods that the paper's Table 1 compares with, each as an Optax transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_autoscale._autoscale import center_layers
from optax_autoscale._moments import (
    AxisName,
    KeyPath,
    LayerAxes,
    Moments,
    centered_moments,
    checked_layer_axes,
    default_layer_axes,
    map_layers,
    pooled_moments,
    sqrt,
    stateless,
    tree_moments,
)


def gradient_centralization() -> optax.GradientTransformation:
    r"""Gradient Centralization (Yong 2020): one mean per output feature is subtracted.

    .. math:: \hat G_{\cdot j} = G_{\cdot j} - \mathrm{mean}(G_{\cdot j})

    where :math:`j` is the last axis, the output features of Flax, Haiku and Keras kernels
    ``(..., in, out)``, and the mean is over all other axes. Leaves with fewer than two axes pass
    through. ``optax.centralize`` keeps the first axis instead, and so centers each row of the
    filter window on these kernels.

    Returns:
      A stateless transformation whose updates have the gradients' shapes and dtypes.

    Raises:
      TypeError: in an update with an integer or boolean leaf; the message names its path.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_autoscale import gradient_centralization
      >>> grads = {"kernel": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "bias": jnp.ones(2)}
      >>> tx = gradient_centralization()
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["kernel"]
      Array([[-1., -2.],
             [ 1.,  2.]], dtype=float32)

    References:
      Yong et al., `Gradient Centralization: A New Optimization Technique for Deep Neural Networks
      <https://arxiv.org/abs/2004.01461>`_, 2020
    """

    def all_but_last(path: KeyPath, leaf: Any) -> tuple[int, ...] | None:
        axes = default_layer_axes(path, leaf)
        return None if axes is None else axes[:-1]

    return center_layers(layer_axes=all_but_last)


def gradient_normalization(
    *, alpha: jax.typing.ArrayLike = 1.0, axis_name: AxisName = None
) -> optax.GradientTransformation:
    r"""Gradient Normalization: all gradients are divided by their global norm.

    .. math:: \hat g = \alpha \, \frac{g}{\lVert g \rVert}

    where the norm is over all leaves, including biases; gradients that are all 0 stay 0. This is
    the rule that appendix A of the paper quotes for GradNorm. GradNorm itself balances the losses
    of several tasks; with the single task of image classification it is the identity.

    Args:
      alpha: the norm of the updates. It may be traced.
      axis_name: inside ``jax.shard_map``, the mesh axes over which the leaves themselves are
        sharded; see :func:`autoscale`.

    Returns:
      A stateless transformation whose updates have the gradients' shapes and dtypes.

    Raises:
      TypeError: in an update with an integer or boolean leaf; the message names its path.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_autoscale import gradient_normalization
      >>> grads = {"kernel": jnp.array([[0.0, 3.0]]), "bias": jnp.array([4.0])}
      >>> tx = gradient_normalization()
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["kernel"], updates["bias"]
      (Array([[0. , 0.6]], dtype=float32), Array([0.8], dtype=float32))

    References:
      Chen et al., `GradNorm <https://arxiv.org/abs/1711.02257>`_, 2018; Yun, `Gradient Autoscaled
      Normalization <https://arxiv.org/abs/2509.03677>`_, 2025, appendix A
    """

    def every_leaf(path: KeyPath, leaf: Any) -> tuple[int, ...]:
        del path
        return tuple(range(jnp.ndim(leaf)))

    def normalize(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        moments = tree_moments(updates, every_leaf, axis_name)
        norm = sqrt(pooled_moments(moments).squares)
        zero = norm == 0
        scale = jnp.asarray(alpha, norm.dtype) / jnp.where(zero, 1.0, norm)
        scale = jnp.where(zero, 0.0, scale)
        return map_layers(lambda grad, _: scale.astype(grad.dtype) * grad, updates, moments)

    return optax.stateless(normalize)


def zscore_normalization(
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    layer_axes: LayerAxes | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformation:
    r"""Z-Score Gradient Normalization (ZNorm): normalizes each layer to mean 0 and deviation 1.

    .. math::

      \hat G^{(l)} = \frac{G^{(l)} - \mu^{(l)}}{\sigma^{(l)} + \epsilon}
      \quad \text{for } l \in S_t

    with the unbiased standard deviation of the layer's entries. Ineligible leaves pass through.

    The deviation is computed from the centered layer, in a second pass, which takes a second
    all-reduce where leaves are sharded. In one pass, :math:`\overline{G^2} - \mu^2` cancels where
    the mean is far larger than the deviation, and the rounding error is divided by
    :math:`\epsilon`.

    Args:
      eps: added to the standard deviation. It may be traced.
      layer_axes: see :func:`autoscale`.
      axis_name: see :func:`autoscale`.

    Returns:
      A stateless transformation whose updates have the gradients' shapes and dtypes. Up to
      :math:`|\mu| / \sigma = 10^5`, float32 updates are accurate to 1e-6 of the layer's largest.
      None of the :math:`n` updates of a layer exceeds :math:`(n - 1) / \sqrt n`, up to rounding.
      Layers whose entries are equal, or differ by less than the rounding of their mean, become 0,
      as do those with a deviation below about 1e-19.

    Raises:
      TypeError: in an update with an integer or boolean leaf; the message names its path. If
        ``layer_axes`` is not a function.
      ValueError: in an update where ``layer_axes`` returns anything but axes of a leaf, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_autoscale import zscore_normalization
      >>> grads = {"kernel": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "bias": jnp.ones(2)}
      >>> tx = zscore_normalization()
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["kernel"]
      Array([[-0.9258..., -0.4629...],
             [ 0.       ,  1.3887...]], dtype=float32)

    References:
      Yun, `ZNorm: Z-Score Gradient Normalization <https://arxiv.org/abs/2408.01215>`_, 2024
    """
    rule = checked_layer_axes(layer_axes)

    def normalize(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        means, moments = centered_moments(updates, rule, axis_name)

        def standardize(grad: jax.Array, layer: Moments, mean: jax.Array) -> jax.Array:
            # The mean was rounded, so all entries of the centered layer are off by the same small
            # amount: its own mean. Where there is nothing else, as in a layer of equal entries, the
            # difference of sums from which the deviation is computed is noise.
            deviation = grad - mean - layer.mean
            variance = layer.variance
            constant = variance * float(max(layer.size - 1, 1)) <= 1e-3 * layer.squares
            std = jnp.sqrt(jnp.where(constant, 1.0, variance)) + jnp.asarray(eps, variance.dtype)
            return jnp.where(constant, 0.0, deviation / std.astype(grad.dtype))

        return map_layers(standardize, updates, moments, means)

    return stateless(normalize, layer_axes)
