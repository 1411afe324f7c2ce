"""Which parameters are layers, and the sums from which means and standard deviations are computed.

Each leaf contributes one sum and one sum of squares per layer. Nothing is concatenated or raveled,
and (except in `centered_moments`) no second pass depends on the first, so that XLA merges the
reductions of a sharded tree into one all-reduce. Moments are kept in lists in the order of the
leaves: a node of a user's tree may accept nothing but arrays.
"""

import dataclasses
import difflib
import math
import operator
import reprlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

KeyPath = tuple[Any, ...]  # jax.tree_util.KeyPath, whose entries type checkers do not know
LayerAxes = Callable[[KeyPath, Any], Sequence[int] | None]
AxisName = str | Sequence[str] | None


def default_layer_axes(path: KeyPath, leaf: Any) -> tuple[int, ...] | None:
    """The paper's eligible set (section 3.2): every leaf with more than one axis is one layer.

    Args:
      path: the leaf's key path; not used.
      leaf: an array of any shape.

    Returns:
      All axes of ``leaf``, or None (not eligible) where it has fewer than two.

    Example:
      >>> import jax.numpy as jnp
      >>> default_layer_axes((), jnp.ones((3, 3, 16, 32)))
      (0, 1, 2, 3)
      >>> default_layer_axes((), jnp.ones(32)) is None
      True
    """
    del path
    return tuple(range(jnp.ndim(leaf))) if jnp.ndim(leaf) > 1 else None


def exclude(*names: str) -> Callable[[KeyPath, Any], tuple[int, ...] | None]:
    """A rule for ``layer_axes``: the default, without the parameters of these names.

    A leaf is left out if one of the names is a whole part of its path, at any depth: the key of a
    dictionary or the name of an attribute, ``"embedding"`` but not ``"embed"`` in
    ``decoder/embedding/kernel``. A name may consist of several parts, as in
    ``exclude("decoder/embedding")``. Slashes in Haiku's names separate parts too, and the
    ``.value`` that ends the paths of Flax's boxes and variables is ignored.

    :func:`layers` lists what a rule selects. A name that occurs in no path excludes nothing; the
    ``init`` of a transformation warns of it.

    Args:
      *names: one or more names, such as ``"embedding"`` for Flax's embedding tables.

    Returns:
      A function of a leaf's path and the leaf. It returns all axes of the leaf, or None if it has
      fewer than two or its path contains one of the names.

    Raises:
      TypeError: if there is no name, or one is empty or not a string.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"tokens": {"embedding": jnp.eye(5)}, "head": {"kernel": jnp.eye(5)}}
      >>> layers(params, layer_axes=exclude("embedding"))
      {'head/kernel': (5, 5)}
    """
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"exclude takes one or more names, as strings that are not empty: {names}")
    return _Exclude(names)


@dataclasses.dataclass(frozen=True)
class _Exclude:
    names: tuple[str, ...]

    def __call__(self, path: KeyPath, leaf: Any) -> tuple[int, ...] | None:
        if any(f"/{name}/" in f"/{_path_name(path)}/" for name in self.names):
            return None
        return default_layer_axes(path, leaf)


def _path_name(path: KeyPath) -> str:
    if path[-1:] == (jax.tree_util.GetAttrKey("value"),):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def warn_of_unknown_names(layer_axes: LayerAxes | None, params: optax.Params) -> None:
    """Warns of names given to ``exclude`` that occur nowhere in the parameters.

    Behind a mask the other parameters are not known, and nothing is said.
    """
    nodes = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if not isinstance(layer_axes, _Exclude) or not nodes:
        return
    if any(isinstance(node, optax.MaskedNode) for _, node in nodes):
        return
    paths = [_path_name(path) for path, _ in nodes]
    for name in layer_axes.names:
        if any(f"/{name}/" in f"/{path}/" for path in paths):
            continue
        size = name.count("/") + 1
        parts = [path.split("/") for path in paths]
        known = {"/".join(p[i : i + size]) for p in parts for i in range(len(p) - size + 1)}
        nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0)
        hint = f"; the nearest name is {nearest[0]!r}" if nearest else ""
        warnings.warn(f"exclude({name!r}) leaves out no parameter{hint}", stacklevel=3)


def stateless(
    update: Callable[[optax.Updates, optax.Params | None], optax.Updates],
    layer_axes: LayerAxes | None,
) -> optax.GradientTransformation:
    """``optax.stateless(update)``, whose init warns of names that ``exclude`` does not know."""

    def init_fn(params: optax.Params) -> optax.EmptyState:
        warn_of_unknown_names(layer_axes, params)
        return optax.EmptyState()

    return optax.GradientTransformation(init_fn, optax.stateless(update).update)


def layers(params: Any, *, layer_axes: LayerAxes | None = None) -> dict[str, tuple[int, ...]]:
    """Which parameters are layers: the names and shapes of the leaves that a rule selects.

    Args:
      params: a tree of arrays, or of ``jax.ShapeDtypeStruct``.
      layer_axes: see :func:`autoscale`.

    Returns:
      The shape of each eligible leaf by its path, whose parts are separated by slashes.

    Raises:
      TypeError: if ``layer_axes`` is not a function.
      ValueError: if ``layer_axes`` returns anything but axes of a leaf, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"tokens": {"embedding": jnp.eye(5)}, "head": {"kernel": jnp.ones((5, 2))}}
      >>> layers(params)
      {'head/kernel': (5, 2), 'tokens/embedding': (5, 5)}
      >>> layers(params, layer_axes=exclude("embedding"))
      {'head/kernel': (5, 2)}
    """
    rule = checked_layer_axes(layer_axes)
    return {
        _path_name(path): jnp.shape(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
        if rule(path, leaf) is not None
    }


def checked_layer_axes(layer_axes: LayerAxes | None) -> LayerAxes:
    """The user's rule, or the default for None, with its return values checked."""
    if layer_axes is None:
        return default_layer_axes
    if not callable(layer_axes):
        raise TypeError(
            f"layer_axes is {reprlib.repr(layer_axes)}; it must be None or a function "
            "layer_axes(path, leaf) that gives the axes of one layer, or None for a leaf to leave "
            'out, such as exclude("embedding")'
        )

    def checked(path: KeyPath, leaf: Any) -> tuple[int, ...] | None:
        given, shape = layer_axes(path, leaf), jnp.shape(leaf)
        if given is None:
            return None
        try:
            axes = tuple(map(_axis, given))
            distinct = {range(len(shape))[axis] for axis in axes}
        except (TypeError, IndexError):
            axes, distinct = (), set()
        if not axes or len(distinct) < len(axes):
            raise ValueError(
                f"layer_axes gave {given!r} for the leaf at {jax.tree_util.keystr(path)} of shape "
                f"{shape}; it must give one or more distinct axes of that array, as a tuple "
                "of integers, or None to leave it out"
            )
        return axes

    return checked


def _axis(axis: Any) -> int:
    if isinstance(axis, bool):
        raise TypeError
    return operator.index(axis)


class Moments(NamedTuple):
    """The first two moments of each layer in one leaf, broadcastable against the leaf.

    A leaf is one layer, or a stack of them: ``total`` and ``squares`` have its shape with ``axes``
    reduced to 1. They are float32, or wider where the leaf is.
    """

    axes: tuple[int, ...]  # the axes of the leaf that form one layer
    size: int  # entries in one layer
    total: jax.Array  # sum of a layer's entries
    squares: jax.Array  # sum of their squared magnitudes

    @property
    def mean(self) -> jax.Array:
        """The mean of each layer."""
        return self.total / float(max(self.size, 1))

    @property
    def variance(self) -> jax.Array:
        """The unbiased variance of each layer, which rounding may have made negative."""
        mean_square = jnp.square(jnp.abs(self.total)) / float(max(self.size, 1))
        return (self.squares - mean_square) / float(max(self.size - 1, 1))

    @property
    def std(self) -> jax.Array:
        """The unbiased standard deviation of each layer; 0 for fewer than two entries."""
        return sqrt(self.variance)


def sqrt(x: jax.Array) -> jax.Array:
    """The square root, and 0 for negative numbers. At 0 its derivative is 0, not infinity."""
    zero = x <= 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def tree_moments(
    tree: Any,
    layer_axes: LayerAxes,
    axis_name: AxisName = None,
    means: Sequence[jax.Array | None] | None = None,
) -> list[Moments | None]:
    """The ``Moments`` of each leaf of the tree, in order; None where a leaf is not eligible.

    If ``means`` is given, they are the moments of the leaves minus these.
    """
    flat = jax.tree.leaves_with_path(tree)
    if means is None:
        means = [None] * len(flat)
    moments = [
        _leaf_moments(path, leaf, layer_axes, mean)
        for (path, leaf), mean in zip(flat, means, strict=True)
    ]
    eligible = [layer for layer in moments if layer is not None]
    values = [value for layer in eligible for value in (layer.total, layer.squares)]
    sums, shards = sum_over_mesh(values, axis_name)
    summed = (
        Moments(layer.axes, layer.size * count, total, squares)
        for layer, count, total, squares in zip(
            eligible, shards[::2], sums[::2], sums[1::2], strict=True
        )
    )
    return [None if layer is None else next(summed) for layer in moments]


def centered_moments(
    tree: Any, layer_axes: LayerAxes, axis_name: AxisName = None
) -> tuple[list[jax.Array | None], list[Moments | None]]:
    """The mean of each layer, and in a second pass the moments of the centered layers.

    A single pass loses the deviation where the mean is far larger. The mean is rounded, so that the
    centered layers have a small mean too.
    """
    moments = tree_moments(tree, layer_axes, axis_name)
    means = [None if layer is None else layer.mean for layer in moments]
    # Without the barrier XLA may merge the second sums of a leaf with the first sums of the next:
    # one all-reduce for each leaf of a sharded tree instead of two in total. The CPU backend does
    # so anyway, as it removes barriers before it merges.
    means = jax.lax.optimization_barrier(means)
    return means, tree_moments(tree, layer_axes, axis_name, means)


def pooled_moments(moments: Sequence[Moments | None]) -> Moments:
    """The moments of all eligible entries of a tree, taken together as one layer."""
    eligible = [layer for layer in moments if layer is not None]
    return Moments(
        axes=(),
        size=sum(layer.size * layer.total.size for layer in eligible),
        total=_sum_all([layer.total for layer in eligible]),
        squares=_sum_all([layer.squares for layer in eligible]),
    )


def map_layers(
    update: Callable[..., jax.Array],
    grads: Any,
    moments: Sequence[Moments | None],
    *rest: Sequence[Any],
) -> Any:
    """Applies ``update(grad, moments, *rest)`` to each eligible leaf, in its moments' precision.

    Every output leaf has its input's dtype; leaves without moments pass through unchanged.
    """

    def update_leaf(grad: Any, layer: Moments | None, *rest: Any) -> Any:
        if layer is None:
            return grad
        wide = jnp.asarray(grad, layer.total.dtype)
        return update(wide, layer, *rest).astype(jnp.result_type(grad))

    leaves, treedef = jax.tree.flatten(grads)
    return treedef.unflatten(map(update_leaf, leaves, moments, *rest))


def global_std(
    grads: Any, *, layer_axes: LayerAxes | None = None, axis_name: AxisName = None
) -> jax.Array:
    r"""The standard deviation of all eligible gradient entries together, s_t of the paper.

    .. math:: s_t = \mathrm{Std}\Big(\bigoplus_{l \in S_t} \mathrm{vec}(G_t^{(l)})\Big)

    unbiased (N - 1), of the raw gradients, before any centering.

    Args:
      grads: a tree of floating-point or complex arrays; None and ``optax.MaskedNode`` are skipped.
      layer_axes: see :func:`autoscale`.
      axis_name: see :func:`autoscale`.

    Returns:
      An array of shape ``()``; float32, or float64 if a leaf is. It is 0 if fewer than two entries
      are eligible. Its accuracy is that of :func:`autoscale`.

    Raises:
      TypeError: for an integer or boolean leaf; the message names its path. If ``layer_axes`` is
        not a function.
      ValueError: if ``layer_axes`` returns anything but axes of a leaf, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> float(global_std({"kernel": jnp.array([[1., 2.], [3., 6.]]), "bias": jnp.ones(2)}))
      2.160...

    References:
      Yun, `Gradient Autoscaled Normalization <https://arxiv.org/abs/2509.03677>`_, 2025, section
      3.2, "Eligible set".
    """
    return pooled_moments(tree_moments(grads, checked_layer_axes(layer_axes), axis_name)).std


def layer_std(
    grads: Any, *, layer_axes: LayerAxes | None = None, axis_name: AxisName = None
) -> Any:
    """The standard deviation of each eligible leaf's entries, as in the paper's Figure 1.

    To record it during training, put ``optax.snapshot("layer_std", layer_std)`` at the start of the
    chain, and read ``optax.tree.get(state, "layer_std")``. A rule given to :func:`autoscale` has to
    be given here as well:
    ``optax.snapshot("layer_std", functools.partial(layer_std, layer_axes=rule))``.

    Args:
      grads: a tree of floating-point or complex arrays; None and ``optax.MaskedNode`` are skipped.
      layer_axes: see :func:`autoscale`.
      axis_name: see :func:`autoscale`.

    Returns:
      The tree with each eligible leaf replaced by its unbiased standard deviation, and every other
      leaf by None. An array of shape ``()`` or, if the leaf stacks several layers, of the shape of
      the axes that ``layer_axes`` leaves out; float32, or float64 if the leaf is. Its accuracy is
      that of :func:`autoscale`, with the mean and deviation of the layer.

    Raises:
      TypeError: for an integer or boolean leaf; the message names its path. If ``layer_axes`` is
        not a function.
      ValueError: if ``layer_axes`` returns anything but axes of a leaf, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> layer_std({"kernel": jnp.array([[1., 2.], [3., 6.]]), "bias": jnp.ones(2)})
      {'bias': None, 'kernel': Array(2.1602..., dtype=float32)}

    References:
      Yun, `Gradient Autoscaled Normalization <https://arxiv.org/abs/2509.03677>`_, 2025, section
      2.1 and Figure 1.
    """
    moments = tree_moments(grads, checked_layer_axes(layer_axes), axis_name)
    return jax.tree.structure(grads).unflatten(
        None if layer is None else jnp.squeeze(layer.std, layer.axes) for layer in moments
    )


def _leaf_moments(
    path: KeyPath, leaf: Any, layer_axes: LayerAxes, mean: jax.Array | None
) -> Moments | None:
    dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"the gradient at {jax.tree_util.keystr(path)} is {dtype}, and only floating-point "
            "gradients have a standard deviation; leave it out with optax.masked or optax.partition"
        )
    axes = layer_axes(path, leaf)
    if axes is None:
        return None
    wide = jnp.asarray(leaf, wide_dtype(dtype))
    if mean is not None:
        wide = wide - mean
    axes = tuple(axes)
    return Moments(
        axes,
        math.prod(shape[axis] for axis in axes),
        jnp.sum(wide, axes, keepdims=True),
        jnp.sum(jnp.real(wide * jnp.conj(wide)), axes, keepdims=True),
    )


def wide_dtype(dtype: Any) -> Any:
    """The dtype in which entries of ``dtype`` are summed: float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def sum_over_mesh(
    values: list[jax.Array], axis_name: AxisName
) -> tuple[list[jax.Array], list[int]]:
    """The sums over the shards of ``jax.shard_map``, and the number of shards of each."""
    sums, shards = list(values), [1] * len(values)
    if axis_name is None:
        return sums, shards
    mesh_axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    # Where shard_map tracks over which axes a value varies (check_vma, the default), a value that
    # is replicated over one of them must be counted once.
    tracked = [axis for axis in mesh_axes if axis in _varying_axes(jax.lax.axis_index(axis))]
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, value in enumerate(values):
        varying = _varying_axes(value)
        axes = tuple(axis for axis in mesh_axes if axis not in tracked or axis in varying)
        groups.setdefault(axes, []).append(index)
    for axes, group in groups.items():
        if axes:
            size = jax.lax.axis_size(axes)
            summed = jax.lax.psum([values[index] for index in group], axes)
            for index, total in zip(group, summed, strict=True):
                sums[index], shards[index] = total, size
    return sums, shards


def _varying_axes(value: Any) -> frozenset[str]:
    aval = jax.typeof(value)
    return aval.vma if hasattr(aval, "vma") else aval.mat.varying  # renamed in jax 0.11


def _sum_all(values: list[jax.Array]) -> jax.Array:
    if not values:
        return jnp.zeros([], jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(value.dtype for value in values))
    sums = jnp.stack([jnp.sum(value).astype(dtype) for value in values])
    # Without the barrier XLA turns this into one long sum of scalars, which takes seconds to
    # compile for 1,000 leaves.
    return jnp.sum(jax.lax.optimization_barrier(sums))
