"""The layers of a network, parameters with more than one axis, from its input to its output."""

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_autoscale import layer_std

LARGEST_HISTOGRAM = 2**16  # entries; what lies behind a picture of 30 bars need not be more

Path = tuple[Any, ...]


@jax.tree_util.register_static
class LayerPaths(tuple[Path, ...]):
    """Paths of layers, which may be the result of a traced function."""

    @property
    def names(self) -> list[str]:
        """Such as `"stem/conv/kernel"`."""
        return ["/".join(map(str, path)) for path in self]


def layer_paths(model: nnx.Module) -> LayerPaths:
    """The paths of a network's layers, in the order in which its modules declare them.

    Args:
      model: a network as its constructor made it; `nnx.eval_shape` sorts the attributes.

    Returns:
      The paths, as those of `nnx.state`.

    Example:
      >>> from models import vit_tiny
      >>> layer_paths(vit_tiny(num_classes=10, rngs=nnx.Rngs(0))).names[:3]
      ['stem/kernel', 'blocks/0/attention/qkv/0/kernel', 'blocks/0/attention/qkv/1/kernel']
    """
    parameters = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return LayerPaths(
        path for path in _declared(model) if path in parameters and parameters[path].ndim > 1
    )


def _declared(node: Any, path: Path = ()) -> Iterator[Path]:
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, nnx.Variable):
        yield path
    elif isinstance(node, nnx.List | list | tuple):
        children = enumerate(node)
    elif isinstance(node, nnx.Module):
        children = vars(node).items()
    for key, child in children:
        yield from _declared(child, (*path, key))


def layer_stds(grads: Any, paths: Sequence[Path]) -> jax.Array:
    """The standard deviation of each layer's gradient; shape=(layers,), dtype=float32."""
    return jnp.stack(layer_std([_at(path, grads) for path in paths]))


def layer_entries(tree: Any, paths: Sequence[Path]) -> list[jax.Array]:
    """The entries of each layer's parameters or gradients, for a histogram of them.

    Args:
      tree: nested dictionaries of parameters, or of what has their shapes.
      paths: the layers'.

    Returns:
      An array of shape `(entries,)` for each; of more than `LARGEST_HISTOGRAM` entries every k-th,
      k odd.
    """
    layers = [_at(path, tree) for path in paths]
    return [layer.ravel()[:: layer.size // LARGEST_HISTOGRAM | 1] for layer in layers]


def _at(path: Path, tree: Any) -> jax.Array:
    return functools.reduce(operator.getitem, path, tree)
