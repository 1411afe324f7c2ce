"""Images per second of our training step and of PyTorch's, and where our time goes.

    python -m benchmarks.throughput

PyTorch is measured where it is installed: `pip install -e . --group benchmark`. Its step has no
augmentation and finds its batch in place; ours includes all of that.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, cast

import jax
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, Mesh

from benchmarks.timing import interleaved, milliseconds, table
from training import devices
from training.data import random_dataset
from training.optimizers import METHODS, make_optimizer
from training.options import recipe
from training.step import Program

ModelName = Literal["resnet20", "resnet56"]
Calls = dict[str, Callable[[], Any]]  # each returns when its work is done


def our_step(model: ModelName, batch_size: int, num_devices: int) -> Calls:
    """The whole step, and on one device its parts, compiled on their own."""
    experiment = dataclasses.replace(recipe("cifar100"), model=model, batch_size=batch_size)
    dataset = random_dataset("cifar100", 4096)
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",), axis_types=(AxisType.Auto,))
    program = Program(experiment, dataset, mesh)
    data = program.put(dataset.train_images, dataset.train_labels)
    state, order = program.first_state(), program.epoch_order(np.int32(1))

    def step() -> None:
        nonlocal state
        state, measured = program.train_step(state, data, order)
        jax.block_until_ready((state, measured))

    if num_devices > 1:
        return {f"ours, {num_devices} devices": step}

    method = METHODS["autoscale"].make()
    optimizer = make_optimizer("none", "adamw", 1e-3, 5e-5)

    @jax.jit
    def optimize(grads: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    batch = jax.jit(program.batch)
    gradients = jax.jit(jax.value_and_grad(program.loss, has_aux=True))
    params, batch_stats = state.params, state.batch_stats
    x, y = batch(state, data, order)
    grads = gradients(params, batch_stats, x, y)[1]
    parts = {
        "its data": partial(batch, state, data, order),
        "its forward and backward": partial(gradients, params, batch_stats, x, y),
        "its transformation": partial(jax.jit(method.update), grads, method.init(params), params),
        "its optimizer": partial(optimize, grads, optimizer.init(params), params),
    }
    return {
        "ours, 1 device": step,
        **{name: lambda part=part: jax.block_until_ready(part()) for name, part in parts.items()},
    }


def torch_step(name: ModelName, batch_size: int) -> Calls:
    """The step of the same network in PyTorch, without augmentation."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int):
            super().__init__()
            self.stride, self.pad = stride, (after - before) // 2
            self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.norms = nn.ModuleList([nn.BatchNorm2d(after), nn.BatchNorm2d(after)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
            if self.stride > 1 or self.pad:
                x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
            return F.relu(y + x)

    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for after in (16, 32, 64):
        for index in range({"resnet20": 3, "resnet56": 9}[name]):
            layers.append(Block(before, after, 2 if index == 0 and after > 16 else 1))
            before = after
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 100)]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(*layers).to(device)
    model = cast(Any, model).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=5e-5)
    x = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(100, (batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return {f"PyTorch {torch.__version__}": step}


def main(model: ModelName = "resnet20", batch_size: int = 256, repeats: int = 11) -> None:
    """Measures the training step on random images of CIFAR's size.

    Args:
      model: the network.
      batch_size: images in a step.
      repeats: timed steps of each kind, interleaved.
    """
    cores = len(os.sched_getaffinity(0))
    devices.prepare(batch_size)  # keeps PyTorch's memory as well
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {cores} cores, n = {repeats}\n")
    calls = our_step(model, batch_size, 1)
    if jax.local_device_count() > 1:
        calls |= our_step(model, batch_size, jax.local_device_count())
    if find_spec("torch") is not None:
        calls |= torch_step(model, batch_size)
    rows = [
        {
            f"{model}, batch {batch_size}": name,
            "ms": milliseconds(times[:, 0]),
            "CPU ms": round(1e3 * float(np.median(times[:, 1])), 1),
            "images/s": round(batch_size / float(np.median(times[:, 0])))
            if "its" not in name
            else "",
        }
        for name, times in interleaved(calls, repeats).items()
    ]
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
