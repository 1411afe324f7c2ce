"""Standard deviations, and which parameters are layers."""

import warnings
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
    TRANSFORMATIONS,
    ArrayNode,
    assert_trees_close,
    in_shard_map,
    mesh_grads,
    random_grads,
)
from jax.sharding import PartitionSpec as P

from optax_autoscale import (
    autoscale,
    default_layer_axes,
    exclude,
    global_std,
    layer_std,
    layers,
    measure_effect,
)
from tests import oracle

GRADS = {"kernel": random_grads(1)["dense"], "bias": jnp.arange(3.0)}
settings = hypothesis.settings(deadline=None, max_examples=25)


def update(tx, grads=GRADS):
    return tx.update(grads, tx.init(grads))


# --- standard deviations ---


def test_global_std_of_a_hand_worked_case():
    # Entries 0, 2, 2, 4, 2: mean 2, squared deviations 4 + 4, over N - 1 = 4.
    grads = {"a": jnp.array([[0.0, 2.0]]), "b": jnp.array([[2.0], [4.0], [2.0]]), "c": jnp.ones(9)}
    np.testing.assert_allclose(global_std(grads), np.sqrt(2.0), rtol=1e-6)
    assert global_std({}) == 0


@hypothesis.given(
    shape=st.sampled_from([(1, 7), (16, 16), (3, 3, 16, 33)]),
    seed=st.integers(0, 2**31),
    log_scale=st.floats(-14, 8),
    ratio=st.floats(-10, 10),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@settings
def test_the_promised_accuracy(shape, seed, log_scale, ratio, dtype):
    """Within 1e-5 up to a mean of one deviation; beyond that the error grows with its square."""
    entries = np.random.default_rng(seed).standard_normal(shape)
    grads = {"w": jnp.asarray(10**log_scale * (entries + ratio), dtype), "b": jnp.ones(3)}
    wide = oracle.float64(grads["w"])
    hypothesis.assume(wide.std() > 0)
    bound = 5e-6 * (1 + (wide.mean() / wide.std()) ** 2)
    expected = oracle.global_std([wide])
    np.testing.assert_allclose(global_std(grads), expected, rtol=bound)
    np.testing.assert_allclose(layer_std(grads)["w"], expected, rtol=bound)
    assert global_std(jax.tree.map(lambda g: -2 * g, grads)) == 2 * global_std(grads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_million_entries_do_not_stagnate_and_sums_are_float32_or_wider(dtype):
    with jax.enable_x64(dtype == "float64"):
        entries = np.random.default_rng(0).standard_normal((1000, 1000))
        grads = {"w": jnp.asarray(1e-3 * (entries + 1), dtype), "bias": jnp.ones(3, dtype)}
        stds = layer_std(grads)
        assert stds["bias"] is None
        for std in (global_std(grads), stds["w"]):
            assert (std.shape, std.dtype) == ((), "float64" if dtype == "float64" else "float32")
            np.testing.assert_allclose(std, oracle.global_std([grads["w"]]), rtol=1e-5)


def test_beyond_the_range_of_float32_squares():
    signs = jnp.where(jnp.arange(64).reshape(8, 8) % 2, 1.0, -1.0)
    deviations = [float(global_std({"w": signs * scale})) for scale in (1e-18, 1e-24, 1e18, 1e20)]
    exact = np.sqrt(64 / 63)
    np.testing.assert_allclose(deviations, [1e-18 * exact, 0, 1e18 * exact, np.inf], rtol=1e-5)


def test_one_mesh_axis_may_be_given_as_a_string():
    grads = {"rows": mesh_grads()["rows"]}
    sharded = in_shard_map(lambda g: global_std(g, axis_name="data"), P("data"), P())
    assert_trees_close(sharded(grads), global_std(grads))


def test_nodes_of_a_users_tree_hold_nothing_but_arrays():
    grads = {"w": ArrayNode(GRADS["kernel"]), "b": ArrayNode(GRADS["bias"])}
    plain = {"w": GRADS["kernel"], "b": GRADS["bias"]}
    effect = measure_effect(optax.chain(autoscale(), optax.adamw(1e-3)), optax.adamw(1e-3))
    for tx in (*(make() for make in TRANSFORMATIONS), effect):
        for params in (grads, None) if tx is not effect else (grads,):
            updates, _ = tx.update(grads, tx.init(grads), params)
            expected, _ = tx.update(plain, tx.init(plain), params and plain)
            chex.assert_trees_all_equal({n: u.array for n, u in updates.items()}, expected)
    assert global_std(grads) == global_std(plain)


# --- which parameters are layers ---


@pytest.mark.parametrize("make", LAYERED)
def test_rules_that_say_the_same(make):
    """The default rule by name, and axes as any sequence of integers."""
    expected = update(make())
    for axes in (None, [0, 1], range(2), np.arange(2), (np.int64(0), np.int32(-1))):
        rule = axes is not None and (lambda path, leaf, a=axes: a if leaf.ndim == 2 else None)
        chex.assert_trees_all_equal(update(make(layer_axes=rule or None)), expected)
    chex.assert_trees_all_equal(update(make(layer_axes=default_layer_axes)), expected)
    with pytest.raises(TypeError, match="positional argument"):
        make(1e-3)  # a learning rate, perhaps


CALLS = [
    *(lambda rule, make=make: update(make(layer_axes=rule)) for make in LAYERED),
    *(partial(lambda call, rule: call(GRADS, layer_axes=rule), c) for c in (global_std, layer_std)),
    lambda rule: layers(GRADS, layer_axes=rule),
]


@pytest.mark.parametrize(
    "given",
    [
        *(True, np.True_, 1, 1.0, "", "01", jnp.bool_(True)),
        *((True, False), [0.0, 1.0], ("0", "1"), (None,), (), {"kernel": True}),
        *((0, 2), (1, 1), (-3,), (0, -2)),
    ],
    ids=repr,
)
def test_a_rule_that_gives_no_axes_is_named_with_the_leaf_and_what_it_gave(given):
    for call in CALLS:
        with pytest.raises(ValueError, match="layer_axes gave") as error:
            call(lambda path, leaf: given if leaf.ndim == 2 else None)
        for part in (f"gave {given!r} ", "['kernel'] of shape (8, 10)"):
            assert part in str(error.value)


@pytest.mark.parametrize("rule", [{"kernel": True}, True, 0, "kernel", (0, 1), jnp.arange(2)])
def test_what_is_not_a_function_is_an_error_before_the_first_update(rule):
    for call in (*(lambda rule, m=make: m(layer_axes=rule) for make in LAYERED), *CALLS[4:]):
        with pytest.raises(TypeError, match=r"layer_axes is .*; it must be None or a function"):
            call(rule)


def test_inject_hyperparams_with_the_default_rule_and_with_one_of_your_own():
    _, state = update(optax.inject_hyperparams(autoscale)(max_scale=0.25))
    assert set(optax.tree.get(state, "hyperparams")) == {"eps", "max_scale"}
    grads = GRADS | {"embedding": 1e3 * GRADS["kernel"]}
    injected = optax.inject_hyperparams(autoscale, static_args=("layer_axes",))
    updates, state = update(injected(max_scale=0.25, layer_axes=exclude("embedding")), grads)
    chex.assert_trees_all_equal(updates["embedding"], grads["embedding"])
    np.testing.assert_allclose(optax.tree.get(state, "global_std"), global_std(GRADS), rtol=1e-6)


class Custom:
    """A node of the tree whose children are numbered: FlattenedIndexKey."""

    def __init__(self, *children):
        self.children = children


jax.tree_util.register_pytree_node(
    Custom, lambda node: (node.children, None), lambda _, children: Custom(*children)
)
TABLE, KERNEL = jnp.eye(3), jnp.eye(4)
TREES = {
    "a key": ({"embedding": TABLE, "kernel": KERNEL}, ["embedding"], "kernel"),
    "a key above": ({"embedding": {"w": TABLE}, "kernel": KERNEL}, ["embedding"], "kernel"),
    "one of two": ({"a": TABLE, "b": {"c": TABLE}, "d": KERNEL}, ["a", "c"], "d"),
    "not a part of a word": ({"embed": TABLE, "re_embed": KERNEL}, ["embed"], "re_embed"),
    "not the word with more": ({"embed": TABLE, "embedder": KERNEL}, ["embed"], "embedder"),
    "case counts": ({"embed": TABLE, "Embed": KERNEL}, ["embed"], "Embed"),
    "two parts": ({"a": {"w": TABLE}, "b": {"w": KERNEL}}, ["a/w"], "b/w"),
    "Haiku's slashes": ({"net/a": {"w": TABLE}, "net/b": {"w": KERNEL}}, ["a"], "net/b/w"),
    "a list": ({"layers": [TABLE, KERNEL]}, ["layers/0"], "layers/1"),
    "a number": ({0: TABLE, 10: KERNEL}, ["0"], "10"),
    "a numbered child": (Custom(TABLE, KERNEL), ["0"], "1"),
    "an attribute": (optax.TraceState({"w": TABLE, "value": KERNEL}), ["trace/w"], "trace/value"),
    "a dot is no separator": ({"a.b": TABLE, "b": KERNEL}, ["a.b"], "b"),
    "fewer than two axes": ({"w": TABLE, "k": KERNEL, "b": jnp.ones(3), "s": 1.0}, ["w"], "k"),
}


@pytest.mark.parametrize(("tree", "names", "kept"), TREES.values(), ids=TREES)
def test_layers_lists_what_exclude_leaves(tree, names, kept):
    rule = exclude(*names)
    assert layers(tree, layer_axes=rule) == {kept: (4, 4)}
    assert sorted(layers(tree).values()) == [(3, 3)] * len(names) + [(4, 4)]
    shapes = jax.eval_shape(lambda: tree)
    assert layers(shapes, layer_axes=rule) == {kept: (4, 4)}
    autoscale(layer_axes=rule).init(tree)  # without a warning


def test_excluded_leaves_pass_through_and_do_not_count():
    grads = {"embedding": 100 * KERNEL, "kernel": KERNEL / 10, "bias": jnp.ones(4)}
    updates, state = update(autoscale(layer_axes=exclude("embedding")), grads)
    expected, expected_state = update(autoscale(), {n: grads[n] for n in ("kernel", "bias")})
    chex.assert_trees_all_equal(updates, expected | {"embedding": grads["embedding"]})
    chex.assert_trees_all_equal(state, expected_state)


@pytest.mark.parametrize("names", [(), ("",), (0,), (["a"],), ("a", None)], ids=repr)
def test_exclude_takes_names(names):
    with pytest.raises(TypeError, match="one or more names"):
        exclude(*names)


@pytest.mark.parametrize(
    ("name", "nearest"), [("embeding", "'embedding'"), ("token/embedding", "'tokens/embedding'")]
)
@pytest.mark.parametrize("make", LAYERED)
def test_init_warns_of_a_name_that_matches_nothing(make, name, nearest):
    params = {"tokens": {"embedding": TABLE}, "head": {"kernel": KERNEL}}
    tx = optax.chain(make(layer_axes=exclude(name, "head")), optax.adam(1e-3))
    with pytest.warns(UserWarning, match=rf"exclude\('{name}'\).*nearest.*{nearest}") as caught:
        state = jax.jit(tx.init)(params)
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):  # where the tree is not the whole one
        optax.masked(tx, {"tokens": True, "head": False}).init(params)
        optax.tree.map_params(tx, lambda leaf: leaf, state)
        tx.init({})


def test_stacked_layers_are_separate_layers():
    """Of a scan over layers: kernels (L, n, m) hold L layers, their biases (L, m) none."""

    def rule(path, leaf):
        if path[0].key != "stack":
            return default_layer_axes(path, leaf)
        return (-2, -1) if leaf.ndim == 3 else None

    kernels = 1e-3 * (random_grads(0, 1)["conv"].reshape(3, 12, 8) + jnp.arange(3).reshape(3, 1, 1))
    biases = jnp.arange(24.0).reshape(3, 8)
    stacked = {"stack": {"kernel": kernels, "bias": biases}, "head": {"kernel": KERNEL * 1e-3}}
    apart = {f"layer{i}": {"kernel": kernels[i]} for i in range(3)} | {"head": stacked["head"]}
    updates, state = update(autoscale(layer_axes=rule), stacked)
    expected, expected_state = update(autoscale(), apart)
    for i, kernel in enumerate(updates["stack"]["kernel"]):
        assert_trees_close(kernel, expected[f"layer{i}"]["kernel"])
    chex.assert_trees_all_equal(updates["stack"]["bias"], biases)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-6)
    stds = layer_std(stacked, layer_axes=rule)["stack"]
    np.testing.assert_allclose(stds["kernel"], np.std(kernels, axis=(1, 2), ddof=1), rtol=1e-5)
    assert stds["bias"] is None
