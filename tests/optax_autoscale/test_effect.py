"""The measured effect: two separate optimizers, closed forms, odd trees, wrappers, and meshes."""

import pickle
from functools import partial

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_autoscale import (
    EffectSums,
    autoscale,
    center_layers,
    gradient_centralization,
    measure_effect,
    scale_by_global_std,
    zscore_normalization,
)
from tests import oracle
from tests.optax_autoscale.test_sharding import SPECS, collectives, make_grads, make_mesh, place

TRANSFORMATIONS = {
    make.__name__: make
    for make in (
        autoscale,
        scale_by_global_std,
        center_layers,
        gradient_centralization,
        zscore_normalization,
    )
}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-2),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
}


def make_params(dtype="float32"):
    """A network with names that also occur in optimizers' states."""
    rng = np.random.default_rng(1)
    shapes = {"kernel": (3, 3, 2, 4), "norm": {"scale": (4,), "bias": (4,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def grads_at(params, step):
    """Gradients that depend on the parameters, so that both sides must get the same ones."""
    return jax.tree.map(lambda p: 1e-2 * jnp.sin(3 * p + step + 0.5), params)


def train(tx, params, steps=3):
    """The updates, the states and the parameters of each step."""
    update, state, history = jax.jit(tx.update), tx.init(params), []
    for step in range(steps):
        grads = grads_at(params, step)
        updates, state = update(grads, state, params)
        history.append((grads, params, updates, state))
        params = optax.apply_updates(params, updates)
    return history


def returns(tree):
    """A transformation whose update is `tree`, whatever the gradients."""
    return optax.stateless(lambda updates, params: tree)


def flat(tree):
    """All inexact entries in float64, as one vector."""
    leaves = [np.ravel(oracle.float64(leaf)) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def measured(update, reference, params=None, **kwargs):
    """The state after one step in which the two sides return `update` and `reference`."""
    tx = measure_effect(returns(update), returns(reference), **kwargs)
    _, state = tx.update(update, tx.init(update if params is None else params), params)
    return state


def assert_effect(state, u, r, rtol=1e-5):
    ratio = np.linalg.norm(u) / np.linalg.norm(r)
    np.testing.assert_allclose(state.norm_ratio, ratio, rtol=rtol)
    cosine = u @ r / (np.linalg.norm(u) * np.linalg.norm(r))
    np.testing.assert_allclose(state.cosine, cosine, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_equals_two_chains_computed_apart(make, optimizer):
    tx, reference = optax.chain(make(), optimizer()), optimizer()
    params = make_params()
    alone = train(tx, params)
    reference_state = reference.init(params)
    update_reference = jax.jit(reference.update)
    together = train(measure_effect(tx, reference, per_leaf=True), params)
    for expected, (grads, params, updates, state) in zip(alone, together, strict=True):
        chex.assert_trees_all_equal((grads, params, updates, state.tx_state), expected)
        shadow, reference_state = update_reference(grads, reference_state, params)
        assert_effect(state, flat(updates), flat(shadow))
        kernel = state.effect_sums.by_leaf(params)["kernel"]
        assert_effect(kernel, flat(updates["kernel"]), flat(shadow["kernel"]))
        sums = [(flat(a) @ flat(b)) for a, b in [(updates,) * 2, (shadow,) * 2, (updates, shadow)]]
        total = state.effect_sums.sum()
        np.testing.assert_allclose(total, [*sums, flat(params) @ flat(params)], rtol=1e-5)


def test_the_parts_of_a_difference_by_hand():
    """R = (3, 4), u = 2 r + (-4, 3): twice the learning rate, and a remainder of 5 in 125."""
    params = {"a": jnp.array([6.0]), "b": jnp.array([8.0])}
    update = {"a": jnp.array([2.0]), "b": jnp.array([11.0])}
    reference = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    state = measured(update, reference, params)
    sums = state.effect_sums
    assert [float(value) for value in sums] == [125.0, 25.0, 50.0, 100.0]
    np.testing.assert_allclose(state.norm_ratio, np.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(state.cosine, 2 / np.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(sums.learning_rate_factor, 2, rtol=1e-6)
    np.testing.assert_allclose(sums.unexplained, 25 / 125, rtol=1e-6)
    np.testing.assert_allclose(sums.update_over_weight, np.sqrt(1.25), rtol=1e-6)
    np.testing.assert_allclose(sums.reference_over_weight, 0.5, rtol=1e-6)


@pytest.mark.parametrize("factor", [2.0, 1e-3, -0.5])
def test_a_constant_factor_before_sgd_is_the_ratio(factor):
    tx = measure_effect(optax.chain(optax.scale(factor), optax.sgd(0.1, 0.9)), optax.sgd(0.1, 0.9))
    for *_, state in train(tx, make_params()):
        np.testing.assert_allclose(state.norm_ratio, abs(factor), rtol=1e-5)
        np.testing.assert_allclose(state.cosine, np.sign(factor), rtol=1e-6)
        np.testing.assert_allclose(state.effect_sums.learning_rate_factor, factor, rtol=1e-5)
        np.testing.assert_allclose(state.effect_sums.unexplained, 0, atol=2e-6)


def test_adam_divides_a_constant_factor_out():
    adam = optax.adam(1e-3, eps=1e-12)
    for *_, state in train(
        measure_effect(optax.chain(optax.scale(0.1), adam), adam), make_params()
    ):
        np.testing.assert_allclose([state.norm_ratio, state.cosine], 1, rtol=1e-5)


def test_adams_eps_brings_a_constant_factor_back():
    """At the first step Adam's update is g / (|g| + eps)."""
    params, factor, eps = make_params(), 0.1, 1e-3
    adam = optax.adam(1e-3, eps=eps)
    ((grads, *_, state),) = train(
        measure_effect(optax.chain(optax.scale(factor), adam), adam), params, steps=1
    )
    g = flat(grads)
    assert_effect(state, factor * g / (np.abs(factor * g) + eps), g / (np.abs(g) + eps))
    assert state.norm_ratio < 0.9


def test_the_same_optimizer_twice_has_no_effect():
    for make in OPTIMIZERS.values():
        for *_, state in train(measure_effect(make(), make()), make_params()):
            assert state.norm_ratio == 1
            np.testing.assert_allclose(state.cosine, 1, rtol=1e-6)
    x = jnp.float32(0.3)
    assert EffectSums(x, x, x, x).cosine == 1


@pytest.mark.parametrize(
    ("update", "reference", "expected"),
    [  # norm ratio, cosine, learning-rate factor, share that is not explained
        (0.0, 0.0, (1, 1, 1, 0)),
        (0.0, 2.0, (0, 1, 0, 0)),
        (2.0, 0.0, (0, 0, 0, 1)),
    ],
)
def test_a_norm_of_zero(update, reference, expected):
    u, r = {"w": jnp.full(4, update)}, {"w": jnp.full(4, reference)}
    state = measured(u, r)
    sums = state.effect_sums
    got = (sums.norm_ratio, sums.cosine, sums.learning_rate_factor, sums.unexplained)
    assert tuple(map(float, got)) == expected
    assert (state.norm_ratio, state.cosine) == expected[:2]
    # The update is the factor times the reference's, plus a rest with that share of its square.
    rest = np.square(flat(u) - expected[2] * flat(r)).sum()
    assert rest == expected[3] * np.square(flat(u)).sum()
    assert sums.update_over_weight == 0  # without params


def test_before_the_first_step_nothing_differs():
    state = measure_effect(optax.sgd(1.0), optax.adam(1.0)).init(make_params())
    assert (state.norm_ratio, state.cosine) == (1, 1)
    assert (state.effect_sums.norm_ratio, state.effect_sums.cosine) == (1, 1)


def test_a_warm_up_starts_at_one():
    optimizer = optax.adamw(optax.linear_schedule(0.0, 1e-3, 10))
    (*_, first), (*_, second) = train(
        measure_effect(optax.chain(zscore_normalization(), optimizer), optimizer),
        make_params(),
        steps=2,
    )
    assert (first.norm_ratio, first.cosine) == (1, 1)
    assert second.cosine < 0.999


def test_nan_shows_in_its_step_alone():
    tx = measure_effect(optax.sgd(0.2), optax.sgd(0.1))
    params = make_params()
    state = tx.init(params)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    for grads, ratio in [(bad, np.nan), (params, 2.0)]:
        _, state = tx.update(grads, state, params)
        np.testing.assert_allclose(state.norm_ratio, ratio, rtol=1e-6)


finite = st.floats(-8, 8, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0)
vectors = hnp.arrays(np.float32, (2, 6), elements=finite)
settings = hypothesis.settings(deadline=None, max_examples=50)


@hypothesis.given(vectors, st.floats(-12, 12))
@settings
def test_what_is_read_is_the_projection_onto_the_reference(pair, log_scale):
    pair = (pair * np.float32(10**log_scale)).astype(np.float32)
    u, r = oracle.float64(pair)
    sums = EffectSums(*(jnp.float32(np.dot(*ab)) for ab in [(u, u), (r, r), (u, r), (u, u)]))
    factor = u @ r / (r @ r) if r.any() else 1.0 if not u.any() else 0.0
    scale = np.linalg.norm(u) / np.linalg.norm(r) if r.any() else 1.0
    np.testing.assert_allclose(sums.learning_rate_factor, factor, atol=1e-5 * max(scale, 1e-30))
    rest = np.sum((u - factor * r) ** 2) / (u @ u) if u.any() else 0.0
    np.testing.assert_allclose(sums.unexplained, rest, atol=1e-5)
    assert -1 <= sums.cosine <= 1
    assert all(np.isfinite([sums.norm_ratio, sums.cosine, sums.update_over_weight]))
    swapped = EffectSums(sums[1], sums[0], sums[2], sums[3])
    if u.any() and r.any():
        np.testing.assert_allclose(swapped.norm_ratio * sums.norm_ratio, 1, rtol=1e-5)
        np.testing.assert_allclose(swapped.cosine, sums.cosine, rtol=1e-5, atol=1e-6)


@hypothesis.given(hnp.arrays(np.float32, (2, 3, 6), elements=finite))
@settings
def test_sums_add_up_over_leaves_and_over_steps(trees):
    """One tree of three leaves, three steps of one leaf, and all entries as one leaf."""
    update, reference = (dict(zip("abc", tree, strict=True)) for tree in trees)
    by_leaf = measured(update, reference, per_leaf=True).effect_sums
    steps = [measured({"w": u}, {"w": r}).effect_sums for u, r in zip(*trees, strict=True)]
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *steps)
    whole = measured({"w": trees[0]}, {"w": trees[1]}).effect_sums
    for sums in (
        by_leaf.sum(),
        stacked.sum(0),
        optax.tree.add(optax.tree.add(*steps[:2]), steps[2]),
    ):
        np.testing.assert_allclose(sums, whole, rtol=1e-5, atol=1e-4)
    for name, step in zip("abc", steps, strict=True):
        np.testing.assert_array_equal(by_leaf.by_leaf(update)[name], step)


def test_a_window_of_steps_by_leaf_from_scan():
    tx = measure_effect(OPTIMIZERS["sgd"](), optax.sgd(0.3), per_leaf=True)

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(grads_at(params, i), state, params)
        return (optax.apply_updates(params, updates), state), state.effect_sums

    params = make_params()
    _, sums = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(4))
    assert sums.products.shape == (4, 3)
    window = sums.sum(0).by_leaf(params)["norm"]["scale"]
    history = train(tx, params, steps=4)
    u = np.concatenate([flat(updates["norm"]["scale"]) for _, _, updates, _ in history])
    r = np.concatenate([flat(-0.3 * grads["norm"]["scale"]) for grads, *_ in history])
    assert_effect(window, u, r)


@pytest.mark.parametrize(("decay", "reads"), [(0.0, 0.5), (0.1, 0.56), (1.0, 0.96)])
def test_weight_decay_on_both_sides_hides_the_effect(decay, reads):
    """The numbers of the docstring."""
    direction, weights = {"w": jnp.array([0.0, 1.0])}, {"w": jnp.array([3.0, 0.0])}
    after = optax.chain(optax.add_decayed_weights(decay), optax.scale(-1e-3))
    adam = optax.scale_by_adam(b1=0.0, b2=0.0, eps=0.0, eps_root=1e-30)
    tx = measure_effect(optax.chain(adam, optax.scale(0.5), after), optax.chain(adam, after))
    _, state = tx.update(direction, tx.init(weights), weights)
    assert round(float(state.norm_ratio), 2) == reads


def test_names_find_the_wrapped_chain_alone():
    params = make_params()
    tx = optax.chain(autoscale(), optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2))
    both = measure_effect(tx, tx)
    *_, (grads, _, _, state) = train(both, params)
    *_, (*_, alone) = train(tx, params)
    for name in ("mu", "nu", "learning_rate", "scale_factor", "exponent", "global_std"):
        value = optax.tree.get(alone, name)
        assert value is not None
        chex.assert_trees_all_equal(optax.tree.get(state, name), value)
    for name in ("norm_ratio", "cosine"):
        value = optax.tree.get(state, name)
        assert (value.shape, value.dtype) == ((), jnp.float32)
    assert optax.tree.get(state, "effect_sums") is state.effect_sums
    assert optax.tree.get(state, "EffectSums") is state.effect_sums
    adam = measure_effect(optax.adam(1e-3), optax.adam(1e-3))
    assert optax.tree.get(adam.init(params), "count") == 0

    slower = optax.tree.set(state, learning_rate=jnp.float32(1e-4))
    _, slower = both.update(grads, slower, params)
    np.testing.assert_allclose(optax.tree.get(slower, "learning_rate"), 1e-4, rtol=1e-6)
    np.testing.assert_allclose(slower.norm_ratio, 1e-2, rtol=1e-5)  # the reference keeps 1e-2


def signature(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@pytest.mark.parametrize(
    ("dtype", "per_leaf"), [("bfloat16", False), ("float32", False), ("float64", True)]
)
def test_state_types_never_change(dtype, per_leaf):
    with jax.enable_x64(dtype == "float64"):
        params = make_params(dtype)
        tx = measure_effect(
            optax.chain(autoscale(), optax.adam(1e-3)), optax.adam(1e-3), per_leaf=per_leaf
        )
        grads = jax.tree.map(lambda p: (p * p).astype(p.dtype), params)

        @partial(jax.jit, donate_argnums=0)
        def step(state, skip):
            def scanned(state, _):
                return jax.lax.cond(
                    skip, lambda: state, lambda: tx.update(grads, state, params)[1]
                ), None

            return jax.lax.scan(scanned, state, length=2)[0]

        state = tx.init(params)
        before = signature(state)
        assert state.effect_sums.products.dtype == ("float64" if dtype == "float64" else "float32")
        assert signature(jax.eval_shape(tx.init, params)) == before
        for skip in (False, True):
            state = step(state, jnp.asarray(skip))
            assert signature(state) == before
        assert step._cache_size() == 1


def test_float64_leaves_have_float64_sums():
    with jax.enable_x64(True):
        u = {"w": jnp.asarray([1.0, 1e-9], jnp.float64), "h": jnp.ones(2, jnp.bfloat16)}
        sums = measured(u, u, u, per_leaf=True).effect_sums
        np.testing.assert_allclose(sums.products[1], 1 + 1e-18, rtol=0, atol=1e-19)
        tiny = measured({"w": u["w"] * 1e-25}, {"w": u["w"]}).effect_sums
        np.testing.assert_allclose(tiny.norm_ratio, 1e-25, rtol=1e-12)
        single = measured(u, u, jax.tree.map(lambda x: x.astype(jnp.float32), u)).effect_sums
        assert single.products.dtype == jnp.float32  # as it was at init


def test_what_float32_cannot_square_counts_as_zero():
    tiny = {"w": jnp.full(4, 1e-25, jnp.float32)}
    assert measured(tiny, {"w": jnp.ones(4)}).norm_ratio == 0
    assert measured(tiny, tiny).norm_ratio == 1


def test_half_precision_is_summed_in_float32():
    u = {"w": jnp.full(2**16, 0.5, jnp.bfloat16)}
    r = {"w": jnp.full(2**16, 0.25, jnp.float32)}
    assert measured(u, r, u).effect_sums == (2.0**14, 2.0**12, 2.0**13, 2.0**14)


def test_strict_dtype_promotion_is_enough():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        u = {name: jnp.ones((2, 2), name) for name in ("bfloat16", "float32", "float64")}
        r = dict(zip(u, [u["float32"], u["float64"], u["bfloat16"]], strict=True))
        state = measured(u, r, u, per_leaf=True)
        np.testing.assert_array_equal(state.effect_sums, 4)
        assert (state.norm_ratio.dtype, state.cosine.dtype) == ("float32", "float32")


def test_complex_leaves_use_the_real_inner_product():
    rng = np.random.default_rng(0)
    u, r, w = rng.standard_normal((3, 5)) + 1j * rng.standard_normal((3, 5))
    state = measured(*({"w": jnp.asarray(x, jnp.complex64)} for x in (u, r, w)))
    expected = [np.vdot(u, u), np.vdot(r, r), np.vdot(r, u), np.vdot(w, w)]
    np.testing.assert_allclose(state.effect_sums, np.real(expected), rtol=1e-5)
    assert state.effect_sums.products.dtype == jnp.float32


@pytest.mark.parametrize("per_leaf", [False, True])
def test_odd_leaves_count_as_nothing(per_leaf):
    """Gradients of None beside parameters, integers, scalars, and what a mask leaves out."""
    plain = {"w": jnp.arange(1.0, 4.0)}
    odd = {"none": None, "steps": jnp.arange(3), "masked": optax.MaskedNode(), "empty": jnp.ones(0)}
    tx = measure_effect(optax.scale(2), optax.scale(1), per_leaf=per_leaf)
    params = plain | odd | {"frozen": jnp.ones(3)}
    updates = plain | odd | {"frozen": None}
    state = tx.init(params)
    for _ in range(2):
        got, state = jax.jit(tx.update)(updates, state, params)
        assert jax.tree.structure(got) == jax.tree.structure(updates)
    assert (state.norm_ratio, state.cosine) == (2, 1)
    np.testing.assert_array_equal(state.effect_sums.sum(), [56, 14, 28, 14])
    if per_leaf:
        leaves = state.effect_sums.by_leaf(params)
        np.testing.assert_array_equal(leaves["w"], [56, 14, 28, 14])
        for name in ("none", "steps", "empty", "frozen"):
            np.testing.assert_array_equal(leaves[name], 0)


def test_gradients_of_none_make_moments_of_none():
    """Momentum's trace loses a leaf at its first step, as it does without the measurement."""
    params = {"frozen": jnp.ones(3), "w": jnp.ones(4), "v": jnp.ones(2)}
    grads = {"frozen": None, "w": jnp.arange(4.0), "v": jnp.ones(2)}
    tx = double(lambda: optax.sgd(0.1, momentum=0.9))
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(grads, state, params)
    assert state.reference_state[0]["frozen"] is None
    np.testing.assert_allclose(effect_of(state), [2, 1], rtol=1e-6)


@pytest.mark.parametrize("tree", [{}, (), [], None, {"none": None}, optax.MaskedNode()])
@pytest.mark.parametrize("per_leaf", [False, True])
def test_empty_trees(tree, per_leaf):
    tx = measure_effect(autoscale(), optax.identity(), per_leaf=per_leaf)
    for params in (tree, None):
        updates, state = jax.jit(tx.update)(tree, tx.init(tree), params)
        assert updates == tree
        assert (state.norm_ratio, state.cosine) == (1, 1)
        assert signature(state) == signature(tx.init(tree))


def test_a_single_array_is_a_tree():
    tx = measure_effect(optax.adam(1e-3), optax.adam(2e-3))
    state = tx.init(jnp.ones(3))
    for _ in range(2):
        _, state = tx.update(jnp.arange(3.0), state, jnp.ones(3))
    np.testing.assert_allclose(state.norm_ratio, 0.5, rtol=1e-6)


def test_trees_that_do_not_match():
    u = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="structure"):
        measured(u, {"a": jnp.ones(2)})
    sums = measured(u, u, per_leaf=True).effect_sums
    for wrong in (u | {"c": jnp.ones(1)}, {"a": jnp.ones(2)}):
        with pytest.raises(ValueError, match="leaves"):
            sums.by_leaf(wrong)


def test_both_sides_get_the_extra_args():
    def scale_by_argument(sign):
        def update(updates, state, params=None, *, value, **extra_args):
            return jax.tree.map(lambda u: sign * value * u, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    tx = measure_effect(scale_by_argument(2.0), scale_by_argument(-1.0))
    params = {"w": jnp.ones(3)}
    updates, state = tx.update(params, tx.init(params), params, value=3.0, of_another=None)
    np.testing.assert_array_equal(updates["w"], 6)
    assert (state.norm_ratio, state.cosine) == (2, -1)
    np.testing.assert_array_equal(state.effect_sums, [108, 27, -54, 3])
    measure_effect(optax.sgd(0.1), optax.adam(0.1)).update(
        params, measure_effect(optax.sgd(0.1), optax.adam(0.1)).init(params), params, value=3.0
    )


def double(make=lambda: optax.adam(1e-3)):
    return measure_effect(optax.chain(make(), optax.scale(2)), make())


def effect_of(state):
    return [float(optax.tree.get(state, name)) for name in ("norm_ratio", "cosine")]


def test_multi_steps_around_and_inside():
    params = make_params()
    around = optax.MultiSteps(double(), 2).gradient_transformation()
    *_, (*_, state) = train(around, params, steps=4)
    np.testing.assert_allclose(effect_of(state), [2, 1], rtol=1e-6)

    def inner():
        return optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()

    effects = [effect_of(state) for *_, state in train(double(inner), params, steps=4)]
    np.testing.assert_allclose(effects, [[1, 1], [2, 1]] * 2, rtol=1e-6)


def test_apply_if_finite_keeps_the_measurement():
    params = make_params()
    tx = optax.apply_if_finite(double(), 3)
    _, state = tx.update(grads_at(params, 0), tx.init(params), params)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    _, after = jax.jit(tx.update)(bad, state, params)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    np.testing.assert_allclose(effect_of(after), [2, 1], rtol=1e-6)


def test_inject_hyperparams_around():
    @optax.inject_hyperparams
    def make(factor):
        return measure_effect(optax.chain(optax.sgd(0.1), optax.scale(factor)), optax.sgd(0.1))

    tx, params = make(factor=0.5), make_params()
    state = tx.init(params)
    for factor in (0.5, 0.25):
        state.hyperparams["factor"] = jnp.float32(factor)
        _, state = jax.jit(tx.update)(params, state, params)
        np.testing.assert_allclose(effect_of(state), [factor, 1], rtol=1e-6)


REFERENCES = {
    "masked": lambda: optax.masked(optax.adam(1e-3), {"a": False, "b": True, "c": True}),
    "partition": lambda: optax.partition(
        {"x": optax.adam(1e-3), "y": optax.sgd(0.1, 0.9)}, {"a": "x", "b": "y", "c": "x"}
    ),
    "adafactor": lambda: optax.adafactor(1e-3),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 1, 5)),
    "snapshot": lambda: optax.chain(optax.snapshot("norm", optax.tree.norm), optax.adam(1e-3)),
    "noise": lambda: optax.add_noise(0.1, 0.1, 0),
}


@pytest.mark.parametrize("make", REFERENCES.values(), ids=REFERENCES)
def test_references_of_all_kinds(make):
    params = {"a": jnp.ones((2, 3)), "b": jnp.arange(4.0), "c": jnp.ones(2)}
    tx, reference = measure_effect(optax.adam(1e-2), make()), make()
    state, reference_state = tx.init(params), reference.init(params)
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    names = {"a": "name of a", "b": "name of b", "c": "name of c"}
    for step in range(3):
        grads = grads_at(params, step)
        shadow, reference_state = reference.update(grads, reference_state, params)
        updates, state = tx.update(grads, state, params)
        assert_effect(state, flat(updates), flat(shadow))
    for part, expected in zip(
        *map(jax.tree.leaves, (state.reference_state, reference_state)), strict=True
    ):
        assert jnp.all(part == expected)
    assert optax.tree.get(state, "mu") is state.tx_state[0].mu

    def marked(tx, state):
        return optax.tree.map_params(
            tx, lambda _, name: name, state, names, is_leaf=is_masked,
            transform_non_params=lambda _: "other",
        )  # fmt: skip

    got = marked(tx, state)
    assert got.tx_state[0].mu == names
    assert jax.tree.leaves(got.reference_state) == jax.tree.leaves(
        marked(reference, reference_state)
    )
    assert set(jax.tree.leaves(got[:3])) == {"other"}


@pytest.mark.parametrize("per_leaf", [False, True])
def test_inside_masked_and_partition(per_leaf):
    params = make_params()
    mask = {"kernel": True, "norm": {"scale": True, "bias": False}}

    def make():
        return measure_effect(optax.sgd(0.2), optax.sgd(0.1, 0.9), per_leaf=per_leaf)

    kept = {"kernel": params["kernel"], "norm": {"scale": params["norm"]["scale"]}}
    *_, (*_, expected) = train(make(), kept, 2)
    *_, (*_, state) = train(optax.masked(make(), mask), params, 2)
    np.testing.assert_allclose(state.inner_state.effect_sums, expected.effect_sums, rtol=1e-6)
    labels = jax.tree.map(lambda keep: "measured" if keep else "plain", mask)
    groups = {"measured": make(), "plain": optax.sgd(0.1)}
    *_, (*_, state) = train(optax.partition(groups, labels), params, 2)
    np.testing.assert_allclose(effect_of(state), [expected.norm_ratio, expected.cosine], rtol=1e-6)


def test_vmap_measures_each_member():
    params = make_params()
    tx = measure_effect(optax.chain(zscore_normalization(), optax.sgd(0.1)), optax.sgd(0.1))
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 5 * p]), params)
    update = jax.jit(lambda p: tx.update(p, tx.init(p), p))
    _, state = jax.vmap(update)(ensemble)
    for member, factor in enumerate([1.0, 5.0]):
        _, expected = update(jax.tree.map(lambda p, c=factor: c * p, params))
        np.testing.assert_allclose(state.norm_ratio[member], expected.norm_ratio, rtol=1e-5)


def test_nested_measurements_compare_with_two_references():
    inner = measure_effect(optax.sgd(0.1), optax.sgd(0.2))
    *_, (*_, state) = train(measure_effect(inner, optax.sgd(0.4)), make_params(), 1)
    np.testing.assert_allclose([state.norm_ratio, state.tx_state.norm_ratio], [0.25, 0.5])


# --- the libraries around it ---


def test_nnx_optimizer():
    """At init the parameters are variables, in the update they are arrays."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, double(), wrt=nnx.Param)
    for _ in range(3):
        grads = nnx.grad(lambda m: jnp.sum(jnp.square(m(jnp.ones((4, 3))))))(model)
        optimizer.update(model, grads)
    np.testing.assert_allclose(effect_of(optimizer.opt_state), [2, 1], rtol=1e-6)
    sums = optax.tree.get(optimizer.opt_state, "effect_sums")
    np.testing.assert_allclose([sums.norm_ratio, sums.sum().norm_ratio], 2, rtol=1e-6)


def test_boxed_parameters_keep_their_axes():
    """Linen's boxes give the reference's moments their sharding, and are absent from the update."""
    init = linen.with_logical_partitioning(linen.initializers.ones, ("embed", "mlp"))
    boxed = linen.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = double()
    state = tx.init(boxed)
    specs = linen.get_partition_spec(state)
    count, mu, nu = specs.reference_state
    assert count == P()
    assert mu["kernel"] == nu["kernel"] == specs.tx_state[0][0].mu["kernel"] == P("embed", "mlp")
    state, params = linen.meta.unbox(state), linen.meta.unbox(boxed)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    np.testing.assert_allclose(effect_of(state), [2, 1], rtol=1e-6)


def test_checkpoints_restore_the_state(tmp_path):
    params = make_params()
    tx = measure_effect(optax.chain(autoscale(), optax.adam(1e-3)), optax.adam(1e-3), per_leaf=True)
    *_, (*_, state) = train(tx, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    as_bytes = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    for copy in (restored, as_bytes, pickle.loads(pickle.dumps(state))):
        chex.assert_trees_all_equal(copy, state)
        assert jax.tree.structure(copy) == jax.tree.structure(state)


# --- on a mesh ---


def two_steps(tx, grads):
    """Two steps, the second from the state that the first returned."""
    updates, state = tx.update(grads, tx.init(grads), grads)
    return tx.update(grads, state, updates)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_equals_unsharded_and_types_stay(axis_type):
    optimizer = optax.adamw(1e-2)
    tx = measure_effect(optax.chain(autoscale(), optimizer), optimizer, per_leaf=True)
    grads = {name: make_grads()[name] for name in ("both", "replicated", "bias")}
    _, expected = jax.jit(partial(two_steps, tx))(grads)
    mesh = make_mesh(axis_type)
    update = jax.jit(tx.update)
    with jax.set_mesh(mesh):
        sharded = place(grads, mesh)
        before = tx.init(sharded)
        updates, state = update(sharded, before, sharded)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, before)
        _, state = update(sharded, state, updates)
    np.testing.assert_allclose(state.effect_sums, expected.effect_sums, rtol=1e-4)
    np.testing.assert_allclose(state.norm_ratio, expected.norm_ratio, rtol=1e-5)
    for part in jax.tree.leaves(state.reference_state[1:]):
        assert part.sharding.mesh == mesh


def test_the_state_can_be_sharded_by_the_shape_of_its_leaves():
    mesh, grads = make_mesh(AxisType.Auto), {"rows": make_grads()["rows"]}
    tx = measure_effect(optax.sgd(0.1), optax.sgd(0.1, 0.9), per_leaf=True)

    def sharding(leaf):
        return NamedSharding(mesh, P("data") if leaf.shape and leaf.shape[0] % 4 == 0 else P())

    shardings = jax.tree.map(sharding, jax.eval_shape(tx.init, grads))
    state = jax.jit(tx.init, out_shardings=shardings)(grads)
    update = jax.jit(tx.update, out_shardings=(sharding(grads["rows"]), shardings))
    for _ in range(2):
        _, state = update(grads, state, grads)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    np.testing.assert_allclose(state.norm_ratio, 1 / 1.9, rtol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("copies", "per_leaf"), [(1, False), (5, True)])
def test_one_all_reduce_more_than_the_transformation(copies, axis_type, per_leaf):
    mesh, optimizer = make_mesh(axis_type), optax.sgd(0.1, momentum=0.9)
    for tx in (optimizer, optax.chain(autoscale(), optimizer)):
        with jax.set_mesh(mesh):
            grads = {
                f"{name}{i}": jax.device_put(
                    make_grads()[name], NamedSharding(mesh, P("data", None))
                )
                for i in range(copies)
                for name in ("rows", "both")
            }

            def compiled(tx, grads=grads):
                return jax.jit(tx.update).lower(grads, tx.init(grads), grads).compile()

            alone = collectives(compiled(tx))
            both = collectives(compiled(measure_effect(tx, optimizer, per_leaf=per_leaf)))
        assert both == [*alone, "all-reduce"]


def in_shard_map(tx, mesh, specs, grads, **kwargs):
    def measure(grads):
        state = two_steps(tx, grads)[1]
        return state.effect_sums, state.norm_ratio, state.cosine

    return jax.jit(
        jax.shard_map(measure, mesh=mesh, in_specs=(specs,), out_specs=P(), **kwargs)
    ).lower(grads).compile()  # fmt: skip


def test_shard_map_counts_replicated_leaves_once():
    """Leaves sharded over different axes, and not at all, in one tree."""
    mesh, axes = make_mesh(AxisType.Auto), ("data", "model")
    grads = {name: make_grads()[name] for name in ("rows", "columns", "joint", "replicated")}
    specs = {name: SPECS[name] for name in grads}

    def make(axis_name):
        method = autoscale(axis_name=axis_name)
        return measure_effect(
            optax.chain(method, optax.sgd(0.1, 0.9)),
            optax.sgd(0.1, 0.9),
            per_leaf=True,
            axis_name=axis_name,
        )

    sums, *effect = in_shard_map(make(axes), mesh, specs, place(grads, mesh))(place(grads, mesh))
    _, expected = two_steps(make(None), grads)
    np.testing.assert_allclose(sums, expected.effect_sums, rtol=1e-4)
    np.testing.assert_allclose(effect, [expected.norm_ratio, expected.cosine], rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_where_every_leaf_is_sharded(check_vma):
    mesh, axes = make_mesh(AxisType.Auto), ("data", "model")
    grads = {"a": make_grads()["rows"], "b": make_grads()["both"]}
    specs = {"a": P(axes, None), "b": P(None, axes)}
    reference = optax.sgd(0.1, 0.9)
    tx = measure_effect(optax.adam(1e-2), reference, axis_name=axes)
    compiled = in_shard_map(tx, mesh, specs, grads, check_vma=check_vma)
    sums, *_ = compiled(
        {name: jax.device_put(g, NamedSharding(mesh, specs[name])) for name, g in grads.items()}
    )
    _, expected = two_steps(measure_effect(optax.adam(1e-2), reference), grads)
    np.testing.assert_allclose(sums, expected.effect_sums, rtol=1e-4)


def test_one_axis_may_be_given_as_a_string():
    mesh, grads = make_mesh(AxisType.Auto), {"rows": make_grads()["rows"]}
    tx = measure_effect(optax.sgd(0.1), optax.sgd(0.2), axis_name="data")
    specs = {"rows": P("data")}
    sharded = {"rows": jax.device_put(grads["rows"], NamedSharding(mesh, specs["rows"]))}
    sums, *_ = in_shard_map(tx, mesh, specs, sharded)(sharded)
    _, expected = two_steps(measure_effect(optax.sgd(0.1), optax.sgd(0.2)), grads)
    np.testing.assert_allclose(sums, expected.effect_sums, rtol=1e-5)
