import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models import resnet8, vgg_tiny
from models.layers import conv_general_dilated


def normal(rng, shape, dtype=np.float32):
    """Random numbers from NumPy: JAX would compile for up to a second for each shape."""
    return jnp.asarray(rng.standard_normal(shape), dtype)


def gradients(make):
    """The logits, the gradients and the running statistics of a training step."""
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: make(num_classes=5, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda leaf: normal(rng, leaf.shape), nnx.state(model)))
    images = normal(rng, (16, 8, 8, 3))

    def loss_fn(model):
        logits = model(images)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), grads = nnx.jit(nnx.value_and_grad(loss_fn, has_aux=True))(model)
    return jax.tree.leaves((logits, grads, nnx.state(model, nnx.BatchStat)))


@pytest.mark.usefixtures("compile_faster")
@pytest.mark.parametrize(
    "make", [resnet8, partial(resnet8, widths=(4, 8), shortcut="projection"), vgg_tiny]
)
def test_a_step_equals_that_of_plain_flax(make, monkeypatch):
    ours = gradients(make)
    monkeypatch.setattr("models.layers.conv_general_dilated", jax.lax.conv_general_dilated)
    monkeypatch.setattr("models.layers.BatchNorm", nnx.BatchNorm)
    plain = gradients(make)
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.usefixtures("compile_faster")
@pytest.mark.parametrize(
    ("pixels", "stride", "size", "dtype"),
    [
        ((1, 1), 1, 1, jnp.float32),
        ((1, 1), 2, 3, jnp.bfloat16),
        ((2, 2), 1, 3, jnp.float32),
        ((2, 2), 1, 3, jnp.bfloat16),
        ((2, 2), 2, 3, jnp.float32),
        ((1, 2), 1, 3, jnp.float32),
        ((5, 4), 1, 3, jnp.float32),
        ((5, 4), 1, 3, jnp.bfloat16),
        ((5, 4), 2, 3, jnp.float32),
        ((4, 5), 1, 3, jnp.float32),
        ((4, 6), 1, 5, jnp.float32),
    ],
)
def test_convolution_equals_that_of_lax(pixels, stride, size, dtype):
    rng = np.random.default_rng(0)
    x = normal(rng, (3, *pixels, 4), dtype)
    kernel = normal(rng, (size, size, 4, 5), dtype)
    grad = normal(rng, (3, *(-(-pixel // stride) for pixel in pixels), 5), dtype)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, x, kernel, grad):
        y, vjp = jax.vjp(lambda x, kernel: convolve(function, x, kernel, stride), x, kernel)
        return y, *vjp(grad)

    ours = value_and_gradients(conv_general_dilated, x, kernel, grad)
    plain = value_and_gradients(jax.lax.conv_general_dilated, x, kernel, grad)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype == dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * jnp.finfo(dtype).eps * np.abs(b).max())


@pytest.mark.parametrize("devices", [2, 8])
def test_gradients_of_a_split_batch_are_not_gathered(devices):
    rng = np.random.default_rng(0)
    x, kernel = normal(rng, (8, 6, 4, 4)), normal(rng, (3, 3, 4, 5))
    grad = normal(rng, (8, 6, 4, 5))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    split, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def gradients(function, x, kernel, grad):
        return jax.vjp(partial(convolve, function, stride=1), x, kernel)[1](grad)

    placed = jax.device_put((x, kernel, grad), (split, everywhere, split))
    compiled = jax.jit(partial(gradients, conv_general_dilated)).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    with jax.enable_x64(True):
        exact = gradients(
            jax.lax.conv_general_dilated, *(np.asarray(a, np.float64) for a in (x, kernel, grad))
        )
    for ours, expected in zip(compiled(*placed), exact, strict=True):
        assert expected.dtype == np.float64
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def convolve(function, x, kernel, stride):
    padding = [(kernel.shape[0] // 2,) * 2] * 2
    return function(x, kernel, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("pixels", [2, 8])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_devices_compile_the_convolution_of_lax(pixels, platform):
    x, kernel = jnp.ones((3, pixels, pixels, 4)), jnp.ones((3, 3, 4, 5))

    def operations(function, platform):
        @jax.jit
        def value_and_gradients(x, kernel):
            return jax.value_and_grad(
                lambda x, kernel: convolve(function, x, kernel, 1).sum(), argnums=(0, 1)
            )(x, kernel)

        lowered = value_and_gradients.trace(x, kernel).lower(lowering_platforms=(platform,))
        names = re.findall(r"stablehlo\.\w+", lowered.as_text())
        # The choice between platforms is made while lowering, and leaves these.
        ignored = {f"stablehlo.{name}" for name in ("case", "return", "constant")}
        return {name: names.count(name) for name in set(names) - ignored}

    assert operations(conv_general_dilated, platform) == operations(
        jax.lax.conv_general_dilated, platform
    )
    assert operations(conv_general_dilated, "cpu") != operations(conv_general_dilated, platform)
