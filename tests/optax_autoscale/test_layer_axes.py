"""Which parameters are layers: the default, custom rules, excluded names, and mistakes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_autoscale import (
    autoscale,
    center_layers,
    default_layer_axes,
    exclude,
    global_std,
    layer_std,
    scale_by_global_std,
    zscore_normalization,
)

TRANSFORMATIONS = [autoscale, scale_by_global_std, center_layers, zscore_normalization]
GRADS = {
    "kernel": jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)), jnp.float32),
    "bias": jnp.arange(3.0),
}


def update(tx, grads=GRADS):
    return tx.update(grads, tx.init(grads))


@pytest.mark.parametrize("make", TRANSFORMATIONS)
def test_none_is_the_default_rule(make):
    expected = update(make(layer_axes=default_layer_axes))
    chex.assert_trees_all_equal(update(make()), expected)
    chex.assert_trees_all_equal(update(make(layer_axes=None)), expected)
    chex.assert_trees_all_equal(
        layer_std(GRADS, layer_axes=None), layer_std(GRADS, layer_axes=default_layer_axes)
    )


@pytest.mark.parametrize("make", TRANSFORMATIONS)
@pytest.mark.parametrize("axes", [[0, 1], range(2), np.arange(2), (np.int64(0), np.int32(-1))])
def test_axes_are_any_sequence_of_integers(make, axes):
    expected = update(make())
    got = update(make(layer_axes=lambda path, leaf: axes if leaf.ndim == 2 else None))
    chex.assert_trees_all_equal(got, expected)


mistakes = pytest.mark.parametrize(
    "given",
    [
        *(True, False, np.True_, 1, 1.0, "kernel", "", "01", jnp.bool_(True)),
        *((True, False), [0.0, 1.0], ("0", "1"), (None,), (), [], {"kernel": True}),
        *((0, 2), (1, 1), (-3,), (0, -2), [0, 1, 1]),
    ],
    ids=repr,
)


@mistakes
def test_a_rule_that_gives_no_axes_is_named_with_the_leaf_and_what_it_gave(given):
    def rule(path, leaf):
        return given if leaf.ndim == 2 else None

    calls = [functools.partial(update, make(layer_axes=rule)) for make in TRANSFORMATIONS]
    calls += [
        functools.partial(measure, GRADS, layer_axes=rule) for measure in (global_std, layer_std)
    ]
    for call in calls:
        with pytest.raises(ValueError, match="layer_axes gave") as error:
            call()
        for part in (f"gave {given!r} ", "['kernel'] of shape (2, 3)", "distinct axes", "None"):
            assert part in str(error.value)


def test_a_scalar_has_no_axes_to_give():
    """As a layer of one entry its gradient would silently become 0."""
    tx = autoscale(layer_axes=lambda path, leaf: tuple(range(leaf.ndim)))
    with pytest.raises(
        ValueError, match=r"gave \(\) for the leaf at \['temperature'\] of shape \(\)"
    ):
        update(tx, {"temperature": jnp.float32(1.0)})


@pytest.mark.parametrize(
    "layer_axes", [{"kernel": True, "bias": False}, True, 0, "kernel", (0, 1), jnp.arange(2)]
)
def test_what_is_not_a_function_is_said_before_the_first_update(layer_axes):
    calls = [functools.partial(make, layer_axes=layer_axes) for make in TRANSFORMATIONS]
    calls += [
        functools.partial(measure, GRADS, layer_axes=layer_axes)
        for measure in (global_std, layer_std)
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"layer_axes is .*; it must be None or a function"):
            call()
    with pytest.raises(TypeError, match="'kernel': True"):
        autoscale(layer_axes={"kernel": True, "bias": False})


@pytest.mark.parametrize("make", [autoscale, scale_by_global_std, zscore_normalization])
def test_a_learning_rate_is_not_taken_for_eps(make):
    with pytest.raises(TypeError, match="positional argument"):
        make(1e-3)


def test_inject_hyperparams_with_the_default_rule_and_with_one_of_your_own():
    _, state = update(optax.inject_hyperparams(autoscale)(max_scale=0.25))
    assert optax.tree.get(state, "scale_factor") == 0.25
    assert set(optax.tree.get(state, "hyperparams")) == {"eps", "max_scale"}

    grads = GRADS | {"embedding": 1e3 * GRADS["kernel"]}
    injected = optax.inject_hyperparams(autoscale, static_args=("layer_axes",))
    updates, state = update(injected(max_scale=0.25, layer_axes=exclude("embedding")), grads)
    chex.assert_trees_all_equal(updates["embedding"], grads["embedding"])
    np.testing.assert_allclose(optax.tree.get(state, "global_std"), global_std(GRADS), rtol=1e-6)
    for make in (center_layers, zscore_normalization):
        chex.assert_trees_all_close(update(optax.inject_hyperparams(make)())[0], update(make())[0])


class Custom:
    """A node of the tree whose children are numbered: FlattenedIndexKey."""

    def __init__(self, *children):
        self.children = children


jax.tree_util.register_pytree_node(
    Custom, lambda node: (node.children, None), lambda _, children: Custom(*children)
)

TABLE, KERNEL = jnp.eye(3), jnp.eye(4)
TREES = {
    "a key": ({"embedding": TABLE, "kernel": KERNEL}, ["embedding"]),
    "a key above": ({"embedding": {"w": TABLE}, "kernel": KERNEL}, ["embedding"]),
    "one of two": ({"a": TABLE, "b": {"c": TABLE}, "d": KERNEL}, ["a", "c"]),
    "not a part of a word": ({"embedding": TABLE, "token_embedding": KERNEL}, ["embedding"]),
    "not the word with more": ({"embedding": TABLE, "embedding_norm": KERNEL}, ["embedding"]),
    "case counts": ({"embedding": TABLE, "Embedding": KERNEL}, ["embedding"]),
    "two parts": (
        {"text": {"embedding": TABLE}, "patch": {"embedding": KERNEL}},
        ["text/embedding"],
    ),
    "Haiku's slashes": ({"net/embed": {"w": TABLE}, "net/embedder": {"w": KERNEL}}, ["embed"]),
    "a list": ({"layers": [TABLE, KERNEL]}, ["layers/0"]),
    "a number": ({0: TABLE, 10: KERNEL}, ["0"]),
    "a numbered child": (Custom(TABLE, KERNEL), ["0"]),
    "an attribute": (optax.TraceState({"embedding": TABLE, "value": KERNEL}), ["trace/embedding"]),
    "a dot is no separator": ({"a.b": TABLE, "b": KERNEL}, ["a.b"]),
}


@pytest.mark.parametrize(("tree", "names"), TREES.values(), ids=TREES)
def test_exclude(tree, names):
    kept, rule = [], exclude(*names)
    for path, leaf in jax.tree.leaves_with_path(tree):
        if rule(path, leaf) is not None:
            assert rule(path, leaf) == (0, 1)
            kept.append(leaf)
    assert [leaf.shape for leaf in kept] == [KERNEL.shape]


def test_exclude_is_the_default_rule_otherwise():
    rule = exclude("embedding")
    for leaf in (jnp.ones(3), jnp.ones(()), jnp.ones((2, 3, 4)), jnp.ones((0, 2))):
        for path in ((), (jax.tree_util.DictKey("kernel"),)):
            assert rule(path, leaf) == default_layer_axes(path, leaf)


def test_excluded_leaves_pass_through_and_do_not_count():
    grads = {"embedding": 100 * KERNEL, "kernel": KERNEL / 10, "bias": jnp.ones(4)}
    updates, state = update(autoscale(layer_axes=exclude("embedding")), grads)
    rest = {"kernel": grads["kernel"], "bias": grads["bias"]}
    expected, expected_state = update(autoscale(), rest)
    chex.assert_trees_all_equal(updates, expected | {"embedding": grads["embedding"]})
    chex.assert_trees_all_equal(state, expected_state)


@pytest.mark.parametrize(
    "names", [(), ("",), (0,), (["embedding"],), ("embedding", None)], ids=repr
)
def test_exclude_takes_names(names):
    with pytest.raises(TypeError, match="one or more names"):
        exclude(*names)
