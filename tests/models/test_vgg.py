import jax.numpy as jnp
import pytest
from flax import nnx

from models import vgg_tiny


def test_image_smaller_than_the_pools_is_an_error():
    model = nnx.eval_shape(lambda: vgg_tiny(num_classes=10, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"at least 4x4 pixels, got 8x3.*Enlarge"):
        model(jnp.ones((2, 8, 3, 3)))
