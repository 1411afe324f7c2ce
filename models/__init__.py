"""The convolutional networks of the paper's experiments, in Flax NNX."""

from collections.abc import Callable

from models.resnet import ResNet, resnet8, resnet20, resnet56, resnet110
from models.vgg import VGG, vgg16_bn, vgg_tiny

# What `train.py` offers by name.
MODELS: dict[str, Callable[..., ResNet | VGG]] = {
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg16_bn": vgg16_bn,
}

__all__ = [
    "MODELS",
    "VGG",
    "ResNet",
    "resnet8",
    "resnet20",
    "resnet56",
    "resnet110",
    "vgg16_bn",
    "vgg_tiny",
]
