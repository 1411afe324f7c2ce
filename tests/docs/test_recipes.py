"""What the recipes claim: other libraries' training steps, the rules, and the order in a chain."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_autoscale import autoscale, center_layers, exclude, global_std, layer_std, measure_effect
from tests import oracle, pages

pytestmark = pytest.mark.usefixtures("compile_faster")
RATE = 100.0  # large beside the small gradients below, so that parameters visibly move
TX = optax.chain(autoscale(), optax.sgd(RATE))
X = jax.random.normal(jax.random.key(0), (16, 5))
Y = jnp.sin(X[:, :2])
GRADS = {"w": X / 1e4}


def loss_of(outputs):
    return jnp.mean((outputs - Y) ** 2) / 100  # a_1 < 0.5, so that the exponent becomes 1


def nnx_steps():
    nnx = pytest.importorskip("flax.nnx")
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), jnp.tanh, nnx.Linear(6, 2, rngs=rngs))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: loss_of(model(X)))(model)
        optimizer.update(model, grads)
        return grads

    while True:
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        grads = step(model, optimizer)
        yield before, grads, nnx.state(model, nnx.Param)


def linen_steps():
    linen = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")
    model = linen.Sequential([linen.Dense(6), jnp.tanh, linen.Dense(2)])
    params = model.init(jax.random.key(1), X)
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=TX)
    while True:
        grads = jax.grad(lambda params: loss_of(model.apply(params, X)))(state.params)
        before, state = state.params, state.apply_gradients(grads=grads)
        yield before, grads, state.params


def equinox_steps():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(5, 2, width_size=6, depth=1, activation=jnp.tanh, key=jax.random.key(1))
    arrays = partial(eqx.filter, filter_spec=eqx.is_inexact_array)
    state = TX.init(arrays(model))
    while True:
        before = model
        grads = eqx.filter_grad(lambda model: loss_of(jax.vmap(model)(X)))(model)
        updates, state = TX.update(grads, state)
        model = eqx.apply_updates(model, updates)
        yield arrays(before), grads, arrays(model)


def haiku_steps():
    hk = pytest.importorskip("haiku")
    mlp = hk.transform(lambda x: hk.nets.MLP([6, 2], activation=jnp.tanh)(x))
    params = mlp.init(jax.random.key(1), X)
    state = TX.init(params)
    while True:
        grads = jax.grad(lambda params: loss_of(mlp.apply(params, None, X)))(params)
        updates, state = TX.update(grads, state, params)
        before, params = params, optax.apply_updates(params, updates)
        yield before, grads, params


@pytest.mark.parametrize("steps", [nnx_steps, linen_steps, equinox_steps, haiku_steps])
def test_parameters_move_as_the_paper_says(steps):
    history = [
        tuple(map(jax.tree.leaves, trees)) for trees, _ in zip(steps(), range(3), strict=False)
    ]
    expected = oracle.autoscale([grads for _, grads, _ in history])
    assert [step.exponent for step in expected] == [1, 1, 1]
    for (before, _, after), step in zip(history, expected, strict=True):
        assert len(before) == 4
        for p, q, update in zip(before, after, step.updates, strict=True):
            moved = oracle.float64(q) - oracle.float64(p)
            np.testing.assert_allclose(moved, -RATE * update, rtol=1e-4, atol=2e-7)
            assert np.abs(moved).max() > 1e-3


def counted(params, rule):
    """The paths of the leaves that count as layers, without Flax's `.value`, and their layers."""
    kept = jax.tree.leaves_with_path(layer_std(params, layer_axes=rule))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in kept]
    shapes = [std.shape for _, std in kept]
    return dict(zip([path.removesuffix("/value") for path in paths], shapes, strict=True))


def left(params, *names):
    return sorted(counted(params, exclude(*names)))


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
        assert left(tree, "embedding") == kernels
        assert left(tree, "tokens/embedding") == [*kernels, patches]
        assert left(tree, "tokens", "value") == [*kernels[:3], patches]

    # In the optimizer, whose paths are not those of the state.
    tx = optax.chain(autoscale(layer_axes=exclude("embedding")), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    table, kernel = model.tokens.embedding[...], model.layers[0].query.kernel[...]
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    np.testing.assert_array_equal(model.tokens.embedding[...], table - 1)
    np.testing.assert_array_equal(model.layers[0].query.kernel[...], kernel)  # centered: 0


@pytest.mark.parametrize("boxed", [False, True])
def test_rules_in_linen(boxed):
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            init = nn.with_logical_partitioning(nn.initializers.normal(), ("in", "out"))
            x = nn.Embed(9, 4, embedding_init=init, name="tokens")(tokens)
            x = nn.Dense(4, kernel_init=init, name="embedding_norm")(x)
            return nn.MultiHeadAttention(2, kernel_init=init, bias_init=init, name="attention")(x)

    params = jax.jit(Model().init)(jax.random.key(0), jnp.ones((2, 3), int))
    params = params if boxed else nn.unbox(params)
    kernels = [f"params/attention/{name}/kernel" for name in ("key", "out", "query", "value")]
    kernels += ["params/embedding_norm/kernel"]
    biases = [f"params/attention/{name}/bias" for name in ("key", "query", "value")]
    assert left(params, "embedding") == left(params, "tokens") == sorted([*kernels, *biases])
    # The name of a module, not that of the box around every parameter.
    assert left(params, "value", "tokens", "bias") == kernels[:3] + kernels[4:]
    assert left(params, "params") == []
    by_name = pages.run(pages.DOCS / "recipes/flax.md")["layer_axes"]
    assert sorted(counted(params, by_name)) == kernels
    updates, _ = autoscale(layer_axes=by_name).update(params, autoscale().init(params))
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_exclude_in_equinox_and_haiku():
    eqx, hk = pytest.importorskip("equinox"), pytest.importorskip("haiku")
    keys = jax.random.split(jax.random.key(0))
    tokens, layer = eqx.nn.Embedding(9, 4, key=keys[0]), eqx.nn.Linear(4, 2, key=keys[1])
    model = eqx.nn.Sequential([tokens, layer])
    assert left(model, "layers/0") == ["layers/1/weight"]
    assert left(model, "weight") == []

    class Model(hk.Module):
        def __call__(self, tokens):
            return hk.Linear(3)(hk.Embed(9, 4)(tokens))

    model = hk.transform(lambda tokens: Model()(tokens))
    params = model.init(jax.random.key(0), jnp.ones((2, 3), int))
    for name in ("embeddings", "embed", "model/embed"):
        assert left(params, name) == ["model/linear/w"]
    assert left(params, "embedding") == ["model/embed/embeddings", "model/linear/w"]


def linen_blocks():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.MultiHeadAttention(2, name="attention")(nn.LayerNorm(name="norm")(x)), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    params = jax.eval_shape(stack().init, jax.random.key(0), jnp.ones((4, 6, 8)), None)["params"]
    params = optax.tree.ones_like(params)
    return params, {f"attention/{name}/kernel" for name in ("key", "out", "query", "value")}


def nnx_blocks():
    nnx = pytest.importorskip("flax.nnx")
    make = nnx.vmap(lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs))
    stack = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(stack, nnx.Param))
    return params, {f"{name}/kernel" for name in ("key", "out", "query", "value")}


def equinox_blocks():
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        norm: Any
        linear: Any

        def __init__(self, key):
            self.norm, self.linear = eqx.nn.LayerNorm(8), eqx.nn.Linear(8, 8, key=key)

    stack = eqx.filter_vmap(Block)(jax.random.split(jax.random.key(0), 3))
    return eqx.filter(stack, eqx.is_inexact_array), {"linear/weight"}


@pytest.mark.parametrize("stack", [linen_blocks, nnx_blocks, equinox_blocks])
def test_scanned_blocks_are_treated_like_blocks_that_are_written_out(stack):
    layer_axes = pages.run(pages.DOCS / "recipes/scan.md")["layer_axes"]
    blocks, weights = stack()
    assert counted({"blocks": blocks}, layer_axes) == {f"blocks/{name}": (3,) for name in weights}
    grads = {"blocks": optax.tree.random_like(jax.random.key(1), blocks), "head": {"kernel": X}}
    apart = [jax.tree.map(lambda leaf, i=i: leaf[i], grads["blocks"]) for i in range(3)]
    tx = autoscale(layer_axes=layer_axes, max_scale=1.0)
    update = jax.jit(tx.update)
    updates, state = update(grads, tx.init(None))
    expected, other = update({"apart": apart, "head": grads["head"]}, tx.init(None))
    np.testing.assert_allclose(state.global_std, other.global_std, rtol=1e-5)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected["apart"])
    for got, wanted in zip(*map(jax.tree.leaves, (updates["blocks"], together)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_unused_rows_of_an_embedding_drift_unless_it_is_excluded():
    keys = jax.random.split(jax.random.key(1), 4)
    start = {
        "items": {"embedding": 0.02 * jax.random.normal(keys[0], (1000, 16))},
        "hidden": {"kernel": jax.random.normal(keys[1], (16, 32)) / 4},
        "head": {"kernel": jax.random.normal(keys[3], (32, 1)) / 6},
    }
    ratings = 1 + 4 * jax.random.uniform(keys[2], (1000,))

    def loss_fn(params, items):
        hidden = jax.nn.relu(params["items"]["embedding"][items] @ params["hidden"]["kernel"])
        return jnp.mean(((hidden @ params["head"]["kernel"])[:, 0] - ratings[items]) ** 2)

    def moved(rule):
        tx = optax.chain(autoscale(layer_axes=rule), optax.adam(1e-3))

        def step(carry, key):
            params, state = carry
            items = jax.random.randint(key, (64,), 0, 500)  # the other 500 items never occur
            updates, state = tx.update(jax.grad(loss_fn)(params, items), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, steps = (start, tx.init(start)), jax.random.split(keys[2], 500)
        (params, _), _ = jax.jit(lambda: jax.lax.scan(step, carry, steps))()
        return (params["items"]["embedding"] - start["items"]["embedding"])[500:]

    np.testing.assert_allclose(jnp.abs(moved(None)), 0.32, atol=0.02)
    np.testing.assert_array_equal(moved(exclude("embedding")), 0)


def test_the_step_of_polyak_sgd_becomes_longer_by_the_inverse_factor():
    grads, polyak = GRADS["w"] - GRADS["w"].mean(), partial(optax.polyak_sgd, 1e9)
    steps = []
    for tx in (polyak(), optax.chain(autoscale(), polyak())):
        updates, state = tx.update(grads, tx.init(grads), grads, value=1.0)
        steps.append(optax.tree.norm(updates))
    factor = optax.tree.get(state, "scale_factor")
    assert factor < 0.5
    np.testing.assert_allclose(steps[1] / steps[0], 1 / factor, rtol=1e-5)


def test_split_into_two_parts_a_complex_parameter_has_a_smaller_deviation():
    real, imaginary = jax.random.normal(jax.random.key(0), (2, 64, 64))
    grads = {"w": (real + 1j * imaginary) / 1000}
    split = optax.contrib.split_real_and_imaginary(autoscale())
    _, state = split.update(grads, split.init(grads))
    ratio = global_std(grads) / optax.tree.get(state, "global_std")
    np.testing.assert_allclose(ratio, np.sqrt(2), rtol=1e-3)


def test_float16_rounds_small_updates():
    grads = {"w": (1e-6 * jax.random.normal(jax.random.key(0), (256, 256))).astype(jnp.float16)}
    wide = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
    updates, _ = autoscale().update(grads, autoscale().init(grads))
    exact, state = autoscale().update(wide, autoscale().init(wide))
    error = optax.tree.norm(optax.tree.sub(updates, exact)) / optax.tree.norm(exact)
    np.testing.assert_allclose([error, state.scale_factor], [0.21, 0.084], rtol=0.03)
    np.testing.assert_allclose((updates["w"] == 0).mean(), 0.28, atol=0.01)


def test_schedule_free_passes_the_gradient_on_and_muon_cancels_the_factor():
    def after(tx, steps):
        params, state, update = {"w": X[:4]}, tx.init({"w": X[:4]}), jax.jit(tx.update)
        for _ in range(steps):
            updates, state = update({"w": jnp.sin(params["w"]) / 1e4}, state, params)
            params = optax.apply_updates(params, updates)
        return params["w"]

    base, free = optax.sgd(0.5), optax.contrib.schedule_free
    before, within = (
        optax.chain(autoscale(), free(base, 0.5)),
        free(optax.chain(autoscale(), base), 0.5),
    )
    np.testing.assert_array_equal(after(before, 20), after(within, 20))
    muon = optax.contrib.muon(0.02)
    first = [after(optax.chain(tx, muon), 1) for tx in (autoscale(), center_layers())]
    np.testing.assert_allclose(*first, atol=1e-4)


def test_measure_effect_inside_multi_steps_keeps_the_numbers_of_the_latest_full_step():
    def around(reference):
        return optax.chain(autoscale(), reference)

    adam = optax.adam(1e-3)
    inside = optax.MultiSteps(measure_effect(around(adam), adam), 2)
    outside = measure_effect(optax.MultiSteps(around(adam), 2), optax.MultiSteps(adam, 2))
    numbers = []
    for tx in (inside, outside):
        state, params = tx.init(GRADS), GRADS
        for step in range(5):
            grads = {"w": X / (step + 1) ** 2}
            _, state = jax.jit(tx.update)(grads, state, params)
        numbers.append(optax.tree.get(state, "norm_ratio"))
    assert numbers[0] != 1
    assert numbers[1] == 1


def test_with_the_loss_scale_divided_out_the_deviation_is_that_of_float32():
    dynamic_scale = pytest.importorskip("flax.training.dynamic_scale")
    x = jax.random.normal(jax.random.key(0), (16, 8)) / 4000
    y = x @ jax.random.normal(jax.random.key(1), (8, 3))
    params = {"kernel": jnp.zeros((8, 3))}

    def loss_fn(params, dtype=jnp.float16):
        errors = x.astype(dtype) @ params["kernel"].astype(dtype) - y.astype(dtype)
        return jnp.mean(errors.astype(jnp.float32) ** 2)

    exact = global_std(jax.grad(loss_fn)(params, jnp.float32))
    assert abs(global_std(jax.grad(loss_fn)(params)) / exact - 1) > 0.05  # underflown
    scale = dynamic_scale.DynamicScale(scale=2.0**15)
    _, is_finite, _, grads = scale.value_and_grad(loss_fn)(params)
    assert is_finite
    np.testing.assert_allclose(global_std(grads), exact, rtol=0.01)


def test_a_checkpoint_resumes_and_a_new_state_decides_the_exponent_again(tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    ocp = pytest.importorskip("orbax.checkpoint").v1
    tx = optax.chain(autoscale(), optax.adam(1e-2))
    step = jax.jit(tx.update)
    grads = [{"w": jax.random.normal(jax.random.key(t), (3, 4)) / 100**t} for t in range(4)]
    start = state = tx.init(grads[0])
    for grad in grads[:2]:
        _, state = step(grad, state)
    restored = [serialization.from_bytes(start, serialization.to_bytes(state))]
    ocp.save(tmp_path / "step2", state)
    restored.append(ocp.load(tmp_path / "step2", start))
    expected, after = step(grads[2], state)
    for checkpoint in restored:
        np.testing.assert_array_equal(step(grads[2], checkpoint)[0]["w"], expected["w"])
    assert optax.tree.get(after, "exponent") == 2
    assert optax.tree.get(step(grads[2], start)[1], "exponent") == 1


def test_a_run_that_exists_is_joined_with_steps_that_are_shorter_at_first():
    def grads(step):
        noise = jax.random.normal(jax.random.key(step), (32, 32))
        return 1e-3 * (noise + jax.random.normal(jax.random.key(7777), (32, 32)))

    adam = optax.adam(1e-2)
    joined = optax.chain(autoscale(), adam)
    update, update_joined = jax.jit(adam.update), jax.jit(joined.update)
    state = adam.init(grads(0))
    for step in range(300):
        _, state = update(grads(step), state)
    state_joined = (autoscale().init(None), state)
    ratios = {}
    for step in range(300, 700):
        updates, state = update(grads(step), state)
        shorter, state_joined = update_joined(grads(step), state_joined)
        ratios[step - 300] = optax.tree.norm(shorter) / optax.tree.norm(updates)
    assert optax.tree.get(state_joined, "exponent") == 1
    measured = [optax.tree.get(state_joined, "scale_factor"), ratios[30], ratios[399]]
    np.testing.assert_allclose(measured, [0.61, 0.65, 0.80], atol=0.01)
