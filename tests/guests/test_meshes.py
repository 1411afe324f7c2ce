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


def make_mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def loss_fn(params, x, explicit=False):
    if not explicit:
        hidden = jnp.tanh(x @ params["up"] + params["bias"])
        return jnp.mean((hidden @ params["down"] - x) ** 2)
    # On Explicit axes the program says where parameters are gathered and products summed.
    model = "model" if "model" in jax.typeof(params["up"]).sharding.spec else None
    up = jax.sharding.reshard(params["up"], P(None, model))
    bias = jax.sharding.reshard(params["bias"], P(model))
    down = jax.sharding.reshard(params["down"], P(model, None))
    hidden = jnp.tanh(x @ up + bias)
    return jnp.mean((jnp.dot(hidden, down, out_sharding=P("data", None)) - x) ** 2)


def train(params, state, x, explicit=False):
    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, x, explicit)
        updates, state = TX.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, state), length=5)


@pytest.fixture(scope="module")
def on_one_device():
    return jax.jit(train)(PARAMS, TX.init(PARAMS), X)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_on_a_mesh(layout, axis_type, on_one_device):
    mesh, specs = make_mesh(axis_type), LAYOUTS[layout]
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
            for name, leaf in PARAMS.items()
        }
        x = jax.device_put(X, NamedSharding(mesh, P("data", None)))
        run = jax.jit(partial(train, explicit=axis_type == AxisType.Explicit))
        before = TX.init(params)
        (trained, after), losses = run(params, before, x)
        # What comes out goes in again without a new compilation. The first time may need one: on
        # Auto axes jax drops the None at the end of P("data", None), and takes that for another.
        (again, state), _ = run(trained, after, x)
        compiled = run._cache_size()
        run(again, state, x)
        assert run._cache_size() == compiled
    (expected, expected_state), expected_losses = on_one_device
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for got, wanted in zip(
        *map(jax.tree.leaves, ((trained, after), (expected, expected_state))), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)
    for name, leaf in trained.items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)


def shard_mapped(fn, **kwargs):
    mesh = make_mesh(AxisType.Auto)
    return jax.jit(jax.shard_map(fn, mesh=mesh, **kwargs))


def test_fsdp_in_shard_map(on_one_device):
    """Parameters live in shards, are gathered for use, and their gradients come back in shards."""
    tx = optax.chain(autoscale(axis_name="data"), optax.adamw(1e-2))

    def step(params, state, x):
        def sharded_loss(shards):
            gathered = {
                name: jax.lax.all_gather(leaf, "data", tiled=True) for name, leaf in shards.items()
            }
            return jax.lax.pmean(loss_fn(gathered, x), "data")

        loss, grads = jax.value_and_grad(sharded_loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    layout = {name: P("data") for name in PARAMS}
    state = tx.init(PARAMS)
    state_specs = optax.tree.map_params(
        tx, lambda _, spec: spec, state, layout, transform_non_params=lambda _: P()
    )
    run = shard_mapped(
        step, in_specs=(layout, state_specs, P("data")), out_specs=(layout, state_specs, P())
    )
    params, losses = PARAMS, []
    for _ in range(5):
        params, state, loss = run(params, state, X)
        losses.append(loss)
    (expected, _), expected_losses = on_one_device
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-3, atol=1e-5)


def scale_factor(grads):
    return autoscale().update(grads, autoscale().init(grads))[1].scale_factor


def test_data_parallelism_in_shard_map():
    """The gradient of a replicated parameter is summed over devices; of a mean loss, averaged."""

    def mean_of_loss(params, x):
        return scale_factor(jax.grad(lambda p: jax.lax.pmean(loss_fn(p, x), "data"))(params))

    def local_loss(params, x):
        return scale_factor(jax.grad(loss_fn)(params, x))

    def mean_of_gradients(params, x):
        return scale_factor(jax.lax.pmean(jax.grad(loss_fn)(params, x), "data"))

    grads = jax.grad(loss_fn)(PARAMS, X)
    right, summed = scale_factor(grads), scale_factor(jax.tree.map(lambda g: 4 * g, grads))
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    tracked = shard_mapped(mean_of_loss, **specs)(PARAMS, X)
    np.testing.assert_allclose(tracked, right, rtol=1e-4)
    np.testing.assert_allclose(shard_mapped(local_loss, **specs)(PARAMS, X), summed, rtol=1e-4)
    untracked = shard_mapped(mean_of_gradients, check_vma=False, **specs)(PARAMS, X)
    np.testing.assert_allclose(untracked, right, rtol=1e-4)
    assert abs(summed / right - 1) > 0.1
