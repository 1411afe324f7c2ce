"""Gradient autoscaled normalization (Yun 2025): the method, in one pass, and its two halves."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_autoscale._moments import (
    AxisName,
    LayerAxes,
    Moments,
    checked_layer_axes,
    map_layers,
    pooled_moments,
    stateless,
    tree_moments,
    warn_of_unknown_names,
)


class AutoscaleState(NamedTuple):
    """The state of :func:`autoscale`: its exponent, and the measurements of its latest step.

    Only ``exponent`` affects later steps. The other two are diagnostics, to be read with
    ``optax.tree.get(opt_state, "scale_factor")``; after a step whose gradients contain a NaN they
    are NaN, and valid again after the next step.
    """

    exponent: jax.Array  # p_t of later steps: 1 or 2, 0 while undecided; shape=(), dtype=int32
    global_std: jax.Array  # s_t, 0 before the first step; shape=(), dtype=float32
    scale_factor: jax.Array  # a_t, 1 before the first step; shape=(), dtype=float32


def autoscale(
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    max_scale: jax.typing.ArrayLike | None = None,
    layer_axes: LayerAxes | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Centers each weight gradient and scales all of them by one factor.

    With :math:`G_t^{(l)}` the gradient of layer :math:`l` at step :math:`t`, :math:`\mu_t^{(l)}`
    the mean of its entries, and :math:`S_t` the layers with more than one axis:

    .. math::

      s_t &= \mathrm{Std}\Big(\bigoplus_{l \in S_t} \mathrm{vec}(G_t^{(l)})\Big) \\
      a_t &= \Big(\frac{4}{|\ln s_t| + \epsilon}\Big)^{p_t}, \qquad
      p_1 = 2, \quad
      p_{t \ge 2} = \begin{cases} 1 & \text{if } a_1 < 0.5 \\ 2 & \text{otherwise} \end{cases} \\
      \hat G_t^{(l)} &= a_t \, (G_t^{(l)} - \mu_t^{(l)}) \quad \text{for } l \in S_t, \qquad
      \hat G_t^{(l)} = G_t^{(l)} \quad \text{for } l \notin S_t.

    Here ``eps`` is :math:`\epsilon`; the state's ``global_std``, ``scale_factor`` and ``exponent``
    are :math:`s_t`, :math:`a_t` and the :math:`p_t` of later steps. The standard deviation is
    unbiased (N - 1) and computed from the raw gradients, before centering.

    Put it before the optimizer: ``optax.chain(autoscale(), optax.adamw(1e-3))``.

    Where :math:`e^{-4} < s_t < e^4`, :math:`a_t` exceeds 1, without bound at :math:`s_t = 1`;
    ``max_scale=1.0`` keeps it in the range :math:`(0, 1]` of the paper's proof. Adam cancels any
    constant factor. Under plain SGD the mean of every eligible leaf never changes. The page "What
    the method does, and what it cannot do" of the documentation has examples of each.

    Leave out embedding tables of which a batch uses only some rows, as in
    ``autoscale(layer_axes=exclude("embedding"))``. The other rows, whose gradient is 0, would get
    minus the layer's mean, which Adam turns into full steps. :func:`layers` lists the parameters
    that a rule selects.

    Without normalization layers, many entries have a gradient that is small beside their layer's
    mean, and Adam turns minus that mean into steps of about its full length as well. The page "Is
    it doing anything?" has measurements.

    With ``optax.contrib.differentially_private_aggregate``, put it behind: in front, it would mix
    the examples of a batch, and the privacy bound would not hold.

    Gradients of 0 give updates of 0. NaN and infinite gradients give NaN updates;
    ``optax.apply_if_finite`` around the chain skips such a step. A step whose :math:`s_t` is 0 or
    not finite leaves :math:`p` undecided. The updates can be differentiated; where a standard
    deviation is 0, its derivative is taken to be 0.

    Args:
      eps: added to the logarithm's magnitude; the paper's is 1e-8. It may be traced.
      max_scale: an upper bound on :math:`a_t`, or None for the paper's equation as printed. It may
        be traced.
      layer_axes: ``layer_axes(path, leaf)`` returns the axes of a gradient leaf that form one
        layer's tensor, or None if the leaf is not eligible. By default (None) it is
        :func:`default_layer_axes`: all axes where there is more than one. :func:`exclude` makes a
        rule that leaves parameters out by name. Where kernels of shape ``(L, n, m)`` stack the
        layers that ``jax.lax.scan`` iterates over, return ``(1, 2)`` for them, and None for their
        stacked biases ``(L, m)``.
      axis_name: inside ``jax.shard_map``, the mesh axes over which the leaves themselves are
        sharded, each layer's tensor over all its shards; without it each device would treat its
        shard as the whole. Not needed under ``jax.jit``, where arrays are global, nor for axes over
        which only the batch is sharded. With ``check_vma=True`` (the default), leaves that are
        replicated over some of these axes count once; with ``check_vma=False`` all are assumed to
        be sharded over all of them.

    Returns:
      A transformation whose updates have the gradients' shapes and dtypes and whose state is an
      :class:`AutoscaleState`. Statistics are computed in float32, or float64 if a leaf is. In
      float32 the standard deviation is accurate to about ``5e-6 * (1 + (mean / std) ** 2)``,
      entries below about 1e-19 count as 0, and a sum of squares above 3e38 is infinite.

    Raises:
      TypeError: in an update with an integer or boolean leaf; the message names its path. If
        ``layer_axes`` is not a function.
      ValueError: in an update where ``layer_axes`` returns anything but axes of a leaf, or None.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_autoscale import autoscale
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.ones(2)}
      >>> grads = {"kernel": jnp.array([[0.0, 1.0], [2.0, 1.0]]) / 64, "bias": jnp.ones(2)}
      >>> tx = autoscale()
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> state.global_std, state.scale_factor, state.exponent
      (Array(0.01275..., dtype=float32), Array(0.841..., dtype=float32), Array(2, dtype=int32))
      >>> updates["kernel"]  # centered, and scaled by 0.841
      Array([[-0.0131...,  0.        ],
             [ 0.0131...,  0.        ]], dtype=float32)

    References:
      Yun, `Insights from Gradient Dynamics: Gradient Autoscaled Normalization
      <https://arxiv.org/abs/2509.03677>`_, 2025, equations 1 and 2
    """
    rule = checked_layer_axes(layer_axes)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AutoscaleState]:
        del params, extra_args
        moments = tree_moments(updates, rule, axis_name)
        scale, state = _next_scale(pooled_moments(moments), state, eps, max_scale)
        updates = map_layers(
            lambda grad, layer: scale.astype(grad.dtype) * (grad - layer.mean), updates, moments
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(
        functools.partial(_init_autoscale, layer_axes), update_fn
    )


def scale_by_global_std(
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    max_scale: jax.typing.ArrayLike | None = None,
    layer_axes: LayerAxes | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The scaling half of :func:`autoscale`, without the centering.

    .. math:: \hat G_t^{(l)} = a_t \, G_t^{(l)} \quad \text{for } l \in S_t

    ``optax.chain(scale_by_global_std(), center_layers())`` is :func:`autoscale` up to rounding. The
    other order is another method, whose s_t would be that of the centered gradients.

    Args:
      eps: see :func:`autoscale`.
      max_scale: see :func:`autoscale`.
      layer_axes: see :func:`autoscale`.
      axis_name: see :func:`autoscale`.

    Returns:
      A transformation whose updates have the gradients' shapes and dtypes and whose state is an
      :class:`AutoscaleState`.

    Raises:
      TypeError: in an update with an integer or boolean leaf; the message names its path. If
        ``layer_axes`` is not a function.
      ValueError: in an update where ``layer_axes`` returns anything but axes of a leaf, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_autoscale import scale_by_global_std
      >>> grads = {"kernel": jnp.array([[0.01, 0.03], [0.05, 0.03]])}
      >>> tx = scale_by_global_std()
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates["kernel"]
      Array([[0.0094..., 0.0283...],
             [0.0472..., 0.0283...]], dtype=float32)

    References:
      Yun, `Insights from Gradient Dynamics: Gradient Autoscaled Normalization
      <https://arxiv.org/abs/2509.03677>`_, 2025, equation 1
    """
    rule = checked_layer_axes(layer_axes)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AutoscaleState]:
        del params, extra_args
        moments = tree_moments(updates, rule, axis_name)
        scale, state = _next_scale(pooled_moments(moments), state, eps, max_scale)
        updates = map_layers(lambda grad, _: scale.astype(grad.dtype) * grad, updates, moments)
        return updates, state

    return optax.GradientTransformationExtraArgs(
        functools.partial(_init_autoscale, layer_axes), update_fn
    )


def center_layers(
    *, layer_axes: LayerAxes | None = None, axis_name: AxisName = None
) -> optax.GradientTransformation:
    r"""The centering half of :func:`autoscale`: subtracts one scalar mean per layer.

    .. math:: \tilde G_t^{(l)} = G_t^{(l)} - \mu_t^{(l)} \quad \text{for } l \in S_t

    Under plain SGD the mean of every eligible leaf then never changes. For one mean per output
    feature, see :func:`gradient_centralization`.

    Args:
      layer_axes: see :func:`autoscale`.
      axis_name: see :func:`autoscale`.

    Returns:
      A stateless transformation whose updates have the gradients' shapes and dtypes.

    Raises:
      TypeError: in an update with an integer or boolean leaf; the message names its path. If
        ``layer_axes`` is not a function.
      ValueError: in an update where ``layer_axes`` returns anything but axes of a leaf, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_autoscale import center_layers
      >>> grads = {"kernel": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "bias": jnp.ones(2)}
      >>> tx = center_layers()
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["kernel"]
      Array([[-2., -1.],
             [ 0.,  3.]], dtype=float32)

    References:
      Yun, `Insights from Gradient Dynamics: Gradient Autoscaled Normalization
      <https://arxiv.org/abs/2509.03677>`_, 2025, section 3.2
    """
    rule = checked_layer_axes(layer_axes)

    def center(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        moments = tree_moments(updates, rule, axis_name)
        return map_layers(lambda grad, layer: grad - layer.mean, updates, moments)

    return stateless(center, layer_axes)


def _init_autoscale(layer_axes: LayerAxes | None, params: optax.Params) -> AutoscaleState:
    warn_of_unknown_names(layer_axes, params)
    return AutoscaleState(
        exponent=jnp.zeros([], jnp.int32),
        global_std=jnp.zeros([], jnp.float32),
        scale_factor=jnp.ones([], jnp.float32),
    )


def _next_scale(
    eligible: Moments,
    state: AutoscaleState,
    eps: jax.typing.ArrayLike,
    max_scale: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, AutoscaleState]:
    """Equation 1: the factor for this step, and the state with the exponent for the next."""
    # At a deviation of 0 neither root nor logarithm is taken: their derivatives would be NaN.
    zero = eligible.variance <= 0
    root = jnp.sqrt(jnp.where(zero, 0.5, eligible.variance))
    std = jnp.where(zero, 0.0, root)
    ratio = 4.0 / (jnp.abs(jnp.log(root)) + jnp.asarray(eps, std.dtype))
    ratio = jnp.where(zero, 0.0, ratio)
    scale = jnp.where(state.exponent == 1, ratio, jnp.square(ratio))

    undecided = (state.exponent == 0) & (std > 0) & jnp.isfinite(std)
    chosen = jnp.where(jnp.square(ratio) < 0.5, jnp.int32(1), jnp.int32(2))
    exponent = jnp.where(undecided, chosen, state.exponent)

    if max_scale is not None:
        scale = jnp.minimum(scale, jnp.asarray(max_scale, scale.dtype))
    if eligible.size == 0:
        scale = jnp.ones_like(scale)
    return scale, AutoscaleState(exponent, std.astype(jnp.float32), scale.astype(jnp.float32))
