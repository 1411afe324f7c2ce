"""Training on eight devices equals training on one, however the parameters are sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_autoscale import autoscale

X = jax.random.normal(jax.random.key(0), (32, 8))
PARAMS = {
    "up": jax.random.normal(jax.random.key(1), (8, 16)) / 4,
    "bias": jnp.zeros(16),
    "down": jax.random.normal(jax.random.key(2), (16, 8)) / 4,
}
LAYOUTS = {
    "fsdp": {"up": P("data", None), "bias": P("data"), "down": P("data", None)},
    "tensor": {"up": P(None, "model"), "bias": P("model"), "down": P("model", None)},
    "both": {"up": P("data", "model"), "bias": P("model"), "down": P("model", "data")},
}
TX = optax.chain(autoscale(), optax.adamw(1e-2))


def make_mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["up"] + params["bias"])
    return jnp.mean((hidden @ params["down"] - x) ** 2)


def train(params, state, x):
    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = TX.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, state), length=5)


@pytest.fixture(scope="module")
def on_one_device():
    return jax.jit(train)(PARAMS, TX.init(PARAMS), X)


def assert_close(got, expected):
    for left, right in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_on_a_mesh(layout, on_one_device):
    mesh = make_mesh()
    shardings = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS[layout].items()}
    params = jax.device_put(PARAMS, shardings)
    x = jax.device_put(X, NamedSharding(mesh, P("data", None)))
    (trained, state), losses = jax.jit(train)(params, TX.init(params), x)
    assert_close(((trained, state), losses), on_one_device)
    for name, leaf in trained.items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)


def test_fsdp_in_shard_map(on_one_device):
    """Parameters live in shards, are gathered for use, and their gradients come back in shards."""
    layout = {name: P("data") for name in PARAMS}
    state_specs = optax.tree.map_params(
        TX, lambda _, spec: spec, TX.init(PARAMS), layout, transform_non_params=lambda _: P()
    )

    def trained(tx):
        def step(params, state, x):
            def sharded_loss(shards):
                gather = partial(jax.lax.all_gather, axis_name="data", tiled=True)
                return jax.lax.pmean(loss_fn(jax.tree.map(gather, shards), x), "data")

            updates, state = tx.update(jax.grad(sharded_loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        specs = (layout, state_specs)
        shard_map = partial(jax.shard_map, mesh=make_mesh(), in_specs=(*specs, P("data")))
        run, params, state = jax.jit(shard_map(step, out_specs=specs)), PARAMS, tx.init(PARAMS)
        for _ in range(5):
            params, state = run(params, state, X)
        return params

    (expected, _), _ = on_one_device
    assert_close(trained(optax.chain(autoscale(axis_name="data"), optax.adamw(1e-2))), expected)


def test_data_parallelism_in_shard_map():
    """The gradient of a replicated parameter is summed over devices; of a mean loss, averaged."""

    def scale_factor(grads):
        return autoscale().update(grads, autoscale().init(grads))[1].scale_factor

    def mean_of_loss(params, x):
        return scale_factor(jax.grad(lambda p: jax.lax.pmean(loss_fn(p, x), "data"))(params))

    def local_loss(params, x):
        return scale_factor(jax.grad(loss_fn)(params, x))

    def mean_of_gradients(params, x):
        return scale_factor(jax.lax.pmean(jax.grad(loss_fn)(params, x), "data"))

    grads = jax.grad(loss_fn)(PARAMS, X)
    right, summed = scale_factor(grads), scale_factor(jax.tree.map(lambda g: 4 * g, grads))
    assert abs(summed / right - 1) > 0.1
    for factor, check_vma, expected in (
        (mean_of_loss, True, right),
        (local_loss, True, summed),
        (mean_of_gradients, False, right),
    ):
        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        run = jax.shard_map(factor, mesh=make_mesh(), check_vma=check_vma, **specs)
        np.testing.assert_allclose(jax.jit(run)(PARAMS, X), expected, rtol=1e-4)
