import pytest
from flax import nnx

from models import resnet8


def test_wrong_shortcut_is_an_error():
    with pytest.raises(ValueError, match=r"must be 'identity' or 'projection', got 'convolution'"):
        resnet8(shortcut="convolution", num_classes=10, rngs=nnx.Rngs(0))  # pyright: ignore
