"""All models: size and cost, initial values, values in both modes, and dtypes."""

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

from models import MODELS, VGG, ResNet, resnet8, vgg_tiny

pytestmark = pytest.mark.usefixtures("compile_faster")
Model = ResNet | VGG
TINY = {
    "identity": partial(resnet8, widths=(4, 7, 7)),  # an odd number of new channels, and none
    "projection": partial(resnet8, widths=(4, 8), shortcut="projection"),
    "vgg": vgg_tiny,
    "plain": partial(vgg_tiny, batch_norm=False),
}
tiny = pytest.mark.parametrize("build", TINY.values(), ids=TINY)


def call(model: Model, images: jax.Array) -> jax.Array:
    return model(images)


def abstract(build: Callable[..., Any], **options: Any) -> Any:
    """A model without its arrays."""
    return nnx.eval_shape(lambda: build(**options, rngs=nnx.Rngs(0)))


def multiply_adds(jaxpr: Jaxpr) -> int:
    """Multiplications in the convolutions and matrix products of a computation without loops."""
    total = 0
    for equation in jaxpr.eqns:
        arrays: list[Any] = [variable.aval for variable in (*equation.outvars, *equation.invars)]
        inner = jax.tree.leaves(equation.params)
        if equation.primitive.name == "conv_general_dilated":
            result, _, kernel = arrays
            features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += result.size * kernel.size // features
        elif equation.primitive.name == "dot_general":
            result, left, _ = arrays
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += result.size * math.prod(left.shape[axis] for axis in contracted)
        elif equation.primitive.name == "cond":  # the same computation for several platforms
            inner = equation.params["branches"][-1:]  # what is not written for one platform
        programs = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in inner]
        total += sum(multiply_adds(program) for program in programs if isinstance(program, Jaxpr))
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


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(0.5, 1, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "options", "parameters", "eligible", "tensors", "cost"),
    [
        ("resnet20", {}, 275_572, 274_096, 20, 40.557e6),
        ("resnet56", {}, 858_868, 854_704, 56, 125.491e6),
        ("resnet20", {"shortcut": "projection"}, 278_324, 276_656, 22, 40.819e6),
        ("resnet56", {"shortcut": "projection"}, 861_620, 857_264, 58, 125.754e6),
        ("vgg7", {}, 299_908, 299_360, 7, 38.646e6),
        ("vgg16_bn", {}, 14_774_436, 14_761_664, 14, 313.248e6),
    ],
)
def test_size_and_cost(
    name: str, options: dict[str, str], parameters: int, eligible: int, tensors: int, cost: float
):
    model = abstract(MODELS[name].make, num_classes=100, **options)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == parameters
    matrices = [leaf for leaf in leaves if leaf.ndim > 1]
    assert (sum(leaf.size for leaf in matrices), len(matrices)) == (eligible, tensors)
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, images)
    assert multiply_adds(program.jaxpr) == pytest.approx(cost, abs=500)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_logits_are_float32_whatever_the_images_and_the_dtype(name):
    model = abstract(MODELS[name].make, num_classes=10, channels=1, dtype=jnp.bfloat16)
    logits = nnx.eval_shape(call, model, jax.ShapeDtypeStruct((5, 16, 16, 1), jnp.float32))
    assert (logits.shape, logits.dtype) == ((5, 10), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@tiny
def test_values_and_running_statistics_match_numpy(build, train):
    model, arrays = randomized(build, num_classes=5, channels=2)
    model.train() if train else model.eval()
    images = random_images(3, 15, 18, 2)
    logits = nnx.jit(call)(model, jnp.asarray(images))
    in_numpy = numpy_models.vgg if isinstance(model, VGG) else numpy_models.resnet
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(logits, in_numpy(arrays, images.astype(np.float64), train))
    jax.tree.map(close, to_float64(nnx.state(model)), arrays)


@tiny
def test_bfloat16_is_close_to_float32_and_its_statistics_are_float32(build):
    images, results = random_images(8, 16, 16, 3), []
    for dtype in (jnp.float32, jnp.bfloat16):
        model, _ = randomized(build, num_classes=5, dtype=dtype)
        results.append(nnx.jit(call)(model, jnp.asarray(images)))
    exact, rounded = results
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.03

    norm = next((m for _, m in nnx.iter_graph(model) if isinstance(m, nnx.BatchNorm)), None)
    if norm is None:
        return
    expected = to_float64(nnx.state(norm))
    x = jnp.asarray(random_images(8, 32, 32, norm.num_features), jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    numpy_models.batch_norm(expected, np.asarray(x, np.float64), train=True)
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(norm, name)[...], expected[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "features"),
    [
        (partial(resnet8, widths=(32, 32), shortcut="projection"), lambda shape: shape[:-1]),
        (partial(VGG, stages=((64, 128),)), lambda shape: (*shape[:-2], shape[-1])),
    ],
    ids=["by fan-in", "by fan-out"],
)
def test_kernels_start_kaiming_normal(build, features):
    model, scores = build(num_classes=100, rngs=nnx.Rngs(0)), []
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "kernel":
            expected = math.sqrt(2 / math.prod(features(leaf.shape)))
            if isinstance(model, VGG) and "classifier" in path:
                expected = 0.01
            deviation = 5 * expected / math.sqrt(2 * leaf.size)
            assert np.std(leaf[...]) == pytest.approx(expected, abs=deviation), path
            scores.append(np.ravel(leaf[...]) / expected)
        else:
            assert jnp.all(leaf[...] == (path[-1] == "scale")), path
    # A truncated normal distribution would have no entry as far out as these.
    assert np.mean(np.abs(np.concatenate(scores)) > 3) == pytest.approx(0.0027, abs=1e-3)
