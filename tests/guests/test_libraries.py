"""The training steps of other libraries change the parameters as the paper's equations say."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_autoscale import autoscale, exclude, global_std, layer_std
from tests import oracle

RATE = 100.0  # large beside the small gradients below, so that parameters visibly move
TX = optax.chain(autoscale(), optax.sgd(RATE))
X = jax.random.normal(jax.random.key(0), (16, 5))
Y = jnp.sin(X[:, :2])
STEPS = 3


def loss_of(outputs):
    return jnp.mean((outputs - Y) ** 2) / 100  # a_1 < 0.5, so that the exponent becomes 1


def run_nnx():
    nnx = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), jnp.tanh, nnx.Linear(6, 2, rngs=rngs))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: loss_of(model(X)))(model)
        optimizer.update(model, grads)
        return grads

    def copy_of_params():
        return jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    params, grads = [copy_of_params()], []
    for _ in range(STEPS):
        grads.append(step(model, optimizer))
        params.append(copy_of_params())
    return params, grads


def run_linen():
    linen = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")
    model = linen.Sequential([linen.Dense(6), jnp.tanh, linen.Dense(2)])
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(1), X), tx=TX
    )

    @jax.jit
    def step(state):
        grads = jax.grad(lambda params: loss_of(state.apply_fn(params, X)))(state.params)
        return state.apply_gradients(grads=grads), grads

    params, grads = [state.params], []
    for _ in range(STEPS):
        state, gradient = step(state)
        params.append(state.params)
        grads.append(gradient)
    return params, grads


def run_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(5, 2, width_size=6, depth=1, activation=jnp.tanh, key=jax.random.key(1))
    state = TX.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: loss_of(jax.vmap(model)(X)))(model)
        updates, state = TX.update(grads, state)
        return eqx.apply_updates(model, updates), state, grads

    params, grads = [eqx.filter(model, eqx.is_inexact_array)], []
    for _ in range(STEPS):
        model, state, gradient = step(model, state)
        params.append(eqx.filter(model, eqx.is_inexact_array))
        grads.append(gradient)
    return params, grads


def run_haiku():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(
        hk.transform(lambda x: hk.nets.MLP([6, 2], activation=jnp.tanh)(x))
    )
    params = model.init(jax.random.key(1), X)
    state = TX.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: loss_of(model.apply(params, X)))(params)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    history, grads = [params], []
    for _ in range(STEPS):
        params, state, gradient = step(params, state)
        history.append(params)
        grads.append(gradient)
    return history, grads


@pytest.mark.parametrize("run", [run_nnx, run_linen, run_equinox, run_haiku])
def test_parameters_move_as_the_paper_says(run):
    params, grads = ([jax.tree.leaves(tree) for tree in trees] for trees in run())
    steps = oracle.autoscale(grads)
    assert [step.exponent for step in steps] == [1] * STEPS
    assert len(params[0]) == 4
    for before, after, step in zip(params, params[1:], steps, strict=False):
        for p, q, update in zip(before, after, step.updates, strict=True):
            moved = oracle.float64(q) - oracle.float64(p)
            np.testing.assert_allclose(moved, -RATE * update, rtol=1e-4, atol=2e-7)
            assert np.abs(moved).max() > 1e-3


def test_nnx_paths_end_in_the_name_of_the_parameter():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    seen = {}

    def layer_axes(path, leaf):
        seen[tuple(key.key for key in path)] = leaf.shape
        return tuple(range(leaf.ndim)) if path[-1].key == "kernel" else None

    optimizer = nnx.Optimizer(model, autoscale(layer_axes=layer_axes), wrt=nnx.Param)
    before = model.query.bias[...] + 0
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert seen["query", "bias"] == (2, 2)
    np.testing.assert_array_equal(model.query.bias[...], before + 1)
    np.testing.assert_array_equal(optax.tree.get(optimizer.opt_state, "global_std")[...], 0)


def grads_and_params():
    grads = {"base": {"w": 10 * X}, "adapter": {"w": X[:3] / 10}}
    return grads, jax.tree.map(jnp.zeros_like, grads)


def test_in_front_of_a_partition_all_gradients_count_and_inside_only_its_own():
    grads, params = grads_and_params()
    labels = {"base": "freeze", "adapter": "train"}
    in_front = optax.chain(
        autoscale(),
        optax.partition({"freeze": optax.set_to_zero(), "train": optax.sgd(1.0)}, labels),
    )
    inside = optax.partition({"freeze": optax.set_to_zero(), "train": TX}, labels)
    for tx, counted in ((in_front, grads), (inside, grads["adapter"])):
        updates, state = tx.update(grads, tx.init(params), params)
        expected = oracle.global_std(jax.tree.leaves(counted))
        np.testing.assert_allclose(optax.tree.get(state, "global_std"), expected, rtol=1e-5)
        assert not updates["base"]["w"].any()


def test_masked_alone_lets_the_other_gradients_through():
    grads, params = grads_and_params()
    tx = optax.masked(TX, {"base": False, "adapter": True})
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates["base"], grads["base"])


def test_clipping_behind_bounds_the_singularity():
    grads = {"w": X / global_std({"w": X}) * 1.0001}
    tx = optax.chain(autoscale(), optax.clip_by_global_norm(1.0))
    updates, state = tx.update(grads, tx.init(grads))
    assert optax.tree.get(state, "scale_factor") > 1e6
    np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-5)


def test_what_multiplies_the_gradient_in_front_changes_the_factor():
    grads = {"w": X / 1e4}
    for factor in (1.0, 256.0, 2.0**15):
        tx = optax.chain(optax.scale(factor), autoscale())
        _, state = tx.update(grads, tx.init(grads))
        s = factor * oracle.global_std([grads["w"]])
        np.testing.assert_allclose(
            optax.tree.get(state, "scale_factor"), (4 / np.log(s)) ** 2, rtol=1e-4
        )


def counted(params, *names):
    """The paths of the leaves that count as layers, without Flax's `.value`."""
    kept = jax.tree.leaves_with_path(layer_std(params, layer_axes=exclude(*names)))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in kept]
    return sorted(path.removesuffix("/value") for path in paths)


def test_exclude_in_nnx():
    nnx = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        tokens=nnx.Embed(9, 4, rngs=rngs),
        patches=nnx.Dict(embedding=nnx.Linear(4, 4, rngs=rngs)),
        layers=nnx.List([nnx.MultiHeadAttention(2, 4, decode=False, use_bias=False, rngs=rngs)]),
    )
    params = nnx.state(model, nnx.Param)
    kernels = [f"layers/0/{name}/kernel" for name in ("key", "out", "query", "value")]
    for tree in (params, nnx.to_pure_dict(params), model):  # with `.value`, without, by attributes
        patches = "patches/embedding/kernel"
        assert counted(tree, "embedding") == kernels
        assert counted(tree, "tokens/embedding") == [*kernels, patches]
        assert counted(tree, "tokens", "value") == [*kernels[:3], patches]

    # In the optimizer, whose paths are not those of the state.
    tx = optax.chain(autoscale(layer_axes=exclude("embedding")), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    table, kernel = model.tokens.embedding[...], model.layers[0].query.kernel[...]
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    np.testing.assert_array_equal(model.tokens.embedding[...], table - 1)
    np.testing.assert_array_equal(model.layers[0].query.kernel[...], kernel)  # centered: 0


@pytest.mark.parametrize("boxed", [False, True])
def test_exclude_in_linen(boxed):
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            init = nn.with_logical_partitioning(nn.initializers.normal(), ("in", "out"))
            x = nn.Embed(9, 4, embedding_init=init, name="tokens")(tokens)
            x = nn.Dense(4, kernel_init=init, name="embedding_norm")(x)
            return nn.MultiHeadAttention(2, kernel_init=init, use_bias=False, name="attention")(x)

    params = Model().init(jax.random.key(0), jnp.ones((2, 3), int))
    params = params if boxed else nn.unbox(params)
    kernels = [f"params/attention/{name}/kernel" for name in ("key", "out", "query", "value")]
    kernels += ["params/embedding_norm/kernel"]
    assert counted(params, "embedding") == counted(params, "tokens") == kernels
    # The name of a module, not that of the box around every parameter.
    assert counted(params, "value", "tokens") == kernels[:3] + kernels[4:]
    assert counted(params, "params") == []


def test_exclude_in_equinox():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        tokens: Any
        layers: list[Any]

    keys = jax.random.split(jax.random.key(0))
    model = Model(eqx.nn.Embedding(9, 4, key=keys[0]), [eqx.nn.Linear(4, 2, key=keys[1])])
    assert counted(model, "tokens") == ["layers/0/weight"]
    assert counted(model, "layers") == ["tokens/weight"]
    assert counted(model, "weight") == []


def test_exclude_in_haiku():
    hk = pytest.importorskip("haiku")

    class Model(hk.Module):
        def __call__(self, tokens):
            return hk.Linear(3)(hk.Embed(9, 4)(tokens))

    model = hk.transform(lambda tokens: Model()(tokens))
    params = model.init(jax.random.key(0), jnp.ones((2, 3), int))
    for name in ("embeddings", "embed", "model/embed"):
        assert counted(params, name) == ["model/linear/w"]
    assert counted(params, "embedding") == ["model/embed/embeddings", "model/linear/w"]
