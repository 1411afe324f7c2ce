import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import resnet8, vgg_tiny
from models.cpu import materialized, materialized_gradient
from models.layers import ConvNorm


def gradients(make):
    """The logits, the gradients and the running statistics of a training step."""
    model = make(num_classes=5, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))

    def loss_fn(model):
        logits = model(images)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    return jax.tree.leaves((logits, grads, nnx.state(model, nnx.BatchStat)))


@pytest.mark.parametrize("make", [resnet8, vgg_tiny])
def test_a_step_equals_that_of_plain_flax(make, monkeypatch):
    ours = gradients(make)
    monkeypatch.setattr(ConvNorm, "__call__", lambda self, x: self.norm(self.conv(x)))
    monkeypatch.setattr("models.layers.BatchNorm", nnx.BatchNorm)
    plain = gradients(make)
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("function", [materialized, materialized_gradient])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradient_pass_unchanged(function, dtype):
    x = jnp.arange(6, dtype=dtype).reshape(2, 3)
    value, vjp = jax.vjp(lambda x: function(x, jnp.ones(3)), x)
    np.testing.assert_array_equal(value, x)
    (grad,) = vjp(2 * x)
    np.testing.assert_array_equal(grad, 2 * x)
    assert value.dtype == grad.dtype == dtype


@pytest.mark.parametrize("function", [materialized, materialized_gradient])
@pytest.mark.parametrize(("platform", "copies"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_other_devices_compute_nothing(function, platform, copies):
    @jax.jit
    def value_and_gradient(x, witness, cotangent):
        value, vjp = jax.vjp(lambda x: function(x, witness), x)
        return value, vjp(cotangent)

    x = jnp.ones((2, 3))
    text = value_and_gradient.trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.compare" in text or "stablehlo.multiply" in text) == copies
