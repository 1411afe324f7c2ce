"""All models: size and cost, values and gradients, dtypes and modes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_models
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from models import MODELS, VGG, ResNet, resnet8, resnet20, vgg_tiny

Model = ResNet | VGG

TINY = {
    "identity": partial(resnet8, widths=(4, 7, 7)),  # an odd number of new channels, and none
    "projection": partial(resnet8, widths=(4, 8), shortcut="projection"),
    "vgg": vgg_tiny,
}
tiny = pytest.mark.parametrize("build", TINY.values(), ids=TINY)
train_or_eval = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def pure(model: Model) -> tuple[Callable, nnx.State]:
    """The model as a compiled function of its state and the images, and its current state."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def apply(state: nnx.State, images: jax.Array) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(graphdef, state, copy=True)
        return model(images), nnx.state(model)

    return apply, state


def abstract(build: Callable[..., Model], **options: Any) -> Model:
    """A model without its arrays."""
    return nnx.eval_shape(lambda: build(**options, rngs=nnx.Rngs(0)))


def multiply_adds(jaxpr: Jaxpr) -> int:
    """Multiplications in the convolutions and matrix products of a computation without loops."""
    total = 0
    for equation in jaxpr.eqns:
        arrays: list[Any] = [variable.aval for variable in (*equation.outvars, *equation.invars)]
        if equation.primitive.name == "conv_general_dilated":
            result, _, kernel = arrays
            features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += result.size * kernel.size // features
        elif equation.primitive.name == "dot_general":
            result, left, _ = arrays
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += result.size * math.prod(left.shape[axis] for axis in contracted)
        if equation.primitive.name == "cond":  # the same computation for several platforms
            branches = equation.params["branches"]
            total += multiply_adds(branches[-1].jaxpr)  # what is not written for one platform
            continue
        for inner in jax.tree.leaves(equation.params):
            if isinstance(inner, ClosedJaxpr):
                total += multiply_adds(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                total += multiply_adds(inner)
    return total


def randomized(build: Callable[..., Model], **options: Any) -> tuple[Model, numpy_models.Params]:
    """A model with no array at its initial value, and a copy of its arrays in float64."""
    model = abstract(build, **options)
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        match path[-1].key:
            case "kernel":
                values = rng.normal(0, math.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.shape)
            case "bias" | "mean":
                values = rng.normal(0, 0.5, leaf.shape)
            case _:
                values = rng.uniform(0.5, 2, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    nnx.update(model, jax.tree.map_with_path(draw, nnx.to_pure_dict(nnx.state(model))))
    return model, to_float64(nnx.state(model))


def to_float64(state: nnx.State) -> numpy_models.Params:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(state))


def random_images(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 1, shape).astype(np.float32)


def in_numpy(model: Model) -> Callable[..., np.ndarray]:
    return numpy_models.vgg if isinstance(model, VGG) else numpy_models.resnet


@pytest.mark.parametrize(
    ("name", "options", "parameters", "eligible", "tensors", "cost"),
    [
        ("resnet20", {}, 275_572, 274_096, 20, 40.557e6),
        ("resnet56", {}, 858_868, 854_704, 56, 125.491e6),
        ("resnet20", {"shortcut": "projection"}, 278_324, 276_656, 22, 40.819e6),
        ("resnet56", {"shortcut": "projection"}, 861_620, 857_264, 58, 125.754e6),
        ("vgg16_bn", {}, 14_774_436, 14_761_664, 14, 313.248e6),
    ],
)
def test_size_and_cost(
    name: str, options: dict[str, str], parameters: int, eligible: int, tensors: int, cost: float
):
    model = abstract(MODELS[name].make, num_classes=100, **options)
    apply, state = pure(model)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == parameters
    matrices = [leaf for leaf in leaves if leaf.ndim > 1]
    assert (sum(leaf.size for leaf in matrices), len(matrices)) == (eligible, tensors)
    jaxpr = jax.make_jaxpr(apply)(state, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert multiply_adds(jaxpr.jaxpr) == pytest.approx(cost, abs=500)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_float32_whatever_the_images_and_the_dtype(name):
    model = abstract(MODELS[name].make, num_classes=10, channels=1, dtype=jnp.bfloat16)
    apply, state = pure(model)
    images = jax.ShapeDtypeStruct((5, 16, 16, 1), jnp.float32)
    logits, state = jax.eval_shape(apply, state, images)
    assert (logits.shape, logits.dtype) == ((5, 10), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


@train_or_eval
@tiny
def test_values_and_running_statistics_match_numpy(build, train):
    model, arrays = randomized(build, num_classes=5, channels=2)
    model.train() if train else model.eval()
    images = random_images(3, 15, 18, 2)
    apply, state = pure(model)

    logits, state = apply(state, images)
    expected = in_numpy(model)(arrays, images.astype(np.float64), train)

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(logits, expected)
    jax.tree.map(close, to_float64(state), arrays)


def test_resnet20_matches_numpy():
    model, arrays = randomized(resnet20, num_classes=100)
    images = random_images(2, 32, 32, 3)
    apply, state = pure(model)

    logits, state = apply(state, images)
    expected = numpy_models.resnet(arrays, images.astype(np.float64), train=True)

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(logits, expected)
    jax.tree.map(close, to_float64(state), arrays)


@train_or_eval
@tiny
def test_gradients_match_finite_differences_of_numpy(build, train):
    model, arrays = randomized(build, num_classes=5)
    model.train() if train else model.eval()
    images, weights = random_images(6, 4, 4, 3), random_images(6, 5, seed=2)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(params: nnx.State) -> jax.Array:
        return jnp.sum(weights * nnx.merge(graphdef, params, rest, copy=True)(jnp.asarray(images)))

    def loss(path: tuple, step: np.ndarray) -> float:
        moved = jax.tree.map_with_path(lambda p, leaf: leaf + step if p == path else leaf, arrays)
        return float(np.sum(weights * in_numpy(model)(moved, images.astype(np.float64), train)))

    rng = np.random.default_rng(3)
    for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(gradient(params))):
        direction = rng.normal(size=leaf.shape)
        step = 1e-6 * direction
        expected = (loss(path, step) - loss(path, -step)) / 2e-6
        name = jax.tree_util.keystr(path)
        assert np.vdot(leaf, direction) == pytest.approx(expected, rel=1e-3, abs=1e-4), name
        # Normalizing by the batch cancels the bias of the convolution before it.
        if not (train and name.endswith("['conv']['bias']")):
            assert np.any(leaf), name


@tiny
def test_pure_steps_train_and_move_the_running_statistics(build):
    model, _ = randomized(build, num_classes=5)
    images = random_images(4, 8, 8, 3)
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params: nnx.State, statistics: nnx.State) -> tuple[jax.Array, nnx.State, nnx.State]:
        def loss(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            model = nnx.merge(graphdef, params, statistics, copy=True)
            return jnp.mean((model(jnp.asarray(images)) - 1) ** 2), nnx.state(model, nnx.BatchStat)

        (value, moved), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients), moved

    first, params, once = step(params, statistics)
    second, params, twice = step(params, once)
    assert second < first
    for pair in [(statistics, once), (once, twice)]:
        for old, new in zip(*map(jax.tree.leaves, pair), strict=True):
            assert not np.allclose(old, new)


@tiny
def test_only_training_mixes_the_images_of_a_batch(build):
    model, _ = randomized(build, num_classes=5)
    images = random_images(4, 16, 16, 3)
    others_changed = np.concatenate([images[:1], 2 * images[1:]])

    def first_logits() -> list[np.ndarray]:
        apply, state = pure(model)
        return [apply(state, batch)[0][0] for batch in (images, others_changed)]

    model.eval()
    before, after = first_logits()
    np.testing.assert_array_equal(before, after)
    model.train()
    before, after = first_logits()
    assert not np.allclose(before, after, rtol=0.01)


@tiny
def test_bfloat16_is_close_to_float32(build):
    images = random_images(8, 16, 16, 3)
    logits = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model, _ = randomized(build, num_classes=5, dtype=dtype)
        apply, state = pure(model)
        logits.append(apply(state, images)[0])
    exact, rounded = logits
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.03


def test_bfloat16_batch_statistics_are_computed_in_float32():
    model, arrays = randomized(vgg_tiny, num_classes=5, dtype=jnp.bfloat16)
    norm, expected = model.stages[0][0].norm, arrays["stages"][0][0]["norm"]
    x = jnp.asarray(random_images(8, 32, 32, 4), jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    numpy_models.batch_norm(expected, np.asarray(x, np.float64), train=True)
    np.testing.assert_allclose(norm.mean[...], expected["mean"], rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], expected["var"], rtol=1e-5)
