"""ResNets: shortcuts and initial values."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import resnet8


def test_wrong_shortcut_is_an_error():
    with pytest.raises(ValueError, match=r"must be 'identity' or 'projection', got 'convolution'"):
        resnet8(shortcut="convolution", num_classes=10, rngs=nnx.Rngs(0))  # pyright: ignore


def test_kernels_start_kaiming_normal():
    model = resnet8(widths=(32, 32), num_classes=100, shortcut="projection", rngs=nnx.Rngs(0))
    scores = []
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "kernel":
            expected = math.sqrt(2 / math.prod(leaf.shape[:-1]))
            deviation = 5 * expected / math.sqrt(2 * leaf.size)
            assert np.std(leaf[...]) == pytest.approx(expected, abs=deviation), path
            scores.append(np.ravel(leaf[...]) / expected)
        else:
            assert jnp.all(leaf[...] == (path[-1] == "scale")), path
    # A truncated normal distribution would have no entry as far out as these.
    assert np.mean(np.abs(np.concatenate(scores)) > 3) == pytest.approx(0.0027, abs=1e-3)
