"""What XLA's CPU backend has to be told; on other devices these functions do nothing.

That backend fuses whatever led to an array, however long, into each operation that reads it. The
gradient of a kernel is a convolution whose two operands are read transposed, and each of the two
reads then repeats the normalisations, activations and additions since the last convolutions.
`lax.optimization_barrier` does not prevent it; a branch does, as nothing is fused across it.
"""

import jax
from jax import lax


def _copy(x: jax.Array, witness: jax.Array) -> jax.Array:
    def branch(x: jax.Array) -> jax.Array:
        # True, which XLA cannot know as it might be NaN. Equal branches would be merged.
        first = witness.ravel()[0].astype(x.dtype)
        return lax.cond(first == first, lambda x: x, lambda x: x * first, x)

    return lax.platform_dependent(x, cpu=branch, default=lambda x: x)


@jax.custom_vjp
def materialized(x: jax.Array, witness: jax.Array) -> jax.Array:
    """The same array, held in memory instead of computed anew by each of its readers.

    Args:
      x: an array.
      witness: any array that is not empty; where its first entry is NaN, so is the result.

    Returns:
      `x`. Its gradient passes unchanged.
    """
    return _copy(x, witness)


@jax.custom_vjp
def materialized_gradient(x: jax.Array, witness: jax.Array) -> jax.Array:
    """The same array, whose gradient is held in memory; see `materialized`."""
    return x


materialized.defvjp(lambda x, witness: (_copy(x, witness), None), lambda _, grad: (grad, None))
materialized_gradient.defvjp(
    lambda x, witness: (x, witness), lambda witness, grad: (_copy(grad, witness), None)
)
