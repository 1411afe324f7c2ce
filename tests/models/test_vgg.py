"""VGG: max-pools and initial values."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import VGG, vgg_tiny


def test_image_smaller_than_the_pools_is_an_error():
    model = nnx.eval_shape(lambda: vgg_tiny(num_classes=10, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"at least 4x4 pixels, got 8x3.*Enlarge"):
        model(jnp.ones((2, 8, 3, 3)))


def test_kernels_start_kaiming_normal_by_fan_out():
    model = VGG(stages=((64, 128),), num_classes=100, rngs=nnx.Rngs(0))
    scores = []
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "kernel":
            expected = 0.01 if "classifier" in path else math.sqrt(2 / (9 * leaf.shape[-1]))
            deviation = 5 * expected / math.sqrt(2 * leaf.size)
            assert np.std(leaf[...]) == pytest.approx(expected, abs=deviation), path
            scores.append(np.ravel(leaf[...]) / expected)
        else:
            assert jnp.all(leaf[...] == (path[-1] == "scale")), path
    # A truncated normal distribution would have no entry as far out as these.
    assert np.mean(np.abs(np.concatenate(scores)) > 3) == pytest.approx(0.0027, abs=1e-3)
