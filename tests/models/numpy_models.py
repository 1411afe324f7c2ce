"""The models in NumPy and float64, written from the papers, as a reference for `models`."""

from typing import Any

import numpy as np

Params = dict[Any, Any]


def conv(params: Params, x: np.ndarray, stride: int) -> np.ndarray:
    kernel = params["kernel"]
    size = len(kernel)
    edge = size // 2
    x = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    rows, columns = x.shape[1] - size + 1, x.shape[2] - size + 1
    y = params.get("bias", 0.0)
    for i in range(size):
        for j in range(size):
            y = y + x[:, i : i + rows : stride, j : j + columns : stride] @ kernel[i, j]
    return y


def batch_norm(params: Params, x: np.ndarray, train: bool) -> np.ndarray:
    """Updates the running statistics in `params` when training."""
    mean, var = params["mean"], params["var"]
    if train:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        params["mean"] = 0.9 * params["mean"] + 0.1 * mean
        params["var"] = 0.9 * params["var"] + 0.1 * var
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def conv_norm(params: Params, x: np.ndarray, train: bool, stride: int = 1) -> np.ndarray:
    x = conv(params["conv"], x, stride)
    return batch_norm(params["norm"], x, train) if "norm" in params else x


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def max_pool(x: np.ndarray) -> np.ndarray:
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def classify(params: Params, x: np.ndarray) -> np.ndarray:
    return x.mean((1, 2)) @ params["kernel"] + params["bias"]


def block(params: Params, x: np.ndarray, train: bool, stride: int) -> np.ndarray:
    y = relu(conv_norm(params["first"], x, train, stride))
    y = conv_norm(params["second"], y, train)
    if "shortcut" in params:
        return relu(y + conv_norm(params["shortcut"], x, train, stride))
    shortcut = np.zeros_like(y)
    before = (y.shape[-1] - x.shape[-1]) // 2
    shortcut[..., before : before + x.shape[-1]] = x[:, ::stride, ::stride]
    return relu(y + shortcut)


def resnet(params: Params, images: np.ndarray, train: bool) -> np.ndarray:
    x = relu(conv_norm(params["stem"], images, train))
    for stage, blocks in params["stages"].items():
        for index, block_params in blocks.items():
            x = block(block_params, x, train, stride=2 if stage > 0 and index == 0 else 1)
    return classify(params["classifier"], x)


def vgg(params: Params, images: np.ndarray, train: bool) -> np.ndarray:
    x = images
    for stage, convs in params["stages"].items():
        if stage > 0:
            x = max_pool(x)
        for conv_params in convs.values():
            x = relu(conv_norm(conv_params, x, train))
    return classify(params["classifier"], x)
