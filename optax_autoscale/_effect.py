"""What a transformation does to the steps: its update compared with a reference optimizer's."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_autoscale._moments import AxisName, sum_over_mesh, wide_dtype


class EffectSums(NamedTuple):
    r"""The sums that :func:`measure_effect` keeps, and the numbers derived from them.

    Let :math:`u` be the update, :math:`r` the reference's and :math:`w` the parameters. Sums add up
    over leaves, steps and hosts, and ratios do not: add first, then derive. For a window of steps
    use ``optax.tree.add(sums, more_sums)``, or :meth:`sum` of sums that ``jax.lax.scan`` stacked.

    Every number below has the shape of the sums and is finite where they are. Where a norm is 0,
    its value is such that the update still equals ``learning_rate_factor`` times the reference's,
    plus a remainder with the share ``unexplained`` of its square.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_autoscale import EffectSums
      >>> sums = EffectSums(jnp.array([1.0, 4.0]), jnp.array([4.0, 4.0]), jnp.array([2.0, 0.0]),
      ...                   jnp.array([100.0, 400.0]))  # of two leaves
      >>> sums.norm_ratio, sums.cosine
      (Array([0.5, 1. ], dtype=float32), Array([1., 0.], dtype=float32))
      >>> sums.sum().norm_ratio  # of both together: the root of 5 / 8
      Array(0.7905..., dtype=float32)
    """

    update_squares: jax.Array  # |u|^2; shape=() or (leaves,), dtype=float32, or float64
    reference_squares: jax.Array  # |r|^2; the same shape and dtype
    products: jax.Array  # Re<u, r>; the same
    weight_squares: jax.Array  # |w|^2, before the step; the same

    @property
    def norm_ratio(self) -> jax.Array:
        """``|u| / |r|``; 1 where both are 0, since the steps are then equal, 0 where one is."""
        update, reference = jnp.sqrt(self.update_squares), jnp.sqrt(self.reference_squares)
        both_zero = (update == 0) & (reference == 0)
        return jnp.where(both_zero, 1, _divide(update, reference))

    @property
    def cosine(self) -> jax.Array:
        """``Re<u, r> / (|u| |r|)``; 1 where ``u`` is 0, being 0 times ``r``, else 0 where ``r`` is.

        A constant factor before SGD gives 1, and so does the factor 0.
        """
        # In this order it is exactly 1 where the three sums are equal.
        cosine = _divide(self.products, self.update_squares) * self.norm_ratio
        return jnp.where(self.update_squares == 0, 1, jnp.clip(cosine, -1, 1))

    @property
    def unexplained(self) -> jax.Array:
        """``1 - cosine^2``, the share of ``|u|^2`` that no learning rate of the reference explains.

        In float32, shares below about 1e-6 are rounding.
        """
        return 1 - jnp.square(self.cosine)

    @property
    def learning_rate_factor(self) -> jax.Array:
        """``Re<u, r> / |r|^2``, the factor on the reference's learning rate that comes closest.

        It is ``norm_ratio * cosine``, and minimizes ``|u - factor * r|``.
        """
        return self.norm_ratio * self.cosine

    @property
    def update_over_weight(self) -> jax.Array:
        """``|u| / |w|``, how far the step moves the weights; 0 where ``|w|`` is 0."""
        return _divide(jnp.sqrt(self.update_squares), jnp.sqrt(self.weight_squares))

    @property
    def reference_over_weight(self) -> jax.Array:
        """``|r| / |w|``, how far the reference's step would move the same weights, or 0."""
        return _divide(jnp.sqrt(self.reference_squares), jnp.sqrt(self.weight_squares))

    def sum(self, axis: int | Sequence[int] | None = None) -> "EffectSums":
        """The sums over ``axis`` as in ``jnp.sum``: over leaves, stacked steps, or both."""
        return EffectSums(*(jnp.sum(jnp.asarray(value), axis) for value in self))

    def by_leaf(self, params: optax.Params) -> Any:
        """The tree of ``params`` with, for each leaf, its own sums, kept with ``per_leaf=True``."""
        leaves = zip(*(jnp.moveaxis(jnp.asarray(value), -1, 0) for value in self), strict=True)
        treedef = jax.tree.structure(params, is_leaf=_is_none)
        return treedef.unflatten([EffectSums(*sums) for sums in leaves])


class EffectState(NamedTuple):
    """The state of :func:`measure_effect`: its latest step, and the states of both sides.

    ``optax.tree.get`` finds the first three fields, as in ``optax.tree.get(state, "norm_ratio")``.
    Before the first step they are those of two updates of 0.
    """

    norm_ratio: jax.Array  # |u| / |r| over all leaves; shape=(), dtype=float32
    cosine: jax.Array  # Re<u, r> / (|u| |r|) over all leaves; shape=(), dtype=float32
    effect_sums: EffectSums  # from which both are derived
    tx_state: Any  # of `tx`, the same as without the measurement
    reference_state: tuple[Any, ...]  # of `reference`, without the names of its fields


def measure_effect(
    tx: optax.GradientTransformation,
    reference: optax.GradientTransformation,
    *,
    per_leaf: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``reference`` beside ``tx`` on the same gradients, and measures how their steps differ.

    With :math:`u` the update of ``tx`` and :math:`r` that of ``reference``, over all floating-point
    and complex leaves together:

    .. math::

      \text{norm\_ratio} = \frac{\lVert u \rVert}{\lVert r \rVert}, \qquad
      \text{cosine} = \frac{\mathrm{Re} \langle u, r \rangle}
        {\lVert u \rVert \, \lVert r \rVert}

    The updates are those of ``tx``: bitwise on a CPU, elsewhere up to the rounding of operations
    that the compiler fuses differently. The state holds both numbers for the latest step,
    ``optax.tree.get(state, "norm_ratio")`` and ``"cosine"``, and the sums behind them,
    ``"effect_sums"``: see :class:`EffectSums` for single leaves, for many steps, and for the
    learning rate that explains a part of the difference.

    These are effects per step, on *your* trajectory: at each step both sides get the gradients,
    parameters and extra arguments that ``tx`` has led to, and ``reference`` has moments of these
    gradients. A separate run of ``reference`` would have taken another path.

    Weight decay on both sides hides the effect, because it is the same on both. With weights that
    are orthogonal to Adam's direction and three times as long, a true factor of 0.5 on that
    direction is measured as 0.56 with a decay of 0.1, and as 0.96 with a decay of 1. Compare
    without it.

    ``optax.tree.get(state, "mu")``, ``"learning_rate"`` or ``"scale_factor"`` find only those of
    ``tx``, although ``reference`` has fields of the same names: its state is kept as a plain tuple.
    For the same reason a hyperparameter of ``optax.inject_hyperparams`` that is set from outside
    reaches ``tx`` but not ``reference``. Give schedules to both.

    Where both updates are 0, as in the first step of a warm-up, between the steps of
    ``optax.MultiSteps`` and for gradients of 0, both numbers are 1, as the steps are equal. Where
    only :math:`u` is 0, they are 0 and 1: it is 0 times the reference's, and a constant factor has
    a cosine of 1. Where only :math:`r` is 0, they are 0 and 0: no factor gives :math:`u`, and
    infinity could be neither plotted nor averaged. NaN and infinite updates affect both numbers of
    that step only.

    Args:
      tx: the transformation that trains, with all its parts, such as
        ``optax.chain(autoscale(), optax.adamw(1e-3))``.
      reference: what to compare it with, such as ``optax.adamw(1e-3)``, at the cost of a second
        state and update.
      per_leaf: keep the sums of each leaf, in arrays of shape ``(leaves,)`` that
        ``effect_sums.by_leaf(params)`` turns into a tree.
      axis_name: inside ``jax.shard_map``, the mesh axes over which the leaves themselves are
        sharded; see :func:`autoscale`. It applies only to the sums: ``tx`` and ``reference`` take
        their own.

    Returns:
      A transformation whose state is an :class:`EffectState`. Sums are computed in float32, or
      float64 if a leaf of the parameters is: in float32, entries below about 1e-19 count as 0, and
      a sum of squares above 3e38 is infinite. Integer and None leaves count as 0, and so do the
      weights if ``update`` gets no ``params``. On a sharded tree the sums take one all-reduce for
      every 64 leaves.

    Raises:
      ValueError: in an update where the two sides return trees of different structure.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_autoscale import measure_effect
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.ones(2)}
      >>> grads = {"kernel": jnp.array([[0.0, 1.0], [2.0, 1.0]]), "bias": jnp.zeros(2)}
      >>> tx = measure_effect(optax.chain(optax.scale(0.5), optax.sgd(0.1)), optax.sgd(0.1))
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.tree.get(state, "norm_ratio"), optax.tree.get(state, "cosine")
      (Array(0.5, dtype=float32), Array(1., dtype=float32))
      >>> optax.tree.get(state, "effect_sums").update_over_weight
      Array(0.0216..., dtype=float32)
    """
    tx = optax.with_extra_args_support(tx)
    reference = optax.with_extra_args_support(reference)

    def init_fn(params: optax.Params) -> EffectState:
        leaves = jax.tree.leaves(params, is_leaf=_is_none)
        shape = (len(leaves),) if per_leaf else ()
        dtype = _widest([leaf for leaf in leaves if _is_inexact(leaf)])
        return EffectState(
            norm_ratio=jnp.ones([], jnp.float32),
            cosine=jnp.ones([], jnp.float32),
            effect_sums=EffectSums(*(jnp.zeros(shape, dtype) for _ in EffectSums._fields)),
            tx_state=tx.init(params),
            reference_state=_drop_names(reference.init(params), params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EffectState]:
        like = updates if params is None else params
        reference_state = _restore_names(state.reference_state, reference, like)
        reference_updates, reference_state = reference.update(
            updates, reference_state, params, **extra_args
        )
        updates, tx_state = tx.update(updates, state.tx_state, params, **extra_args)

        sums = _leaf_sums(updates, reference_updates, params, axis_name)
        dtype = state.effect_sums.products.dtype
        sums = EffectSums(*(value.astype(dtype) for value in sums))
        total = sums.sum()
        return updates, EffectState(
            norm_ratio=total.norm_ratio.astype(jnp.float32),
            cosine=total.cosine.astype(jnp.float32),
            effect_sums=sums if per_leaf else total,
            tx_state=tx_state,
            reference_state=_drop_names(reference_state, like),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _leaf_sums(
    updates: optax.Updates,
    reference: optax.Updates,
    params: optax.Params | None,
    axis_name: AxisName,
) -> EffectSums:
    """The sums of each leaf, in arrays of shape ``(leaves,)``; 0 where a leaf does not count."""

    def leaf_sums(update: Any, reference: Any, param: Any) -> EffectSums:
        if not (_is_inexact(update) and _is_inexact(reference)):
            return EffectSums(*[jnp.zeros([], jnp.float32)] * 4)
        return EffectSums(
            update_squares=_product(update, update),
            reference_squares=_product(reference, reference),
            products=_product(update, reference),
            weight_squares=_product(param, param) if _is_inexact(param) else jnp.float32(0),
        )

    if params is None:
        params = jax.tree.map(lambda _: None, updates)
    sums = jax.tree.map(leaf_sums, updates, reference, params, is_leaf=_is_none)
    scalars, _ = sum_over_mesh(jax.tree.leaves(sums), axis_name)
    dtype = _widest(scalars)
    empty = jnp.zeros([0], dtype)
    stacked = jnp.stack([scalar.astype(dtype) for scalar in scalars]) if scalars else empty
    # The barrier reduces the compile time, as in pooled_moments.
    return EffectSums(*jax.lax.optimization_barrier(stacked).reshape(-1, 4).T)


def _product(left: Any, right: Any) -> jax.Array:
    """``Re<left, right>``, summed in float32 at least."""
    left, right = (jnp.asarray(x, wide_dtype(jnp.result_type(x))) for x in (left, right))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.sum(jnp.real(left * jnp.conj(right)))


def _drop_names(state: Any, params: optax.Params) -> tuple[Any, ...]:
    """The parts of a state as a tuple: trees like ``params`` as they are, all else leaf by leaf.

    Neither ``optax.tree.get`` nor ``optax.tree.set`` then finds a field of it. Trees like the
    parameters are kept for code that shards them, boxes them or maps over them with
    ``optax.tree.map_params``.
    """
    return tuple(jax.tree.leaves(state, is_leaf=_is_like(params)))


def _restore_names(
    parts: tuple[Any, ...], reference: optax.GradientTransformation, params: optax.Params
) -> Any:
    # Only the reference knows its state's structure: a checkpoint has none, and at init the arrays
    # may have been in boxes or variables.
    state = jax.eval_shape(reference.init, params)
    return jax.tree.structure(state, is_leaf=_is_like(params)).unflatten(parts)


def _is_like(tree: Any) -> Callable[[Any], bool]:
    """Whether a node has the structure of ``tree``, up to masked leaves."""

    def structure(node: Any) -> Any:
        return jax.tree.structure(
            node, is_leaf=lambda part: part is None or isinstance(part, optax.MaskedNode)
        )

    expected = structure(tree)
    return lambda node: structure(node) == expected


def _is_none(node: Any) -> bool:
    return node is None


def _is_inexact(leaf: Any) -> bool:
    return leaf is not None and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _widest(leaves: list[Any]) -> Any:
    """The dtype of the sums over all leaves: float64 if a leaf has it, else float32."""
    wide = any(jnp.finfo(jnp.result_type(leaf)).bits > 32 for leaf in leaves)
    return jnp.float64 if wide else jnp.float32


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, and 0 where the denominator is 0."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))
