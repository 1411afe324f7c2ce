"""The method and its two halves: values, odd trees, derivatives, Optax's wrappers, and meshes."""

from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    LAYERED,
    SPECS,
    TRANSFORMATIONS,
    assert_trees_close,
    axis_types,
    collectives,
    every_transformation,
    in_shard_map,
    make_mesh,
    many_rows,
    mesh_grads,
    place,
    random_grads,
    signature,
)
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

from optax_autoscale import (
    AutoscaleState,
    autoscale,
    center_layers,
    global_std,
    gradient_normalization,
    layer_std,
    measure_effect,
    scale_by_global_std,
    zscore_normalization,
)
from tests import oracle

EDGE = np.exp(-4 * np.sqrt(2))  # s_1 at which a_1 = (4 / |ln s_1|)^2 = 0.5
method_and_halves = pytest.mark.parametrize("make", [autoscale, scale_by_global_std, center_layers])
halves = optax.chain(scale_by_global_std(), center_layers())


def grads_of_std(std):
    """Two leaves whose global standard deviation is `std` to float32 precision."""
    grads = random_grads()
    factor = std / oracle.global_std(list(grads.values()))
    return jax.tree.map(lambda g: g * factor, grads)


def full_like(grads, value):
    return jax.tree.map(lambda g: jnp.full_like(g, value), grads)


def update(tx, grads):
    return tx.update(grads, tx.init(grads), grads)


def run(tx, steps, update=None):
    state, history = tx.init(steps[0]), []
    for grads in steps:
        updates, state = (update or tx.update)(grads, state, grads)
        history.append((updates, state))
    return history


# --- equations 1 and 2 ---


def assert_steps_match(history, steps, rtol=1e-5, **kwargs):
    expected = oracle.autoscale([list(grads.values()) for grads in steps], **kwargs)
    for (updates, state), step in zip(history, expected, strict=True):
        state = state if isinstance(state, AutoscaleState) else state[0]
        np.testing.assert_allclose(state.global_std, step.global_std, rtol=max(rtol, 1e-7))
        # Near the singularity at s = 1 an error in s is multiplied by p / |ln s| in a.
        near = rtol * max(1.0, 2 / abs(np.log(step.global_std)))
        np.testing.assert_allclose(state.scale_factor, step.scale_factor, rtol=max(near, 1e-7))
        assert state.exponent == step.exponent
        for got, reference in zip(updates.values(), step.updates, strict=True):
            wanted = np.asarray(reference).astype(got.dtype)
            ulp, atol = float(jnp.finfo(got.dtype).eps), near * np.abs(reference).max()
            np.testing.assert_allclose(
                oracle.float64(got), oracle.float64(wanted), rtol=ulp, atol=max(atol, 1e-45)
            )


jitted = {tx: jax.jit(tx.update) for tx in (autoscale(), halves, autoscale(max_scale=1.0))}


@hypothesis.given(
    seed=st.integers(0, 2**31), log_scale=st.floats(-14, 4.5), mean=st.floats(-1.5, 1.5)
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_equals_the_paper_over_magnitudes(seed, log_scale, mean):
    """Three steps that shrink, as gradients do, so that the exponent acts on the later ones."""
    steps = [random_grads(seed + t, 10**log_scale * 0.7**t, mean) for t in range(3)]
    deviations = [step.global_std for step in oracle.autoscale([list(s.values()) for s in steps])]
    hypothesis.assume(min(abs(np.log(s)) for s in deviations) > 1e-3)
    hypothesis.assume(abs(abs(np.log(deviations[0])) + np.log(EDGE)) > 1e-4)
    for (tx, compiled), bound in zip(jitted.items(), (np.inf, np.inf, 1.0), strict=True):
        assert_steps_match(run(tx, steps, compiled), steps, max_scale=bound)


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        *(("bfloat16", 1e-14), ("bfloat16", 1e-3), ("bfloat16", 1e4), ("float16", 1e-3)),
        *(("float32", 1e-14), ("float32", 1e-3), ("float32", 1e4), ("float64", 1e-3)),
    ],
)
def test_equals_the_paper_in_every_dtype(dtype, magnitude):
    with jax.enable_x64(dtype == "float64"):
        steps = [random_grads(t, magnitude, dtype=dtype) for t in range(3)]
        rtol = 1e-12 if dtype == "float64" else 1e-5
        assert_steps_match(run(autoscale(), steps), steps, rtol)
        if rtol == 1e-12 or dtype == "float32":  # others are rounded between the halves
            assert_steps_match(run(halves, steps), steps, rtol)


@pytest.mark.parametrize(
    ("first_std", "exponent"),
    [
        (EDGE * 0.9999, 1),
        (EDGE * 1.0001, 2),
        (1 / EDGE * 1.0001, 1),  # |ln s| is the same for s and 1 / s
        (1 / EDGE * 0.9999, 2),
        (1e-14, 1),
        (1.001, 2),
    ],
)
def test_exponent_follows_the_first_step_whose_update_is_quadratic(first_std, exponent):
    steps = [grads_of_std(first_std), grads_of_std(1e-1), grads_of_std(1e-6)]
    history = run(autoscale(), steps)
    assert [int(state.exponent) for _, state in history] == [exponent] * 3
    ratio = 4 / np.abs(np.log([first_std, 1e-1, 1e-6]))
    factors = [state.scale_factor for _, state in history]
    np.testing.assert_allclose(factors, ratio ** [2, exponent, exponent], rtol=1e-3)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf, 1e25])
def test_a_step_without_information_changes_nothing_later(bad):
    """The last one has a sum of 0 and squares that are infinite; one entry is NaN or infinite."""
    good = [grads_of_std(1e-6), grads_of_std(1e-2), grads_of_std(1e-3)]
    spoiled = jax.tree.map(
        lambda g: jnp.where(jnp.arange(g.size).reshape(g.shape) % 2, -bad, bad), good[0]
    )
    if not np.isfinite(bad):
        spoiled = good[0] | {"dense": good[0]["dense"].at[0, 0].set(bad)}
    first, second, *history = run(autoscale(), [spoiled, spoiled, good[0], spoiled, *good[1:]])
    assert [int(state.exponent) for _, state in (first, second, *history)] == [0, 0, 1, 1, 1, 1]
    chex.assert_trees_all_equal([history[0], *history[2:]], run(autoscale(), good))
    if bad == 0:
        chex.assert_trees_all_close(first[0], spoiled)
        assert (first[1].global_std, first[1].scale_factor) == (0, 0)
    if not np.isfinite(bad):
        assert np.isnan(first[0]["conv"]).all()
        chex.assert_trees_all_equal(first[0]["conv_bias"], spoiled["conv_bias"])


def test_complex_gradients_use_the_squared_modulus():
    rng = np.random.default_rng(0)
    grad = (rng.standard_normal((4, 5)) + 1j * rng.standard_normal((4, 5)) + 1) * 1e-3
    real = rng.standard_normal((3, 3)) * 1e-3
    grads = {"complex": jnp.asarray(grad, jnp.complex64), "real": jnp.asarray(real, jnp.float32)}
    updates, state = update(autoscale(), grads)
    s = np.std(np.concatenate([grad.ravel(), real.ravel()]), ddof=1)
    a = (4 / (abs(np.log(s)) + 1e-8)) ** 2
    np.testing.assert_allclose(state.global_std, s, rtol=1e-5)
    np.testing.assert_allclose(updates["complex"], a * (grad - grad.mean()), rtol=1e-4)
    assert updates["real"].dtype == jnp.float32


# --- odd trees ---

ODD = {"none": None, "masked": optax.MaskedNode(), "scalar": jnp.float32(2.0), "python": 1.5}
ODD |= {"empty": jnp.zeros((4, 0, 2)), "numpy": np.ones(3, np.float32), "vector": jnp.arange(3.0)}


@pytest.mark.parametrize("grads", [{}, None, (), [], ODD, [jnp.zeros((0, 3))]], ids=repr)
def test_trees_without_eligible_entries_pass_through(grads):
    (_, state), (updates, again) = run(autoscale(), [grads, grads])
    chex.assert_trees_all_equal(updates, grads)
    assert (int(state.exponent), float(again.scale_factor)) == (0, 1.0)
    if not jax.tree.leaves(grads):
        for make in TRANSFORMATIONS:
            for tx in (make(), optax.masked(make(), mask=lambda tree: tree)):
                assert update(tx, grads)[0] == grads


def test_odd_leaves_among_ordinary_ones():
    ordinary = random_grads()
    updates, state = update(autoscale(), ordinary | ODD)
    chex.assert_trees_all_equal((updates, state), (updates, update(autoscale(), ordinary)[1]))
    chex.assert_trees_all_equal({name: updates[name] for name in ODD}, ODD)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_integer_leaves_are_named(dtype):
    grads = {"encoder": [{"table": jnp.ones((2, 2), dtype)}]}
    calls = [*(partial(update, make()) for make in TRANSFORMATIONS), global_std, layer_std]
    for call in calls:
        with pytest.raises(TypeError, match=rf"\['encoder'\]\[0\]\['table'\] is {dtype}.*masked"):
            call(grads)


# --- derivatives and the flags of JAX that stop at NaN ---

FLAT = {
    "zeros": {"w": jnp.zeros((2, 3)), "bias": jnp.zeros(2)},
    "equal entries": {"w": jnp.full((2, 3), 0.1), "bias": jnp.zeros(2)},
    "one entry": {"w": jnp.full((1, 1), 0.3), "bias": jnp.zeros(2)},
    "one of two": {"w": jnp.zeros((2, 3)), "other": jnp.arange(6.0).reshape(2, 3)},
    "biases": {"bias": jnp.ones(2)},
}
flat_gradients = pytest.mark.parametrize("grads", FLAT.values(), ids=FLAT)
DIVIDING = [
    autoscale,
    scale_by_global_std,
    zscore_normalization,
    gradient_normalization,
    partial(gradient_normalization, alpha=0.0),
    partial(zscore_normalization, eps=0.0),
    lambda: measure_effect(autoscale(), optax.identity()),
]


@flat_gradients
def test_derivatives_are_finite_where_a_deviation_is_0(grads):
    """The state's too, as in `scan`."""
    for make in DIVIDING:

        def floats(grads, make=make):
            leaves = jax.tree.leaves(update(make(), grads))
            return [leaf for leaf in leaves if leaf.dtype == jnp.float32]

        values, forward = jax.jvp(floats, (grads,), (full_like(grads, 1),))
        (reverse,) = jax.vjp(floats, grads)[1](full_like(values, 1))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((forward, reverse)))


@flat_gradients
def test_the_flags_find_nothing_to_stop_at(grads):
    """Not compiled, where they look at every operation."""
    checks = checkify.float_checks | checkify.div_checks
    for make in DIVIDING:
        tx = make()
        with jax.debug_nans(True), jax.debug_infs(True):
            tx.update(grads, tx.init(grads))
        error, _ = checkify.checkify(tx.update, errors=checks)(grads, tx.init(grads))
        error.throw()


@pytest.mark.parametrize("make", [autoscale, scale_by_global_std, zscore_normalization])
def test_meta_gradients_of_three_tasks_one_of_them_padded(make):
    """MAML: the padded task has inner gradients of 0 and the weight 0 in the outer loss."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((3, 5, 2)), rng.standard_normal((3, 5, 2))
        present = jnp.array([1.0, 1.0, 0.0])
        start = jnp.asarray(rng.standard_normal((2, 2)))
        tx = optax.chain(make(), optax.sgd(0.1))

        def loss(w, x, y):
            return jnp.mean((jnp.tanh(x @ w) - y) ** 2)

        def outer(w):
            def task(x, y, present):
                def step(carry, _):
                    w, state = carry
                    grads = jax.grad(lambda w: present * loss(w, x, y))(w)
                    updates, state = tx.update(grads, state)
                    return (optax.apply_updates(w, updates), state), None

                (adapted, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=2)
                return present * loss(adapted, x, y)

            return jnp.sum(jax.vmap(task)(x, y, present))

        moves = 1e-6 * jnp.eye(4).reshape(4, 2, 2)
        expected = [(outer(start + move) - outer(start - move)) / 2e-6 for move in moves]
        for gradient in (jax.grad, jax.jacfwd):
            got = jax.jit(gradient(outer))(start)
            np.testing.assert_allclose(got.ravel(), jnp.stack(expected), rtol=1e-6, atol=1e-8)


# --- types, tracing, and Optax's wrappers ---


@every_transformation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_types_never_change_and_nothing_compiles_twice(make, dtype):
    """In `scan` and `cond`, with donated buffers and arguments for other transformations."""
    with jax.enable_x64(dtype == "float64"):
        tx, grads = optax.chain(make(), optax.scale(-1.0)), random_grads(dtype=dtype)

        @partial(jax.jit, donate_argnums=(0, 1))
        def steps(updates, state, skip):
            def step(carry, _):
                return jax.lax.cond(
                    skip, lambda: carry, lambda: tx.update(*carry, grads, value=1.0, other=None)
                ), None

            return jax.lax.scan(step, (updates, state), length=2)[0]

        state = tx.init(grads)
        before = signature((grads, state))
        assert (
            signature(jax.jit(tx.init)(grads))
            == signature(jax.eval_shape(tx.init, grads))
            == before[1]
        )
        assert signature(jax.eval_shape(tx.update, grads, state, grads)) == before
        expected = run(tx, [grads, run(tx, [grads])[0][0]])[1]
        carry = jax.tree.map(jnp.copy, grads), state
        for skip in (False, True):
            carry = steps(*carry, jnp.asarray(skip))
            assert signature(carry) == before
        assert steps._cache_size() == 1
        rtol = {"float16": 1e-2, "bfloat16": 5e-2}.get(dtype, 1e-5)
        wide = partial(jax.tree.map, oracle.float64)
        assert_trees_close(wide(carry[0]), wide(expected[0]), rtol)


def test_strict_dtype_promotion_is_enough():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        grads = {name: jnp.ones((2, 2), name) for name in ("bfloat16", "float32", "float64")}
        for make in (*TRANSFORMATIONS, partial(autoscale, max_scale=jnp.float32(1.0))):
            updates, _ = update(make(), grads)
            assert all(updates[name].dtype == name for name in grads)


def test_inject_hyperparams_traces_eps_and_max_scale():
    grads = grads_of_std(1.0 + 1e-3)
    tx = optax.inject_hyperparams(autoscale, static_args=("layer_axes", "axis_name"))(max_scale=2.0)
    state, compiled = tx.init(grads), jax.jit(tx.update)
    for changes, factor in [
        ({}, 2),
        ({"max_scale": 0.25}, 0.25),
        ({"max_scale": 99, "eps": 1}, 16),
    ]:
        state.hyperparams.update({name: jnp.float32(value) for name, value in changes.items()})
        updates, state = compiled(grads, state)
        np.testing.assert_allclose(optax.tree.get(state, "scale_factor"), factor, rtol=1e-2)
    factor = optax.tree.get(state, "scale_factor")
    assert_trees_close(updates["conv"], factor * (grads["conv"] - grads["conv"].mean()))


def test_diagnostics_are_found_before_any_optimizer_and_are_no_parameters():
    params = {"bn": {"scale": jnp.ones(3)}, "kernel": jnp.ones((3, 3))}
    grads = {"bn": {"scale": jnp.ones(3)}, "kernel": jnp.arange(9.0).reshape(3, 3) * 1e-2}
    tx = optax.chain(autoscale(), optax.adamw(1e-3))
    _, state = tx.update(grads, tx.init(params), params)
    (step,) = oracle.autoscale([[grads["kernel"]]])
    for name in ("global_std", "scale_factor", "exponent"):
        np.testing.assert_allclose(optax.tree.get(state, name), getattr(step, name), rtol=1e-5)
    marked = optax.tree.map_params(tx, lambda _: "moment", state)
    assert set(jax.tree.leaves(marked[1][0].mu)) == {"moment"}
    chex.assert_trees_all_equal(marked[0], state[0])


@every_transformation
def test_each_group_is_treated_as_if_alone(make):
    """By `masked`, with a tree and with a function, and by `partition`."""
    grads, other = random_grads(), random_grads(1, 1.0)
    alone, alone_state = update(make(), grads)
    both, expected = {"a": grads, "b": other}, {"a": alone, "b": update(make(), other)[0]}
    tx = optax.partition({"l": make(), "r": make()}, {"a": "l", "b": "r"})
    chex.assert_trees_all_equal(update(tx, both)[0], expected)
    for mask in ({"a": True, "b": False}, lambda tree: {"a": 1, "b": 0}):
        updates, state = update(optax.masked(make(), mask), both)
        chex.assert_trees_all_equal(updates, {"a": alone, "b": other})
        chex.assert_trees_all_equal(state.inner_state, alone_state)


# --- on a mesh ---


@axis_types
@every_transformation
def test_sharded_equals_unsharded_and_types_stay(make, axis_type):
    """On Explicit axes the sharding is part of the type, and scan and cond compare it."""
    tx, grads, mesh = make(), mesh_grads(), make_mesh(axis_type)
    expected = run(tx, [grads, update(tx, grads)[0]])[1]

    @jax.jit
    def twice(updates, state):
        def step(carry, _):
            skip = jnp.isnan(jnp.sum(carry[0]["rows"]))
            return jax.lax.cond(skip, lambda: carry, lambda: tx.update(*carry)), None

        return jax.lax.scan(step, (updates, state), length=2)[0]

    with jax.set_mesh(mesh):
        sharded = place(grads, mesh)
        before = sharded, tx.init(sharded)
        after = twice(*before)
        twice(sharded, after[1])
    assert twice._cache_size() == 1
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)
    assert_trees_close(jax.device_get(after), expected, rtol=1e-4)
    for name, leaf in after[0].items():
        assert leaf.sharding.is_equivalent_to(sharded[name].sharding, leaf.ndim)


@axis_types
@pytest.mark.parametrize("copies", [1, 10])
def test_collectives_do_not_grow_with_the_number_of_leaves(copies, axis_type):
    mesh, tx = make_mesh(axis_type), autoscale()
    with jax.set_mesh(mesh):
        grads = many_rows(mesh, copies)
        compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile()
    assert collectives(compiled) == ["all-reduce"]


@pytest.mark.parametrize("make", [*LAYERED, gradient_normalization])
def test_shard_map_with_axis_name(make):
    """Leaves sharded over different axes, and not at all, in one tree."""
    grads, axes = mesh_grads(), ("data", "model")
    sharded = in_shard_map(lambda grads: update(make(axis_name=axes), grads)[0], SPECS, SPECS)
    assert_trees_close(sharded(place(grads, make_mesh())), update(make(), grads)[0])


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_where_every_leaf_is_sharded(check_vma):
    grads, axes = mesh_grads(), ("data", "model")
    specs = dict.fromkeys(grads, P(axes)) | {"conv": P(None, None, "data", "model")}

    def measure(grads, axis_name=None):
        measured = [std(grads, axis_name=axis_name) for std in (global_std, layer_std)]
        return *measured, update(autoscale(axis_name=axis_name), grads)[1]

    sharded = in_shard_map(partial(measure, axis_name=axes), specs, P(), check_vma=check_vma)
    assert_trees_close(sharded(grads), measure(grads))
    assert collectives(sharded.lower(grads).compile()) == ["all-reduce"]
