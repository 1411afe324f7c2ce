"""The paper's convolutional networks and a Vision Transformer, in Flax NNX."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

from models.resnet import ResNet, resnet8, resnet20, resnet56, resnet110
from models.vgg import VGG, vgg7, vgg16_bn, vgg_tiny
from models.vit import ViT, vit, vit_tiny


class ModelSpec(NamedTuple):
    """A model that `train.py` offers by name."""

    make: Callable[..., nnx.Module]  # of `num_classes`, `channels`, `dtype` and `rngs`
    label: str  # in titles, tables and figures
    description: str  # in `train.py --list`
    multiply_adds: float  # of a 32x32 image, in millions: the relative cost of a run


MODELS = {
    "resnet20": ModelSpec(
        resnet20, "ResNet-20", "residual network of 20 layers with parameter-free shortcuts", 40.6
    ),
    "resnet56": ModelSpec(
        resnet56, "ResNet-56", "residual network of 56 layers with parameter-free shortcuts", 125.5
    ),
    "vgg7": ModelSpec(vgg7, "VGG-7", "plain network of 6 convolutions without normalization", 38.6),
    "vgg16_bn": ModelSpec(
        vgg16_bn, "VGG-16-BN", "plain network of 13 convolutions with batch normalization", 313.2
    ),
    "vit": ModelSpec(vit, "ViT", "Vision Transformer of 6 blocks on patches of 4x4 pixels", 178.0),
}

__all__ = [
    "MODELS",
    "VGG",
    "ModelSpec",
    "ResNet",
    "ViT",
    "resnet8",
    "resnet20",
    "resnet56",
    "resnet110",
    "vgg7",
    "vgg16_bn",
    "vgg_tiny",
    "vit",
    "vit_tiny",
]
