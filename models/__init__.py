"""The paper's convolutional networks and a Vision Transformer, in Flax NNX."""

from collections.abc import Callable

from models.resnet import ResNet, resnet8, resnet20, resnet56, resnet110
from models.vgg import VGG, vgg16_bn, vgg_tiny
from models.vit import ViT, vit, vit_tiny

# What `train.py` offers by name.
MODELS: dict[str, Callable[..., ResNet | VGG | ViT]] = {
    "resnet20": resnet20,
    "resnet56": resnet56,
    "vgg16_bn": vgg16_bn,
    "vit": vit,
}

__all__ = [
    "MODELS",
    "VGG",
    "ResNet",
    "ViT",
    "resnet8",
    "resnet20",
    "resnet56",
    "resnet110",
    "vgg16_bn",
    "vgg_tiny",
    "vit",
    "vit_tiny",
]
