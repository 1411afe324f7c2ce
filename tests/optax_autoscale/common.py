"""Trees, transformations and meshes that the tests of this folder share."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_autoscale import (
    autoscale,
    center_layers,
    gradient_centralization,
    gradient_normalization,
    scale_by_global_std,
    zscore_normalization,
)

LAYERED = [autoscale, scale_by_global_std, center_layers, zscore_normalization]
TRANSFORMATIONS = [*LAYERED, gradient_centralization, gradient_normalization]
every_transformation = pytest.mark.parametrize("make", TRANSFORMATIONS)
SPECS = {
    "rows": P("data", None),
    "columns": P(None, "model"),
    "both": P("data", "model"),
    "joint": P(("data", "model"), None),
    "conv": P(None, None, None, "data"),
    "replicated": P(),
    "bias": P("data"),
}
axis_types = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


def random_grads(seed=0, scale=1e-2, mean=0.5, dtype="float32"):
    """A small network's gradients: convolution, biases, dense; entries ~ scale * N(mean, 1)."""
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 4, 8), "conv_bias": (8,), "dense": (8, 10), "dense_bias": (10,)}
    return {
        name: jnp.asarray(scale * (rng.standard_normal(shape) + mean), dtype)
        for name, shape in shapes.items()
    }


def assert_trees_close(trees, expected, rtol=1e-5):
    """Equal up to rounding, which centering makes relative to a leaf's largest entry."""
    for leaf, reference in zip(*map(jax.tree.leaves, (trees, expected)), strict=True):
        reference = np.asarray(reference)
        atol = rtol * np.abs(reference).max(initial=1e-38)
        np.testing.assert_allclose(np.asarray(leaf), reference, rtol=rtol, atol=atol)


def signature(tree):
    """Everything that decides whether jit recompiles or scan accepts a carry."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def mesh_grads():
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(SPECS, (8, 16)) | {"conv": (3, 3, 4, 8), "bias": (16,)}
    return {
        name: jnp.asarray(1e-2 * (rng.standard_normal(shape) + 0.3 * i), jnp.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }


def place(grads, mesh):
    return {name: jax.device_put(g, NamedSharding(mesh, SPECS[name])) for name, g in grads.items()}


def many_rows(mesh, copies):
    """Leaves that are all split alike, as those of a large network are."""
    rows = NamedSharding(mesh, P("data", None))
    grads = {f"{name}{i}": mesh_grads()[name] for i in range(copies) for name in ("rows", "both")}
    return jax.device_put(grads, rows)


def collectives(compiled):
    """The collective operations of a compiled program."""
    pattern = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return re.findall(pattern, compiled.as_text())


def in_shard_map(fn, specs, out_specs, mesh=None, **kwargs):
    mesh = make_mesh() if mesh is None else mesh
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(specs,), out_specs=out_specs, **kwargs))


@jax.tree_util.register_pytree_node_class
class ArrayNode:
    """A node of a user's tree that accepts nothing but arrays."""

    def __init__(self, array):
        if not isinstance(array, jax.Array):
            raise TypeError(array)
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)
