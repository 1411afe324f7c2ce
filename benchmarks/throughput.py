"""Images per second of our training step and of PyTorch's, and where our time goes.

    python benchmarks/throughput.py             # our step, its parts and PyTorch's, interleaved
    python benchmarks/throughput.py --growth    # against batch size, depth and devices

PyTorch is measured where it is installed: `pip install -e '.[train,benchmark]'`. Its step has no
augmentation and finds its batch in place; ours includes all of that.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, Mesh

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import MODELS, resnet110
from training import cpu
from training.config import recipe
from training.data import Dataset, random_dataset
from training.optimizers import METHODS, make_optimizer
from training.program import Program

NUM_IMAGES = 4096
MODELS["resnet110"] = MODELS["resnet56"]._replace(make=resnet110)  # for --growth
BLOCKS = {"resnet20": 3, "resnet56": 9, "resnet110": 18}
VGG16 = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the training step on random images of CIFAR's size."""

    model: str = "resnet20"
    """resnet20, resnet56, resnet110 or vgg16_bn."""
    batch_size: int = 256
    """Images per step."""
    repeats: int = 11
    """Timed steps of each kind, taken interleaved."""
    growth: bool = False
    """Vary batch size, depth and number of devices instead."""
    json: Path | None = None
    """File to which each line of the table is appended as JSON."""


@dataclasses.dataclass
class Case:
    """Something to time."""

    name: str
    images: int  # processed by one call
    run: Callable[[], object]  # returns when the work is done
    mebibytes: float | None = None  # the arrays of all devices, at the peak
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)


def make_program(name: str, batch_size: int, num_devices: int, data: Dataset) -> Program:
    experiment = dataclasses.replace(recipe("cifar100"), model=name, batch_size=batch_size)
    devices = np.array(jax.devices()[:num_devices])
    return Program(experiment, data, Mesh(devices, ("data",), axis_types=(AxisType.Auto,)))


def our_step(name: str, batch_size: int, num_devices: int, data: Dataset) -> Case:
    program = make_program(name, batch_size, num_devices, data)
    train_data = program.put(data.train_images, data.train_labels)
    test_data = program.put(data.test_images, data.test_labels)
    state, order = program.first_state(), program.epoch_order(np.int32(1))
    program.compile(state, train_data, test_data)

    def run() -> None:
        nonlocal state
        state, measured = program.train_step(state, train_data, order)
        jax.block_until_ready((state, measured))

    memory = program.train_functions[False].memory_analysis()
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    size += memory.output_size_in_bytes - memory.alias_size_in_bytes
    devices_text = f"{num_devices} device" + "s" * (num_devices > 1)
    name = f"{name}, batch {batch_size}, {devices_text}"
    return Case(name, batch_size, run, size * num_devices / 2**20)


def parts(name: str, batch_size: int, data: Dataset) -> list[Case]:
    """The step in pieces, on one device; XLA fuses across them when it compiles them together."""
    program = make_program(name, batch_size, 1, data)
    train_data = program.put(data.train_images, data.train_labels)
    state, order = program.first_state(), program.epoch_order(np.int32(1))
    params = state.params
    method = METHODS["autoscale"].make()
    optimizer = make_optimizer("none", "adamw", 1e-3, 5e-5)

    @jax.jit
    def optimize(grads: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    batch = jax.jit(program.batch)
    gradients = jax.jit(jax.value_and_grad(program.loss, has_aux=True))
    transform = jax.jit(method.update)
    x, y = batch(state, train_data, order)
    grads = gradients(params, state.batch_stats, x, y)[1]
    method_state, optimizer_state = method.init(params), optimizer.init(params)
    pieces: dict[str, Callable[[], object]] = {
        "data": lambda: batch(state, train_data, order),
        "forward and backward": lambda: gradients(params, state.batch_stats, x, y),
        "transformation": lambda: transform(grads, method_state, params),
        "optimizer": lambda: optimize(grads, optimizer_state, params),
    }
    return [
        Case(f"  of which {name}", batch_size, lambda run=run: jax.block_until_ready(run()))
        for name, run in pieces.items()
    ]


def torch_step(name: str, batch_size: int) -> Case:
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

    layers: list[nn.Module] = []
    before = 3
    if name == "vgg16_bn":
        for stage in VGG16:
            layers += [nn.MaxPool2d(2)] if layers else []
            for after in stage:
                layers += [nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
                before = after
    else:
        layers += [nn.Conv2d(before, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        before = 16
        for after in (16, 32, 64):
            for index in range(BLOCKS[name]):
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

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return Case(f"PyTorch {torch.__version__}", batch_size, run)


def measure(cases: list[Case], repeats: int) -> None:
    """Runs the cases interleaved, so that whatever else the machine does meets all of them."""
    for case in cases:
        case.run()
        case.run()
    for _ in range(repeats):
        for case in cases:
            start, cpu_start = time.perf_counter(), time.process_time()
            case.run()
            case.seconds.append(time.perf_counter() - start)
            case.cpu_seconds.append(time.process_time() - cpu_start)


def report(cases: list[Case], options: Options) -> None:
    print(f"{'':44} {'ms':>8} {'quartiles':>15} {'images/s':>9} {'CPU ms':>8} {'MiB':>7}")
    for case in cases:
        low, median, high = 1000 * np.percentile(case.seconds, [25, 50, 75])
        cpu = 1000 * float(np.median(case.cpu_seconds))
        rate = 1000 * case.images / median
        size = "" if case.mebibytes is None else f"{case.mebibytes:.0f}"
        spread = f"{low:.1f}-{high:.1f}"
        print(f"{case.name:44} {median:8.1f} {spread:>15} {rate:9.0f} {cpu:8.1f} {size:>7}")
        if options.json is not None:
            line = {
                "case": case.name.strip(),
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
                "images": case.images,
                "mebibytes": case.mebibytes,
                "seconds": case.seconds,
                "cpu_seconds": case.cpu_seconds,
            }
            with options.json.open("a") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    cpu.keep_memory()  # PyTorch's as well
    most = jax.local_device_count()
    data = random_dataset("cifar100", NUM_IMAGES)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, "
        f"{len(os.sched_getaffinity(0))} cores, n = {options.repeats}"
    )
    name, batch_size = options.model, options.batch_size
    if options.growth:
        settings = [
            *((name, size, 1) for size in (64, 128, 256)),
            *((name, size, most) for size in (64, 128, 256) if most > 1),
            *((deeper, 128, 1) for deeper in ("resnet56", "resnet110")),
        ]
        cases = [our_step(*setting, data) for setting in settings]
    else:
        cases = [our_step(name, batch_size, 1, data)]
        if most > 1:
            cases.append(our_step(name, batch_size, most, data))
        cases += parts(name, batch_size, data)
        if name not in {*BLOCKS, "vgg16_bn"}:
            print(f"{name} is not compared with PyTorch.")
        elif find_spec("torch") is None:
            print("PyTorch is not installed and was left out.")
        else:
            cases.append(torch_step(name, batch_size))
    measure(cases, options.repeats)
    report(cases, options)


if __name__ == "__main__":
    main()
