import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_autoscale import (
    AutoscaleState,
    autoscale,
    center_layers,
    global_std,
    scale_by_global_std,
)
from tests import oracle

EDGE = np.exp(-4 * np.sqrt(2))  # s_1 at which a_1 = (4 / |ln s_1|)^2 = 0.5


def random_grads(seed: int, scale: float = 1e-2, mean: float = 0.5, dtype: str = "float32"):
    """A small network's gradients: convolution, biases, dense; entries ~ scale * N(mean, 1)."""
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 4, 8), "conv_bias": (8,), "dense": (8, 10), "dense_bias": (10,)}
    return {
        name: jnp.asarray(scale * (rng.standard_normal(shape) + mean), dtype)
        for name, shape in shapes.items()
    }


def grads_of_std(std: float):
    """Two leaves whose global standard deviation is `std` to float32 precision."""
    grads = random_grads(0)
    factor = std / oracle.global_std(list(grads.values()))
    return jax.tree.map(lambda g: g * factor, grads)


def run(tx, steps):
    state, history = tx.init(steps[0]), []
    for grads in steps:
        updates, state = tx.update(grads, state, grads)
        history.append((updates, state))
    return history


def assert_updates_close(updates, expected, rtol=1e-5):
    """Equal up to rounding, which centering makes relative to a leaf's largest entry."""
    for update, reference in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        atol = rtol * float(jnp.abs(reference).max())
        np.testing.assert_allclose(update, reference, rtol=0, atol=atol)


def assert_steps_match(tx, steps, rtol=1e-5, **kwargs):
    expected = oracle.autoscale([list(grads.values()) for grads in steps], **kwargs)
    for (updates, state), step in zip(run(tx, steps), expected, strict=True):
        np.testing.assert_allclose(state.global_std, step.global_std, rtol=rtol)
        # Near the singularity at s = 1 an error in s is multiplied by p / |ln s| in a.
        factor_rtol = rtol * max(1.0, 1 / abs(np.log(step.global_std)))
        np.testing.assert_allclose(state.scale_factor, step.scale_factor, rtol=factor_rtol)
        assert state.exponent == step.exponent
        for update, reference in zip(updates.values(), step.updates, strict=True):
            wanted = np.asarray(reference).astype(update.dtype)
            atol = factor_rtol * np.abs(reference).max()
            ulp = float(jnp.finfo(update.dtype).eps)
            np.testing.assert_allclose(
                oracle.float64(update), oracle.float64(wanted), rtol=ulp, atol=max(atol, 1e-45)
            )


@pytest.mark.parametrize("magnitude", [10.0**k for k in range(-14, 5)])
def test_equals_the_paper_over_magnitudes(magnitude):
    # Three steps that shrink, as gradients do, so that the exponent acts on the second and third.
    steps = [random_grads(t, magnitude * 0.7**t) for t in range(3)]
    assert_steps_match(autoscale(), steps)


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [("bfloat16", 1e-14), ("bfloat16", 1e-3), ("bfloat16", 1e4), ("float16", 1e-3)],
)
def test_equals_the_paper_in_half_precision(dtype, magnitude):
    steps = [random_grads(t, magnitude, dtype=dtype) for t in range(3)]
    for updates, _ in run(autoscale(), steps):
        assert all(update.dtype == dtype for update in jax.tree.leaves(updates))
    assert_steps_match(autoscale(), steps)


def test_computes_in_float64_where_the_gradients_are():
    with jax.enable_x64(True):
        steps = [random_grads(t, dtype="float64") for t in range(3)]
        for (updates, state), step in zip(
            run(autoscale(), steps),
            oracle.autoscale([list(g.values()) for g in steps]),
            strict=True,
        ):
            assert state.global_std.dtype == jnp.float32
            for update, reference in zip(updates.values(), step.updates, strict=True):
                assert update.dtype == jnp.float64
                np.testing.assert_allclose(update, reference, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(
    ("first_std", "exponent"),
    [
        (EDGE * 0.9999, 1),
        (EDGE * 1.0001, 2),
        (1 / EDGE * 1.0001, 1),  # |ln s| is the same for s and 1 / s
        (1 / EDGE * 0.9999, 2),
        (1e-14, 1),
        (1.0, 2),
    ],
)
def test_exponent_follows_the_first_step(first_std, exponent):
    steps = [grads_of_std(first_std), grads_of_std(1e-1), grads_of_std(1e-6)]
    history = run(autoscale(), steps)
    assert [int(state.exponent) for _, state in history] == [exponent] * 3
    ratio = 4 / np.abs(np.log([1e-1, 1e-6]))
    np.testing.assert_allclose(
        [state.scale_factor for _, state in history[1:]], ratio**exponent, rtol=1e-5
    )


def test_the_first_update_is_quadratic_even_where_the_exponent_becomes_one():
    (_, first), (_, second) = run(autoscale(), [grads_of_std(np.exp(-8.0))] * 2)
    np.testing.assert_allclose(first.scale_factor, 0.25, rtol=1e-5)
    np.testing.assert_allclose(second.scale_factor, 0.5, rtol=1e-5)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_step_without_information_leaves_the_exponent_undecided(bad):
    good = [grads_of_std(1e-6), grads_of_std(1e-2)]
    spoiled = jax.tree.map(lambda g: jnp.full_like(g, bad), good[0])
    tx = autoscale()
    history = run(tx, [spoiled, spoiled, *good])
    assert [int(state.exponent) for _, state in history] == [0, 0, 1, 1]
    for got, expected in zip(history[2:], run(tx, good), strict=True):
        chex.assert_trees_all_equal(got, expected)


def test_zero_gradients_give_zero_updates():
    zeros = jax.tree.map(jnp.zeros_like, random_grads(0))
    updates, state = run(autoscale(), [zeros])[0]
    chex.assert_trees_all_equal(updates, zeros)
    assert state.global_std == 0
    assert state.scale_factor == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_entry_shows_in_every_eligible_update(bad):
    grads = random_grads(0)
    grads["dense"] = grads["dense"].at[0, 0].set(bad)
    updates, _ = run(autoscale(), [grads])[0]
    assert np.isnan(updates["conv"]).all()
    chex.assert_trees_all_equal(updates["conv_bias"], grads["conv_bias"])


def test_a_nan_after_the_first_step_changes_nothing_later():
    good = [random_grads(t) for t in range(3)]
    spoiled = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), good[0])
    with_nan = run(autoscale(), [good[0], spoiled, good[1], good[2]])
    chex.assert_trees_all_equal(with_nan[2:], run(autoscale(), good)[1:])


def test_max_scale_bounds_the_factor_and_nothing_else():
    near_one, small = grads_of_std(1.0 + 1e-3), grads_of_std(1e-3)
    steps = [near_one, small, near_one]
    unbounded = [float(state.scale_factor) for _, state in run(autoscale(), steps)]
    bounded = [float(state.scale_factor) for _, state in run(autoscale(max_scale=1.0), steps)]
    assert unbounded[0] > 1e6
    assert bounded == [1.0, unbounded[1], 1.0]
    assert_steps_match(autoscale(max_scale=1.0), steps, max_scale=1.0)


def test_the_singularity_is_as_high_as_the_specification_says():
    # Entries 0 and sqrt(2): the unbiased standard deviation is 1 up to one rounding.
    grads = {"w": jnp.array([[0.0], [np.sqrt(2.0)]], jnp.float32)}
    state = AutoscaleState(jnp.int32(1), jnp.float32(0), jnp.float32(1))
    s = run(autoscale(), [grads])[0][1].global_std
    np.testing.assert_allclose(s, 1.0, rtol=1e-7)
    _, linear = autoscale().update(grads, state)
    np.testing.assert_allclose(linear.scale_factor, 4 / (abs(np.log(float(s))) + 1e-8), rtol=1e-5)
    assert linear.scale_factor > 2e7


def test_equals_its_two_halves():
    steps = [random_grads(t, 1e-3) for t in range(3)]
    halves = run(optax.chain(scale_by_global_std(), center_layers()), steps)
    for (whole, state), (composed, composed_state) in zip(
        run(autoscale(), steps), halves, strict=True
    ):
        assert_updates_close(whole, composed)
        chex.assert_trees_all_equal(state, composed_state[0])


any_gradients = st.builds(
    lambda seed, log_scale, mean: random_grads(seed, 10.0**log_scale, mean),
    seed=st.integers(0, 2**31),
    log_scale=st.floats(-13, 4),
    mean=st.floats(-1.5, 1.5),
)
settings = hypothesis.settings(deadline=None, max_examples=20)
center = jax.jit(lambda grads: center_layers().update(grads, optax.EmptyState())[0])
first_step = jax.jit(lambda grads: autoscale().update(grads, autoscale().init(grads)))


@hypothesis.given(any_gradients, st.integers(0, 2**31))
@settings
def test_only_the_set_of_entries_in_each_layer_matters(grads, seed):
    rng = np.random.default_rng(seed)
    order = {name: rng.permutation(grad.size) for name, grad in grads.items()}
    expected = oracle.global_std(list(grads.values()))

    leaves = dict(zip("zyxw", rng.permutation(list(grads)), strict=True))
    permuted_leaves = {new: grads[old] for new, old in leaves.items()}
    split = ({"in": grads["conv"][:2], "out": grads["conv"][2:]}, [grads["dense"]])
    for same in (permuted_leaves, split):
        np.testing.assert_allclose(global_std(same), expected, rtol=1e-5)

    def permute(tree):
        return {n: leaf.ravel()[order[n]].reshape(leaf.shape) for n, leaf in tree.items()}

    def transpose(tree):
        return {name: leaf.T for name, leaf in tree.items()}

    for move in (permute, transpose):
        np.testing.assert_allclose(global_std(move(grads)), expected, rtol=1e-5)
        assert_updates_close(center(move(grads)), move(center(grads)))


@hypothesis.given(any_gradients)
@settings
def test_centring_is_idempotent_and_exact(grads):
    centered = center(grads)
    assert_updates_close(center(centered), centered, rtol=1e-6)
    for name in ("conv", "dense"):
        wide = oracle.float64(grads[name])
        got, ulp = oracle.float64(centered[name]), np.finfo(np.float32).eps * np.abs(wide).max()
        np.testing.assert_allclose(got, wide - wide.mean(), rtol=0, atol=4 * ulp)


def test_centring_small_integers_is_exact_to_the_last_bit():
    grads = {"w": jnp.asarray(np.random.default_rng(0).integers(-99, 99, (16, 32)), jnp.float32)}
    expected = grads["w"] - np.float32(oracle.float64(grads["w"]).mean())
    np.testing.assert_array_equal(center(grads)["w"], expected)


@hypothesis.given(any_gradients, st.floats(1e-3, 1e3))
@settings
def test_scaling_the_gradients_scales_their_deviation(grads, factor):
    scaled = jax.tree.map(lambda g: g * jnp.float32(factor), grads)
    np.testing.assert_allclose(global_std(scaled), factor * global_std(grads), rtol=1e-5)
    doubled = jax.tree.map(lambda g: -2 * g, grads)
    assert global_std(doubled) == 2 * global_std(grads)


@hypothesis.given(any_gradients)
@settings
def test_jit_equals_eager_equals_the_halves(grads):
    halves = optax.chain(scale_by_global_std(), center_layers())
    updates, state = first_step(grads)
    for tx in (autoscale(), halves):
        got, got_state = tx.update(grads, tx.init(grads))
        got_state = got_state[0] if tx is halves else got_state
        np.testing.assert_allclose(got_state.global_std, state.global_std, rtol=1e-5)
        # Near the singularity the factor is another one after any rounding of s.
        assert_updates_close(
            {name: got[name] / got_state.scale_factor for name in ("conv", "dense")},
            {name: updates[name] / state.scale_factor for name in ("conv", "dense")},
        )


def test_updates_can_be_differentiated():
    grads = grads_of_std(1e-2)
    direction = random_grads(1)

    def loss(t):
        moved = jax.tree.map(lambda g, d: g + t * d, grads, direction)
        return optax.tree.sum(jax.tree.map(lambda u: jnp.sum(u**2), first_step(moved)[0]))

    difference = (loss(0.02) - loss(-0.02)) / 0.04
    np.testing.assert_allclose(jax.grad(loss)(0.0), difference, rtol=1e-2)


@pytest.mark.parametrize(
    "grads",
    [
        {},
        None,
        {"scalar": jnp.float32(3.0)},
        {"vector": jnp.arange(3.0), "none": None},
        [jnp.zeros((0, 3)), jnp.ones(2)],
        optax.MaskedNode(),
    ],
    ids=["empty", "none", "scalar", "vector", "zero size", "masked"],
)
def test_trees_without_eligible_entries_pass_through(grads):
    tx = autoscale()
    state = tx.init(grads)
    for _ in range(2):
        updates, state = tx.update(grads, state)
        chex.assert_trees_all_equal(updates, grads)
        assert (int(state.exponent), float(state.scale_factor)) == (0, 1.0)


def test_odd_leaves_among_ordinary_ones():
    ordinary = random_grads(0)
    odd = {"none": None, "masked": optax.MaskedNode(), "scalar": jnp.float32(2.0)}
    odd |= {"python": 1.5, "empty": jnp.zeros((4, 0, 2)), "numpy": np.ones(3, np.float32)}
    updates, state = run(autoscale(), [ordinary | odd])[0]
    alone, alone_state = run(autoscale(), [ordinary])[0]
    chex.assert_trees_all_equal({name: updates[name] for name in ordinary}, alone)
    chex.assert_trees_all_equal({name: updates[name] for name in odd}, odd)
    chex.assert_trees_all_equal(state, alone_state)


def test_one_eligible_entry_has_no_deviation():
    updates, state = run(autoscale(), [{"w": jnp.array([[3.0]])}])[0]
    assert updates["w"] == 0
    assert state.global_std == 0
    assert state.exponent == 0


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_integer_leaves_are_named(dtype):
    grads = {"encoder": [{"table": jnp.ones((2, 2), dtype)}]}
    with pytest.raises(TypeError, match=rf"\['encoder'\]\[0\]\['table'\] is {dtype}.*optax.masked"):
        autoscale().update(grads, autoscale().init(grads))


def test_complex_gradients_use_the_squared_modulus():
    rng = np.random.default_rng(0)
    grad = (rng.standard_normal((4, 5)) + 1j * rng.standard_normal((4, 5)) + 1) * 1e-3
    real = rng.standard_normal((3, 3)) * 1e-3
    grads = {"complex": jnp.asarray(grad, jnp.complex64), "real": jnp.asarray(real, jnp.float32)}
    updates, state = run(autoscale(), [grads])[0]
    s = np.std(np.concatenate([grad.ravel(), real.ravel()]), ddof=1)
    a = (4 / (abs(np.log(s)) + 1e-8)) ** 2
    np.testing.assert_allclose(state.global_std, s, rtol=1e-5)
    np.testing.assert_allclose(updates["complex"], a * (grad - grad.mean()), rtol=1e-4)
    assert updates["real"].dtype == jnp.float32


def stacked_layer_axes(path, leaf):
    """Of a scan over layers: kernels (L, n, m) hold L layers, their biases (L, m) none."""
    if path[0].key != "stack":
        return (0, 1) if leaf.ndim == 2 else None
    return (1, 2) if leaf.ndim == 3 else None


def test_stacked_layers_are_separate_layers():
    rng = np.random.default_rng(0)
    kernels = jnp.asarray(1e-3 * (rng.standard_normal((3, 4, 5)) + np.arange(3.0).reshape(3, 1, 1)))
    biases, head = (
        jnp.asarray(rng.standard_normal((3, 5))),
        jnp.asarray(rng.standard_normal((5, 2))),
    )
    stacked = {"stack": {"kernel": kernels, "bias": biases}, "head": {"kernel": head * 1e-3}}
    layers = {f"layer{i}": {"kernel": kernels[i], "bias": biases[i]} for i in range(3)}
    updates, state = run(autoscale(layer_axes=stacked_layer_axes), [stacked])[0]
    expected, expected_state = run(autoscale(), [layers | {"head": stacked["head"]}])[0]
    for i in range(3):
        np.testing.assert_allclose(
            updates["stack"]["kernel"][i], expected[f"layer{i}"]["kernel"], rtol=1e-4, atol=1e-8
        )
    chex.assert_trees_all_equal(updates["stack"]["bias"], biases)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-6)


def test_layer_axes_selects_by_name():
    grads = random_grads(0)
    tx = autoscale(
        layer_axes=lambda path, leaf: (0, 1) if path[-1].key == "dense" else None,
    )
    updates, state = tx.update(grads, tx.init(grads))
    chex.assert_trees_all_equal(updates["conv"], grads["conv"])
    np.testing.assert_allclose(state.global_std, oracle.global_std([grads["dense"]]), rtol=1e-6)


def test_jit_equals_eager_and_compiles_once():
    steps = [random_grads(t, 10.0 ** (-t)) for t in range(4)]
    tx = autoscale()
    traces = []

    @jax.jit
    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state)

    state = tx.init(steps[0])
    for grads, (updates, expected_state) in zip(steps, run(tx, steps), strict=True):
        jitted, state = update(grads, state)
        assert_updates_close(jitted, updates)
        chex.assert_trees_all_close(state, expected_state, rtol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_types_are_strong_and_never_change(dtype):
    tx = autoscale(max_scale=1.0)
    grads = random_grads(0, dtype=dtype)
    before = tx.init(grads)
    _, after = tx.update(grads, before)
    for state in (before, after):
        types = [(leaf.shape, leaf.dtype.name, leaf.weak_type) for leaf in state]
        assert types == [((), "int32", False), ((), "float32", False), ((), "float32", False)]


def test_scan_equals_a_loop():
    steps = [random_grads(t, 1e-3) for t in range(3)]
    tx = autoscale()

    def body(state, grads):
        updates, state = tx.update(grads, state)
        return state, updates

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    state, updates = jax.lax.scan(body, tx.init(steps[0]), stacked)
    history = run(tx, steps)
    chex.assert_trees_all_close(state, history[-1][1], rtol=1e-5)
    last = jax.tree.map(lambda leaf: leaf[-1], updates)
    assert_updates_close(last, history[-1][0])


def test_strict_dtype_promotion_is_enough():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        grads = {name: jnp.ones((2, 2), name) for name in ("bfloat16", "float32", "float64")}
        tx = autoscale(max_scale=jnp.float32(1.0))
        updates, _ = tx.update(grads, tx.init(grads))
        assert {name: update.dtype.name for name, update in updates.items()} == {
            name: name for name in grads
        }


def test_inject_hyperparams_traces_eps_and_max_scale():
    grads = grads_of_std(1.0 + 1e-3)
    tx = optax.inject_hyperparams(autoscale, static_args=("layer_axes", "axis_name"))(
        eps=1e-8, max_scale=2.0
    )
    state = tx.init(grads)
    update = jax.jit(tx.update)
    _, state = update(grads, state)
    assert optax.tree.get(state, "scale_factor") == 2.0
    state.hyperparams["max_scale"] = jnp.float32(0.25)
    _, state = update(grads, state)
    assert optax.tree.get(state, "scale_factor") == 0.25
    state.hyperparams["max_scale"] = jnp.float32(np.inf)
    state.hyperparams["eps"] = jnp.float32(1.0)
    _, state = update(grads, state)
    np.testing.assert_allclose(optax.tree.get(state, "scale_factor"), 16.0, rtol=1e-2)


def test_multi_steps_scales_the_accumulated_gradient():
    steps = [random_grads(t) for t in range(4)]
    tx = optax.MultiSteps(autoscale(), every_k_schedule=2)
    state = tx.init(steps[0])
    emitted = []
    for t, grads in enumerate(steps):
        updates, state = tx.update(grads, state, grads)
        if t % 2:
            emitted.append(updates)
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *steps[:2]),
        jax.tree.map(lambda a, b: (a + b) / 2, *steps[2:]),
    ]
    expected = [updates for updates, _ in run(autoscale(), means)]
    assert_updates_close(emitted, expected)


def test_masked_sees_only_what_the_mask_lets_through():
    grads = random_grads(0)
    mask = {name: name != "dense" for name in grads}
    tx = optax.masked(autoscale(), mask)
    updates, state = tx.update(grads, tx.init(grads), grads)
    rest = {name: grad for name, grad in grads.items() if mask[name]}
    expected, expected_state = run(autoscale(), [rest])[0]
    chex.assert_trees_all_equal(updates, expected | {"dense": grads["dense"]})
    chex.assert_trees_all_equal(state.inner_state, expected_state)


def test_apply_if_finite_skips_a_bad_step():
    good = [random_grads(t) for t in range(2)]
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.inf), good[0])
    tx = optax.apply_if_finite(autoscale(), max_consecutive_errors=5)
    state = tx.init(good[0])
    _, state = tx.update(bad, state, good[0])
    updates, state = tx.update(good[0], state, good[0])
    expected, expected_state = run(autoscale(), [good[0]])[0]
    chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal(state.inner_state, expected_state)


def test_diagnostics_are_found_behind_any_optimizer():
    params = {"bn": {"scale": jnp.ones(3)}, "kernel": jnp.ones((3, 3))}
    grads = {"bn": {"scale": jnp.ones(3)}, "kernel": jnp.arange(9.0).reshape(3, 3) * 1e-2}
    tx = optax.chain(autoscale(), optax.adamw(1e-3))
    _, state = tx.update(grads, tx.init(params), params)
    s = oracle.global_std([grads["kernel"]])
    np.testing.assert_allclose(optax.tree.get(state, "global_std"), s, rtol=1e-6)
    np.testing.assert_allclose(
        optax.tree.get(state, "scale_factor"), (4 / abs(np.log(s))) ** 2, rtol=1e-5
    )
    assert optax.tree.get(state, "exponent") == 2


def test_the_mean_of_a_layer_never_moves_under_plain_sgd():
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (6, 4)), "b": jnp.zeros(4)}
    x, y = jax.random.normal(key, (32, 6)), jax.random.normal(key, (32, 4)) + 1

    def loss(params):
        return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)

    tx = optax.chain(autoscale(max_scale=1.0), optax.sgd(0.1))
    state, trained = tx.init(params), params
    for _ in range(50):
        updates, state = tx.update(jax.grad(loss)(trained), state)
        trained = optax.apply_updates(trained, updates)
    assert loss(trained) < 0.8 * loss(params)
    assert jnp.abs(trained["w"] - params["w"]).max() > 0.05
    np.testing.assert_allclose(trained["w"].mean(), params["w"].mean(), atol=1e-6)


def test_adam_divides_a_constant_factor_out():
    params = random_grads(9, 1.0)
    steps = [random_grads(t, 1e-2) for t in range(5)]

    def train(tx):
        state, current = tx.init(params), params
        for grads in steps:
            updates, state = tx.update(grads, state, current)
            current = optax.apply_updates(current, updates)
        return current

    adam = optax.adam(1e-3, eps=1e-16)
    chex.assert_trees_all_close(
        train(optax.chain(optax.scale(0.25), adam)), train(adam), rtol=1e-6, atol=1e-7
    )
