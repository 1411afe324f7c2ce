"""What Optax's test suite requires of a contribution, and what this method cannot satisfy."""

import ast
import inspect
import re
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_autoscale
from optax_autoscale import (
    autoscale,
    center_layers,
    gradient_centralization,
    gradient_normalization,
    scale_by_global_std,
    zscore_normalization,
)

TRANSFORMATIONS = {
    make.__name__: make
    for make in (
        autoscale,
        scale_by_global_std,
        center_layers,
        gradient_centralization,
        gradient_normalization,
        zscore_normalization,
    )
}
every_transformation = pytest.mark.parametrize(
    "make", TRANSFORMATIONS.values(), ids=list(TRANSFORMATIONS)
)
method_and_halves = pytest.mark.parametrize("make", [autoscale, scale_by_global_std, center_layers])
MODULES = sorted(Path(optax_autoscale.__file__).parent.glob("*.py"))


def make_params(dtype="float32"):
    return {
        "kernel": jnp.linspace(-1, 2, 12, dtype=dtype).reshape(3, 4),
        "bias": jnp.linspace(0, 1, 4, dtype=dtype),
    }


def make_grads(dtype="float32", factor=1e-2):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jnp.asarray(factor * (rng.standard_normal(p.shape) + 0.5), dtype),
        make_params(dtype),
    )


def signature(tree):
    """Everything that decides whether jit recompiles or scan accepts a carry."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.aval.weak_type), tree)


@every_transformation
def test_extra_args_are_accepted_and_nothing_compiles_twice(make):
    tx = optax.chain(make(), optax.sgd(0.1))
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        value, grads = jax.value_and_grad(lambda p: jnp.sum(p["kernel"] ** 2))(params)
        updates, state = tx.update(grads, state, params, value=value, of_another=1)
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_the_ones_with_state_take_extra_args_themselves():
    for make in (autoscale, scale_by_global_std):
        assert isinstance(make(), optax.GradientTransformationExtraArgs)
        make().update(make_grads(), make().init(make_params()), None, value=1.0)


@every_transformation
def test_init_and_update_trace_and_keep_types(make):
    tx, params, grads = make(), make_params(), make_grads()
    state = tx.init(params)
    assert signature(jax.jit(tx.init)(params)) == signature(state)
    updates, new_state = jax.jit(tx.update)(grads, state, params)
    assert signature(new_state) == signature(state)
    assert signature(updates) == signature(grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.update, grads, state, params), (updates, new_state)
    )


@method_and_halves
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_state_and_updates_fit_both_branches_of_cond(make, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx, params, grads = make(), make_params(dtype), make_grads(dtype)

        @jax.jit
        def step(updates, state, take):
            return jax.lax.cond(
                take,
                lambda: tx.update(updates, state, params),
                lambda: (updates, state),
            )

        updates, state = step(grads, tx.init(params), True)
        updates, state = step(updates, state, False)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {dtype}


@method_and_halves
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_multi_steps_gives_zeros_until_the_last(make, dtype):
    tx = optax.MultiSteps(optax.chain(make(), optax.sgd(0.1)), every_k_schedule=2)
    params, grads = make_params(dtype), make_grads(dtype)
    update = jax.jit(tx.update)
    first, state = update(grads, tx.init(params), params)
    second, _ = update(grads, state, params)
    chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, params))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(second))


@method_and_halves
def test_inject_hyperparams_changes_nothing(make):
    static = [n for n in ("layer_axes", "axis_name") if n in inspect.signature(make).parameters]
    injected = optax.inject_hyperparams(make, static_args=static)()
    params, grads = make_params(), make_grads()
    expected, expected_state = jax.jit(make().update)(grads, make().init(params), params)
    updates, state = jax.jit(injected.update)(grads, jax.jit(injected.init)(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_close(state.inner_state, expected_state, rtol=1e-6)


@method_and_halves
def test_map_params_finds_no_parameters_in_the_state(make):
    params = make_params()
    tx = optax.chain(make(), optax.adam(1e-3))
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda _: "moment", state)
    assert marked[1][0].mu == {"kernel": "moment", "bias": "moment"}
    chex.assert_trees_all_equal(marked[0], state[0])


@every_transformation
@pytest.mark.parametrize(
    "mask", [{"kernel": True, "bias": False}, lambda p: {"kernel": 1, "bias": 0}]
)
def test_masked_skips_what_the_mask_leaves_out(make, mask):
    params, grads = make_params(), make_grads()
    tx = optax.masked(make(), mask)
    updates, _ = tx.update(grads, tx.init(params), params)
    alone, _ = make().update({"kernel": grads["kernel"]}, make().init(params), params)
    chex.assert_trees_all_equal(updates, alone | {"bias": grads["bias"]})


@every_transformation
@pytest.mark.parametrize("container", [{}, (), [], None])
def test_empty_containers(make, container):
    for tx in (make(), optax.masked(make(), mask=lambda tree: tree)):
        updates, _ = tx.update(container, tx.init(container), container)
        assert updates == container


@method_and_halves
def test_partition_gives_each_group_its_own(make):
    params, grads = make_params(), make_grads()
    both = {"left": params, "right": params}
    gradients = {"left": grads, "right": jax.tree.map(lambda g: 10 * g + 1, grads)}
    tx = optax.partition({"l": make(), "r": make()}, {"left": "l", "right": "r"})
    updates, _ = tx.update(gradients, tx.init(both), both)
    for side in both:
        alone, _ = make().update(gradients[side], make().init(params), params)
        chex.assert_trees_all_equal(updates[side], alone)


@method_and_halves
def test_named_chain(make):
    params, grads = make_params(), make_grads()
    tx = optax.named_chain(("first", make()), ("second", optax.scale(-1.0)))
    updates, state = tx.update(grads, tx.init(params), params)
    alone, alone_state = make().update(grads, make().init(params), params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.negative, alone))
    chex.assert_trees_all_equal(state["first"], alone_state)


def test_buffers_can_be_donated():
    tx, params, grads = autoscale(), make_params(), make_grads()
    expected, _ = tx.update(grads, tx.init(params), params)
    state = tx.init(params)
    assert len({leaf.unsafe_buffer_pointer() for leaf in state}) == len(state)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    _, state = update(jax.tree.map(jnp.copy, grads), state, params)
    updates, _ = update(jax.tree.map(jnp.copy, grads), state, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@method_and_halves
def test_types_do_not_change_on_a_mesh(make, axis_type):
    """On Explicit axes the sharding is part of the type, and scan and cond compare it."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"kernel": P("data", "model"), "bias": P("model")}
    tx, grads = make(), make_grads() | {"kernel": jnp.sin(jnp.arange(32.0)).reshape(8, 4)}
    expected, _ = jax.jit(tx.update)(*tx.update(grads, tx.init(grads)))

    @jax.jit
    def twice(updates, state):
        def step(carry, _):
            skip = jnp.isnan(jnp.sum(carry[0]["kernel"]))
            return jax.lax.cond(skip, lambda: carry, lambda: tx.update(*carry)), None

        return jax.lax.scan(step, (updates, state), length=2)[0]

    with jax.set_mesh(mesh):
        sharded = {
            name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
            for name, leaf in grads.items()
        }
        before = tx.init(sharded)
        updates, after = twice(sharded, before)
        twice(sharded, after)
    assert twice._cache_size() == 1
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, sharded)
    chex.assert_trees_all_close(jax.device_get(updates), expected, rtol=1e-5, atol=1e-5)


TARGET = jnp.array([[3.0, -2.0], [1.0, 4.0]])


def minimize(tx, steps=3000):
    """The point reached from 0 by minimizing a parabola around TARGET and a vector's."""

    def step(carry, _):
        params, state = carry
        grads = {"matrix": 2 * (params["matrix"] - TARGET), "vector": 2 * (params["vector"] - 1)}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"matrix": jnp.zeros((2, 2)), "vector": jnp.zeros(3)}
    (params, _), _ = jax.jit(partial(jax.lax.scan, step, length=steps))((params, tx.init(params)))
    return params


def test_the_scaling_half_converges():
    params = minimize(optax.chain(scale_by_global_std(max_scale=1.0), optax.sgd(0.1)))
    np.testing.assert_allclose(params["matrix"], TARGET, atol=1e-3)
    np.testing.assert_allclose(params["vector"], 1, atol=1e-3)


@pytest.mark.parametrize("make", [partial(autoscale, max_scale=1.0), center_layers])
def test_behind_centring_sgd_converges_up_to_the_mean_of_a_leaf(make):
    """Centering keeps a leaf's mean, here 0, away from that of the minimum, here 1.5."""
    params = minimize(optax.chain(make(), optax.sgd(0.1)))
    np.testing.assert_allclose(params["matrix"], TARGET - TARGET.mean(), atol=1e-3)
    np.testing.assert_allclose(params["vector"], 1, atol=1e-3)


def test_behind_centring_adam_stops_where_the_gradient_is_the_same_everywhere():
    """Adam divides entry by entry, which moves the mean, but the fixed points are the same."""
    params = minimize(optax.chain(autoscale(max_scale=1.0), optax.adam(1e-2)))
    error = np.asarray(params["matrix"] - TARGET)
    np.testing.assert_allclose(error, error.mean(), atol=2e-2)
    assert abs(error.mean()) > 0.1
    np.testing.assert_allclose(params["vector"], 1, atol=1e-2)


def test_flatten_leaves_nothing_eligible():
    tx = optax.flatten(autoscale())
    updates, _ = tx.update(make_grads(), tx.init(make_params()), make_params())
    chex.assert_trees_all_close(updates, make_grads(), rtol=1e-6)


@pytest.mark.parametrize("module", MODULES, ids=[path.name for path in MODULES])
def test_only_public_names_are_imported(module):
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            assert package in {"jax", "optax", "optax_autoscale", *sys.stdlib_module_names}, name
            assert package == "optax_autoscale" or not any(p.startswith("_") for p in rest), name


@every_transformation
def test_docstrings_have_equations_an_example_and_a_reference(make):
    for part in (
        ".. math::",
        "Returns:",
        "Raises:",
        "Example:",
        ">>> ",
        "References:",
        "arxiv.org",
    ):
        assert part in make.__doc__, part
    arguments = re.findall(r"^  (\w+):", inspect.cleandoc(make.__doc__), re.MULTILINE)
    assert set(inspect.signature(make).parameters) <= set(arguments)
