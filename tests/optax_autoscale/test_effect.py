"""The measured effect: two separate optimizers, closed forms, odd trees, wrappers, and meshes."""

import pickle
from functools import partial

import chex
import equinox as eqx
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import (
    SPECS,
    axis_types,
    collectives,
    in_shard_map,
    make_mesh,
    many_rows,
    mesh_grads,
    place,
    random_grads,
    signature,
)
from flax import linen, nnx, serialization
from jax.sharding import PartitionSpec as P

from optax_autoscale import EffectSums, autoscale, measure_effect, zscore_normalization
from tests import oracle


def make_params(dtype="float32"):
    """A network with names that also occur in optimizers' states."""
    kernel, scale, _, bias = random_grads(1, 1.0, dtype=dtype).values()
    return {"kernel": kernel, "norm": {"scale": bias, "bias": scale}}


def grads_at(params, step):
    """Gradients that depend on the parameters, so that both sides must get the same ones."""
    return jax.tree.map(lambda p: 1e-2 * jnp.sin(3 * p + step + 0.5), params)


def train(tx, params, steps=3, jit=jax.jit):
    """The gradients, parameters, updates and states of each step."""
    update, state, history = jit(tx.update), tx.init(params), []
    for step in range(steps):
        grads = grads_at(params, step)
        updates, state = update(grads, state, params)
        history.append((grads, params, updates, state))
        params = optax.apply_updates(params, updates)
    return history


def double(make=lambda: optax.adam(1e-3)):
    return measure_effect(optax.chain(make(), optax.scale(2)), make())


def effect_of(state):
    return [float(optax.tree.get(state, name)) for name in ("norm_ratio", "cosine")]


def measured(update, reference, params=None):
    """The state after one step in which the two sides return `update` and `reference`."""
    sides = [optax.stateless(lambda updates, params, tree=t: tree) for t in (update, reference)]
    tx = measure_effect(*sides)
    return tx.update(update, tx.init(update if params is None else params), params)[1]


def flat(tree):
    """All inexact entries in float64, as one vector."""
    leaves = [np.ravel(oracle.float64(leaf)) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def assert_effect(state, u, r, rtol=1e-5):
    lengths = np.linalg.norm(u), np.linalg.norm(r)
    np.testing.assert_allclose(state.norm_ratio, lengths[0] / lengths[1], rtol=rtol)
    np.testing.assert_allclose(state.cosine, u @ r / np.prod(lengths), rtol=rtol, atol=1e-6)


# --- values ---


@pytest.mark.parametrize(
    "reference",
    [optax.adamw(1e-2, weight_decay=1e-2), optax.sgd(0.1, momentum=0.9)],
    ids=["adamw", "sgd"],
)
def test_equals_two_chains_computed_apart(reference):
    tx, params = optax.chain(autoscale(), reference), make_params()
    alone, reference_state = train(tx, params), reference.init(params)
    together = train(measure_effect(tx, reference), params)
    for expected, (grads, params, updates, state) in zip(alone, together, strict=True):
        chex.assert_trees_all_equal((grads, params, updates, state.tx_state), expected)
        shadow, reference_state = jax.jit(reference.update)(grads, reference_state, params)
        assert_effect(state, flat(updates), flat(shadow))
        pairs = [(updates, updates), (shadow, shadow), (updates, shadow)]
        sums = [flat(a) @ flat(b) for a, b in pairs]
        np.testing.assert_allclose(state.effect_sums, sums, rtol=1e-5)


def test_equal_steps_have_a_ratio_and_a_cosine_of_exactly_1():
    for rounded in (0.3, np.nextafter(np.float32(0.3), 1)):
        same = EffectSums(jnp.float32(0.3), jnp.float32(0.3), jnp.float32(rounded))
        assert (same.norm_ratio, same.cosine) == (1, 1)


@pytest.mark.parametrize(
    ("update", "reference", "expected"),
    [(0.0, 0.0, (1, 1)), (0.0, 2.0, (0, 1)), (2.0, 0.0, (0, 0)), (1e-25, 1.0, (0, 1))],
)
def test_a_norm_of_zero(update, reference, expected):
    """Which float32 makes of the square of 1e-25 as well."""
    state = measured({"w": jnp.full(4, update)}, {"w": jnp.full(4, reference)})
    assert (state.norm_ratio, state.cosine) == expected


def test_nothing_differs_before_the_first_step_and_while_a_warm_up_is_at_zero():
    optimizer = optax.adamw(optax.linear_schedule(0.0, 1e-3, 10))
    tx = measure_effect(optax.chain(zscore_normalization(), optimizer), optimizer)
    before, sums = tx.init(make_params()), tx.init(make_params()).effect_sums
    first, second = (state for *_, state in train(tx, make_params(), steps=2))
    for state in (before, first, sums):
        assert (state.norm_ratio, state.cosine) == (1, 1)
    assert second.cosine < 0.9999


finite = st.floats(-8, 8, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0)


@hypothesis.given(hnp.arrays(np.float32, (2, 3, 6), elements=finite), st.floats(-12, 12))
@hypothesis.settings(deadline=None, max_examples=50)
def test_sums_of_leaves_and_of_steps_give_the_projection_onto_the_reference(trees, log_scale):
    """One tree of three leaves, and three steps of one leaf."""
    trees = (trees * np.float32(10**log_scale)).astype(np.float32)
    u, r = (oracle.float64(tree).ravel() for tree in trees)
    leaves = measured(*(dict(zip("abc", tree, strict=True)) for tree in trees)).effect_sums
    steps = [measured({"w": u}, {"w": r}).effect_sums for u, r in zip(*trees, strict=True)]
    added = optax.tree.add(optax.tree.add(*steps[:2]), steps[2])
    scale = np.linalg.norm(u) * np.linalg.norm(r)
    for sums in (leaves, added, jax.tree.map(lambda *s: jnp.sum(jnp.stack(s)), *steps)):
        np.testing.assert_allclose(sums, [u @ u, r @ r, u @ r], rtol=1e-5, atol=1e-5 * scale)
        factor = u @ r / (r @ r) if r.any() else 1.0 if not u.any() else 0.0
        got = float(sums.norm_ratio) * float(sums.cosine)
        ratio = np.linalg.norm(u) / np.linalg.norm(r) if r.any() else 1.0
        np.testing.assert_allclose(got, factor, atol=1e-5 * max(ratio, 1e-30))
        assert -1 <= sums.cosine <= 1
        rest = np.sum((u - factor * r) ** 2) / (u @ u) if u.any() else 0.0
        np.testing.assert_allclose(1 - sums.cosine**2, rest, atol=1e-5)


# --- the state ---


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
        assert signature(optax.tree.get(state, name)) == ((), jnp.float32, False)
    assert optax.tree.get(state, "effect_sums") is state.effect_sums

    slower = optax.tree.set(state, learning_rate=jnp.float32(1e-4))
    _, slower = both.update(grads, slower, params)
    np.testing.assert_allclose(optax.tree.get(slower, "learning_rate"), 1e-4, rtol=1e-6)
    np.testing.assert_allclose(slower.norm_ratio, 1e-2, rtol=1e-5)  # the reference keeps 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_state_types_never_change(dtype):
    with jax.enable_x64(dtype == "float64"):
        params, adam = make_params(dtype), optax.adam(1e-3)
        tx = measure_effect(optax.chain(autoscale(), adam), adam)
        grads = jax.tree.map(lambda p: (p * p).astype(p.dtype), params)

        @partial(jax.jit, donate_argnums=0)
        def step(state, skip):
            def scanned(state, _):
                branches = lambda: state, lambda: tx.update(grads, state, params)[1]
                return jax.lax.cond(skip, *branches), None

            return jax.lax.scan(scanned, state, length=2)[0]

        state = tx.init(params)
        before = signature(state)
        assert state.effect_sums.products.dtype == ("float64" if dtype == "float64" else "float32")
        assert signature(jax.eval_shape(tx.init, params)) == before
        for skip in (False, True):
            state = step(state, jnp.asarray(skip))
            assert signature(state) == before
        assert step._cache_size() == 1


@pytest.mark.parametrize("dtypes", [("complex64", "float32"), ("bfloat16", "float64")])
def test_sums_are_float32_or_wider_without_any_promotion(dtypes):
    rng = np.random.default_rng(0)
    with jax.enable_x64("float64" in dtypes), jax.numpy_dtype_promotion("strict"):
        draws = [rng.standard_normal(2**10) + 1j * rng.standard_normal(2**10) for _ in range(4)]
        u = {
            n: jnp.asarray(d if n == "complex64" else d.real, n)
            for n, d in zip(dtypes, draws, strict=False)
        }
        r = {n: jnp.asarray(d.real, dtypes[-1]) for n, d in zip(dtypes, draws[2:], strict=False)}
        state = measured(u, r)
    wide = "float64" if "float64" in dtypes else "float32"
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == ["float32"] * 2 + [wide] * 3
    pairs = [[np.asarray(tree[n], np.complex128) for tree in (u, r)] for n in dtypes]
    products = [[np.vdot(a, a), np.vdot(b, b), np.vdot(b, a)] for a, b in pairs]
    expected = np.real(np.sum(products, axis=0))
    np.testing.assert_allclose(state.effect_sums, expected, rtol=1e-5)


def test_checkpoints_and_copies_restore_the_state(tmp_path):
    params, adam = make_params(), optax.adam(1e-3)
    tx = measure_effect(optax.chain(autoscale(), adam), optax.MultiSteps(adam, 2))
    *_, (grads, params, _, state) = train(tx, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    as_bytes = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    leaves, structure = jax.tree.flatten(state)
    for copy in (
        restored,
        as_bytes,
        pickle.loads(pickle.dumps(state)),
        pickle.loads(pickle.dumps(structure)).unflatten(leaves),
    ):
        chex.assert_trees_all_equal(copy, state)
        assert jax.tree.structure(copy) == structure
        chex.assert_trees_all_equal(tx.update(grads, copy, params), tx.update(grads, state, params))


# --- an update never runs an init ---

INEXACT = eqx.is_inexact_array
REFERENCES = {
    "masked": lambda: optax.masked(optax.adam(1e-3), {"a": False, "b": True, "c": True}),
    "partition": lambda: optax.partition(
        {"x": optax.adam(1e-3), "y": optax.sgd(0.1, 0.9)}, {"a": "x", "b": "y", "c": "x"}
    ),
    "adafactor": lambda: optax.adafactor(1e-3),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 1, 5)),
    "snapshot": lambda: optax.chain(optax.snapshot("norm", optax.tree.norm), optax.adam(1e-3)),
    "noise": lambda: optax.add_noise(0.1, 0.1, 0),
    "a mask that reads values": lambda: optax.masked(
        optax.adam(1e-3), lambda tree: jax.tree.map(lambda leaf: bool(jnp.any(leaf != 0)), tree)
    ),
}


@pytest.mark.parametrize("make", REFERENCES.values(), ids=REFERENCES)
def test_references_of_all_kinds(make):
    params = {"a": jnp.ones((2, 3)), "b": jnp.arange(4.0), "c": jnp.ones(2)}
    names, reference, inits = {leaf: f"name of {leaf}" for leaf in params}, make(), []

    def init(params):
        inits.append(params)
        return make().init(params)

    tx = measure_effect(optax.adam(1e-2), reference._replace(init=init))
    state, reference_state = tx.init(params), reference.init(params)
    for step in range(3):
        grads = grads_at(params, step)
        shadow, reference_state = reference.update(grads, reference_state, params)
        updates, state = tx.update(grads, state, params)
        assert_effect(state, flat(updates), flat(shadow))
    assert len(inits) == 1
    parts = [jax.tree.leaves(part) for part in (state.reference_state, reference_state)]
    assert all(jnp.all(part == expected) for part, expected in zip(*parts, strict=True))
    assert optax.tree.get(state, "mu") is state.tx_state[0].mu
    if "bool" in make.__code__.co_names:  # which has nothing to read in a tree of names
        return

    def marked(tx, state):
        return optax.tree.map_params(
            tx,
            lambda _, name: name,
            state,
            names,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
            transform_non_params=lambda _: "other",
        )

    got = marked(tx, state)
    assert got.tx_state[0].mu == names
    expected = jax.tree.leaves(marked(reference, reference_state))
    assert jax.tree.leaves(got.reference_state) == expected
    assert set(jax.tree.leaves(got[:3])) == {"other"}


@pytest.mark.parametrize("jit", [lambda f: f, eqx.filter_jit], ids=["eager", "jit"])
@pytest.mark.parametrize("whole", [False, True], ids=["arrays at init", "model at init"])
def test_a_model_with_its_activation_functions_may_be_the_parameters(whole, jit):
    """As in Equinox: plain Optax trains it, momentum where `init` gets the arrays alone."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    arrays = eqx.filter(model, INEXACT)
    sgd = partial(optax.sgd, 0.1, momentum=None if whole else 0.9)
    tx = measure_effect(optax.chain(sgd(), optax.scale(2)), sgd())
    state, update = tx.init(model if whole else arrays), jit(tx.update)
    for _ in range(2):
        grads = eqx.filter_grad(lambda m: jnp.sum(jax.vmap(m)(jnp.ones((5, 3))) ** 2))(model)
        updates, state = update(grads, state, model)
        model = eqx.apply_updates(model, updates)
    np.testing.assert_allclose(effect_of(state), [2, 1], rtol=1e-6)


# --- odd trees ---


def test_odd_leaves_count_as_nothing():
    """Gradients of None beside parameters, integers, scalars, and what a mask leaves out."""
    plain = {"w": jnp.arange(1.0, 4.0)}
    odd = {"none": None, "steps": jnp.arange(3), "masked": optax.MaskedNode(), "empty": jnp.ones(0)}
    tx = measure_effect(optax.scale(2), optax.scale(1))
    params, updates = plain | odd | {"frozen": jnp.ones(3)}, plain | odd | {"frozen": None}
    state = tx.init(params)
    for _ in range(2):
        got, state = jax.jit(tx.update)(updates, state, params)
        assert jax.tree.structure(got) == jax.tree.structure(updates)
    assert (state.norm_ratio, state.cosine) == (2, 1)
    np.testing.assert_array_equal(state.effect_sums, [56, 14, 28])
    tx, grads = double(lambda: optax.sgd(0.1, momentum=0.9)), plain | {"frozen": None}
    grads["masked"] = optax.MaskedNode()
    state = tx.init(grads | {"frozen": jnp.ones(3)})
    for _ in range(3):  # momentum's trace loses a leaf at its first step
        _, state = tx.update(grads, state)
    assert state.reference_state[0]["frozen"] is None
    np.testing.assert_allclose(effect_of(state), [2, 1], rtol=1e-6)


@pytest.mark.parametrize("tree", [{}, (), [], None, {"none": None}, optax.MaskedNode()], ids=repr)
def test_empty_trees(tree):
    tx = measure_effect(autoscale(), optax.identity())
    for params in (tree, None):
        updates, state = jax.jit(tx.update)(tree, tx.init(tree), params)
        assert updates == tree
        assert (state.norm_ratio, state.cosine) == (1, 1)
        assert signature(state) == signature(tx.init(tree))


def test_a_single_array_is_a_tree_and_trees_that_do_not_match_are_an_error():
    *_, (*_, state) = train(double(), jnp.ones(3))
    np.testing.assert_allclose(effect_of(state), [2, 1], rtol=1e-6)
    with pytest.raises(ValueError, match="keys"):
        measured({"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.ones(2)})


# --- wrappers and libraries around it ---


def test_both_sides_get_the_extra_args():
    def scale_by_argument(sign):
        def update(updates, state, params=None, *, value, **extra_args):
            return jax.tree.map(lambda u: sign * value * u, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    tx, params = measure_effect(scale_by_argument(2.0), scale_by_argument(-1.0)), {"w": jnp.ones(3)}
    updates, state = tx.update(params, tx.init(params), params, value=3.0, of_another=None)
    np.testing.assert_array_equal(updates["w"], 6)
    np.testing.assert_array_equal(state.effect_sums, [108, 27, -54])
    double().update(params, double().init(params), params, value=3.0)


def test_between_the_steps_of_multi_steps_nothing_differs_and_a_nan_shows_in_its_step_alone():
    def twice():
        return optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()

    params = make_params()
    effects = [effect_of(state) for *_, state in train(double(twice), params, steps=4)]
    np.testing.assert_allclose(effects, [[1, 1], [2, 1]] * 2, rtol=1e-6)
    tx, bad = double(lambda: optax.sgd(0.1)), optax.tree.full_like(params, jnp.nan)
    state = tx.init(params)
    for grads, ratio in [(bad, np.nan), (params, 2.0)]:
        _, state = tx.update(grads, state, params)
        np.testing.assert_allclose(state.norm_ratio, ratio, rtol=1e-6)


def test_nnx_optimizer():
    """At init the parameters are variables, in the update they are arrays."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, double(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(jnp.square(m(jnp.ones((4, 3))))))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    np.testing.assert_allclose(effect_of(optimizer.opt_state), [2, 1], rtol=1e-6)


def test_boxed_parameters_keep_their_axes():
    """Linen's boxes give the reference's moments their sharding, and are absent from the update."""
    init = linen.with_logical_partitioning(linen.initializers.ones, ("embed", "mlp"))
    boxed = linen.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = double()
    state, params = tx.init(boxed), linen.meta.unbox(boxed)
    specs = linen.get_partition_spec(state)
    count, mu, nu = specs.reference_state
    assert count == P()
    assert mu["kernel"] == nu["kernel"] == specs.tx_state[0][0].mu["kernel"] == P("embed", "mlp")
    state = linen.meta.unbox(state)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    np.testing.assert_allclose(effect_of(state), [2, 1], rtol=1e-6)


# --- on a mesh ---


def two_steps(tx, grads):
    """Two steps, the second from the state that the first returned."""
    updates, state = tx.update(grads, tx.init(grads), grads)
    return tx.update(grads, state, updates)[1]


@axis_types
def test_sharded_equals_unsharded_and_types_stay(axis_type):
    tx = measure_effect(optax.chain(autoscale(), optax.adamw(1e-2)), optax.adamw(1e-2))
    grads = {name: mesh_grads()[name] for name in ("both", "replicated", "bias")}
    expected, mesh = jax.jit(partial(two_steps, tx))(grads), make_mesh(axis_type)
    with jax.set_mesh(mesh):
        sharded = place(grads, mesh)
        before = tx.init(sharded)
        updates, state = jax.jit(tx.update)(sharded, before, sharded)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, before)
        _, state = jax.jit(tx.update)(sharded, state, updates)
    np.testing.assert_allclose(state.effect_sums, expected.effect_sums, rtol=1e-4)
    for part in jax.tree.leaves(state.reference_state[1:]):
        assert part.sharding.mesh == mesh


@axis_types
@pytest.mark.parametrize("copies", [1, 5])
def test_one_all_reduce_more_than_the_transformation(copies, axis_type):
    mesh, optimizer = make_mesh(axis_type), optax.sgd(0.1, momentum=0.9)
    for tx in (optimizer, optax.chain(autoscale(), optimizer)):
        with jax.set_mesh(mesh):
            grads = many_rows(mesh, copies)
            alone, both = (
                collectives(jax.jit(tx.update).lower(grads, tx.init(grads), grads).compile())
                for tx in (tx, measure_effect(tx, optimizer))
            )
        assert both == [*alone, "all-reduce"]


AXES = ("data", "model")


@pytest.mark.parametrize(
    ("axis_name", "specs", "check_vma"),
    [
        (AXES, {name: SPECS[name] for name in ("rows", "columns", "joint", "replicated")}, True),
        (AXES, {"rows": P(AXES, None), "both": P(None, AXES)}, True),
        (AXES, {"rows": P(AXES, None), "both": P(None, AXES)}, False),
        ("data", {"rows": P("data")}, True),
    ],
)
def test_shard_map_counts_each_entry_once(axis_name, specs, check_vma):
    """Leaves sharded over different axes, and not at all, in one tree."""
    grads, sgd = {name: mesh_grads()[name] for name in specs}, optax.sgd(0.1, 0.9)

    def measure(grads, axis_name=None):
        tx = optax.chain(autoscale(axis_name=axis_name), sgd)
        state = two_steps(measure_effect(tx, sgd, axis_name=axis_name), grads)
        return state.effect_sums

    got = in_shard_map(partial(measure, axis_name=axis_name), specs, P(), check_vma=check_vma)
    np.testing.assert_allclose(got(grads), measure(grads), rtol=1e-4)
