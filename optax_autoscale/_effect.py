"""What a transformation does to the steps: its update compared with a reference optimizer's."""

import collections
import copyreg
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_autoscale._moments import AxisName, sqrt, sum_over_mesh, wide_dtype


class EffectSums(NamedTuple):
    r"""The sums that :func:`measure_effect` keeps, and the numbers derived from them.

    Let :math:`u` be the update and :math:`r` the reference's. Sums add up over steps and hosts, and
    ratios do not: for a window of steps, add the sums with ``optax.tree.add(sums, more_sums)``,
    then derive. Both numbers have the shape of the sums and are finite where they are.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_autoscale import EffectSums
      >>> sums = EffectSums(jnp.array([1.0, 4.0]), jnp.array([4.0, 4.0]), jnp.array([2.0, 0.0]))
      >>> sums.norm_ratio, sums.cosine  # of two steps
      (Array([0.5, 1. ], dtype=float32), Array([1., 0.], dtype=float32))
      >>> EffectSums(*map(jnp.sum, sums)).norm_ratio  # of both together: the root of 5 / 8
      Array(0.7905..., dtype=float32)
    """

    update_squares: jax.Array  # |u|^2; shape=(), dtype=float32, or float64
    reference_squares: jax.Array  # |r|^2; the same shape and dtype
    products: jax.Array  # Re<u, r>; the same

    @property
    def norm_ratio(self) -> jax.Array:
        """``|u| / |r|``; 1 where both are 0, since the steps are then equal, 0 where one is."""
        update, reference = sqrt(self.update_squares), sqrt(self.reference_squares)
        both_zero = (update == 0) & (reference == 0)
        return jnp.where(both_zero, 1, _divide(update, reference))

    @property
    def cosine(self) -> jax.Array:
        """``Re<u, r> / (|u| |r|)``; 1 where ``u`` is 0, being 0 times ``r``, else 0 where ``r`` is.

        ``1 - cosine**2`` is the share of ``|u|^2`` that no learning rate of the reference explains,
        and ``norm_ratio * cosine`` the factor on its learning rate that comes closest to ``u``.
        """
        # In this order it is exactly 1 where the three sums are equal.
        cosine = _divide(self.products, self.update_squares) * self.norm_ratio
        return jnp.where(self.update_squares == 0, 1, jnp.clip(cosine, -1, 1))


class EffectState(NamedTuple):
    """The state of :func:`measure_effect`: its latest step, and the states of both sides.

    ``optax.tree.get`` finds the first three fields, as in ``optax.tree.get(state, "norm_ratio")``.
    Before the first step they are those of two updates of 0.
    """

    norm_ratio: jax.Array  # |u| / |r| over all leaves; shape=(), dtype=float32
    cosine: jax.Array  # Re<u, r> / (|u| |r|) over all leaves; shape=(), dtype=float32
    effect_sums: EffectSums  # from which both are derived
    tx_state: Any  # of `tx`, the same as without the measurement
    reference_state: Any  # of `reference`, without the names of its fields


def measure_effect(
    tx: optax.GradientTransformation,
    reference: optax.GradientTransformation,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``reference`` beside ``tx`` on the same gradients, and measures how their steps differ.

    With :math:`u` the update of ``tx`` and :math:`r` that of ``reference``, over all floating-point
    and complex leaves together:

    .. math::

      \text{norm ratio} = \frac{\lVert u \rVert}{\lVert r \rVert}, \qquad
      \text{cosine} = \frac{\mathrm{Re} \langle u, r \rangle}
        {\lVert u \rVert \, \lVert r \rVert}

    The updates are those of ``tx``: bitwise on a CPU, elsewhere up to the rounding of operations
    that the compiler fuses differently. The state holds both numbers for the latest step,
    ``optax.tree.get(state, "norm_ratio")`` and ``"cosine"``, and the sums behind them,
    ``"effect_sums"``, for many steps: see :class:`EffectSums`.

    These are effects per step, on *your* trajectory: at each step both sides get the gradients,
    parameters and extra arguments that ``tx`` has led to, and ``reference`` has moments of these
    gradients. A separate run of ``reference`` would have taken another path.

    Weight decay on both sides hides the effect, because it is the same on both. With weights that
    are orthogonal to Adam's direction and three times as long, a true factor of 0.5 on that
    direction is measured as 0.56 with a decay of 0.1, and as 0.96 with a decay of 1. Compare
    without it.

    ``optax.tree.get(state, "mu")``, ``"learning_rate"`` or ``"scale_factor"`` find only those of
    ``tx``, although ``reference`` has fields of the same names: its state is kept without them.
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
      axis_name: inside ``jax.shard_map``, the mesh axes over which the leaves themselves are
        sharded; see :func:`autoscale`. It applies only to the sums: ``tx`` and ``reference`` take
        their own.

    Returns:
      A transformation whose state is an :class:`EffectState`. Sums are computed in float32, or
      float64 if a leaf of the parameters is: in float32, entries below about 1e-19 count as 0, and
      a sum of squares above 3e38 is infinite. Integer and None leaves count as 0. On a sharded
      tree the sums take one all-reduce for every 85 leaves.

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
    """
    tx = optax.with_extra_args_support(tx)
    reference = optax.with_extra_args_support(reference)

    def init_fn(params: optax.Params) -> EffectState:
        dtype = _widest([getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(params)])
        parts, structure = _split(reference.init(params), params)
        return EffectState(
            norm_ratio=jnp.ones([], jnp.float32),
            cosine=jnp.ones([], jnp.float32),
            effect_sums=EffectSums(*(jnp.zeros([], dtype) for _ in EffectSums._fields)),
            tx_state=tx.init(params),
            reference_state=_nameless_state(structure)(*parts),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EffectState]:
        structure = type(state.reference_state).structure
        reference_updates, reference_state = reference.update(
            updates, structure.unflatten(state.reference_state), params, **extra_args
        )
        updates, tx_state = tx.update(updates, state.tx_state, params, **extra_args)

        sums = _effect_sums(updates, reference_updates, axis_name)
        dtype = state.effect_sums.products.dtype
        sums = EffectSums(*(value.astype(dtype) for value in sums))
        return updates, EffectState(
            norm_ratio=sums.norm_ratio.astype(jnp.float32),
            cosine=sums.cosine.astype(jnp.float32),
            effect_sums=sums,
            tx_state=tx_state,
            reference_state=type(state.reference_state)(*structure.flatten_up_to(reference_state)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _effect_sums(
    updates: optax.Updates, reference: optax.Updates, axis_name: AxisName
) -> EffectSums:
    leaves, structure = jax.tree.flatten(updates, is_leaf=_is_none)
    pairs = [
        (left, right)
        for left, right in zip(leaves, structure.flatten_up_to(reference), strict=True)
        if _is_inexact(left) and _is_inexact(right)
    ]
    products = [_product(*two) for u, r in pairs for two in ((u, u), (r, r), (u, r))]
    products, _ = sum_over_mesh(products, axis_name)
    dtype = _widest([product.dtype for product in products])
    stacked = jnp.stack([jnp.zeros([], dtype)] * 3 + [p.astype(dtype) for p in products])
    # The barrier reduces the compile time, as in pooled_moments.
    return EffectSums(*jnp.sum(jax.lax.optimization_barrier(stacked).reshape(-1, 3), axis=0))


def _product(left: Any, right: Any) -> jax.Array:
    """``Re<left, right>``, summed in float32 at least."""
    left, right = (jnp.asarray(x, wide_dtype(jnp.result_type(x))) for x in (left, right))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.sum(jnp.real(left * jnp.conj(right)))


def _split(state: Any, params: optax.Params) -> tuple[list[Any], Any]:
    """The parts of a state and its structure: trees like ``params`` are one part, else each leaf.

    Trees like the parameters stay whole for code that shards them, boxes them or maps over them
    with ``optax.tree.map_params``.
    """

    def structure(node: Any) -> Any:
        return jax.tree.structure(
            node, is_leaf=lambda part: part is None or isinstance(part, optax.MaskedNode)
        )

    expected = structure(params)
    return jax.tree.flatten(state, is_leaf=lambda node: structure(node) == expected)


@functools.cache
def _nameless_state(structure: Any) -> Any:
    """A type for the parts of a state, in which ``optax.tree.get`` and ``set`` find no names.

    It is a NamedTuple, the one node that everything handles that handles states of Optax, and it
    knows the structure itself: a node of our own would be unknown to ``flax.serialization``, and a
    part that is no array to checkpoints and ``jax.jit``.
    """
    fields = [f"part{i}" for i in range(structure.num_leaves)]
    base = collections.namedtuple("ReferenceState", fields)
    return _Nameless("ReferenceState", (base,), {"__slots__": (), "structure": structure})


class _Nameless(type):
    """What such types are instances of, to be pickled by their structure."""

    structure: Any


copyreg.pickle(_Nameless, lambda kind: (_nameless_state, (kind.structure,)))


def _is_none(node: Any) -> bool:
    return node is None


def _is_inexact(leaf: Any) -> bool:
    return leaf is not None and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _widest(dtypes: list[Any]) -> Any:
    """The dtype of the sums over leaves of these: float64 if one of them is, else float32."""
    inexact = [d for d in dtypes if d is not None and jnp.issubdtype(d, jnp.inexact)]
    return jnp.float64 if any(jnp.finfo(d).bits > 32 for d in inexact) else jnp.float32


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient, and 0 where the denominator is 0."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))
