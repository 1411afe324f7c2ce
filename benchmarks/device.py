"""How fast the accelerator of this machine trains, and where its time goes.

    python -m benchmarks.device
    python -m benchmarks.device --models resnet20 --batch-size 16 --steps 2 --repeats 2  # on a CPU

No data set is needed: images are random, in the shapes of CIFAR-100. Run it alone on the device.
Most of the time goes into compiling, on an H200 more than half a minute for each program; compiled
programs are kept for the next time. It has not run on a GPU yet. The columns are:

- *images/s*, *ms a step*: of steps that follow each other, as in a run, with quartiles in brackets.
- *host ms*: how long the host takes to hand over a step while the device is idle.
- *kernels a step*, *idle*: from a profile, how many kernels (and copies) the device ran, and the
  share of the time in which it ran none.
- *ratio*: the time of a step with a method to that with the optimizer alone, interleaved.
"""

import dataclasses
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.timing import interleaved, milliseconds, table
from training import data, devices
from training.options import recipe
from training.step import Program

METHODS = ("none", "autoscale")
Kernel = tuple[str, float, float]  # its name, start and end
# Where a profile has the kernels of a device: the names of its plane and of the plane's lines.
KERNELS = {
    "gpu": ("/device:GPU:0", "Stream"),
    "tpu": ("/device:TPU:0", "XLA Ops"),
    "cpu": ("/host:CPU", "tf_XLA"),
}


class Training:
    """A program and its state on the devices of this machine.

    Args:
      batch_size: the number of images in a batch.
      changes: what differs from the recipe of CIFAR-100.
    """

    def __init__(self, batch_size: int, **changes: Any):
        print(f"compiling {', '.join(changes.values())} ...", file=sys.stderr)
        experiment = dataclasses.replace(recipe("cifar100"), batch_size=batch_size, **changes)
        dataset = data.random_dataset("cifar100")
        self.program = Program(experiment, dataset, devices.make_mesh())
        self.data = self.program.put(dataset.train_images, dataset.train_labels)
        self.order = self.program.epoch_order(np.int32(1))
        self.state = self.program.first_state()
        self.run(2)

    def step(self) -> None:
        """Hands a step to the devices."""
        self.state, _ = self.program.train_step(self.state, self.data, self.order)

    def run(self, steps: int) -> None:
        """Takes some steps, and waits for the last."""
        for _ in range(steps):
            self.step()
        jax.block_until_ready(self.state)

    def host_seconds(self, steps: int) -> list[float]:
        """How long the host took to hand over each of some steps."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
            jax.block_until_ready(self.state)
        return seconds

    def profile(self, steps: int) -> list[Kernel]:
        """The kernels that the first device runs in some steps."""
        plane_name, line_name = KERNELS[jax.default_backend()]
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down the host
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                self.run(steps)
            (path,) = Path(folder).rglob("*.xplane.pb")
            planes = jax.profiler.ProfileData.from_file(str(path)).planes
            return [
                (event.name, event.start_ns, event.start_ns + event.duration_ns)
                for plane in planes
                for line in plane.lines
                if plane.name == plane_name and line.name.startswith(line_name)
                for event in line.events
                if event.duration_ns
            ]

    def is_deterministic(self, steps: int) -> bool:
        """Whether the same steps, taken twice, end in the same state to the bit."""
        first, ends = self.state, []
        for _ in range(2):
            self.state = first
            self.run(steps)
            ends.append(jax.device_get(self.state))
        return all(map(np.array_equal, *map(jax.tree.leaves, ends)))


def idle(kernels: Iterable[Kernel]) -> float:
    """The share of the time from the first start to the last end in which no kernel ran."""
    spans = sorted((start, end) for _, start, end in kernels)
    busy, latest = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(end - max(start, latest), 0)
        latest = max(end, latest)
    return 1 - busy / (latest - spans[0][0])


def largest(kernels: Iterable[Kernel], number: int = 5) -> list[dict[str, Any]]:
    """The kernels that took the most time together, by name."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, start, end in kernels:
        times[name].append(end - start)
    total = sum(map(sum, times.values()))
    names = sorted(times, key=lambda name: -sum(times[name]))[:number]
    return [
        {"kernel": name, "share": f"{sum(times[name]) / total:.1%}", "runs": len(times[name])}
        for name in names
    ]


def main(
    models: tuple[str, ...] = ("resnet20", "resnet56"),
    precisions: tuple[str, ...] = ("float32", "bfloat16"),
    batch_size: int = 256,
    steps: int = 100,
    repeats: int = 7,
) -> None:
    """Measures the accelerator of this machine.

    Args:
      models: the networks.
      precisions: each network is measured in each.
      batch_size: the number of images in a batch, on all devices together.
      steps: how many are timed at once.
      repeats: how many times they are.
    """
    devices.prepare(batch_size)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"batch {batch_size}, n = {repeats} x {steps} steps")
    for model in models:
        for precision in precisions:
            training = Training(batch_size, model=model, precision=precision)
            times = interleaved({"": lambda it=training: it.run(steps)}, repeats)[""][:, 0] / steps
            kernels = training.profile(steps)
            row = {
                "model": f"{model}, {precision}",
                "images/s": round(batch_size / float(np.median(times))),
                "ms a step": milliseconds(times),
                "host ms": milliseconds(np.array(training.host_seconds(steps))),
                "kernels a step": round(len(kernels) / steps),
                "idle": f"{idle(kernels):.1%}",
                "deterministic": training.is_deterministic(steps),
            }
            print("", table([row]), "", table(largest(kernels)), sep="\n", flush=True)

    methods = {name: Training(batch_size, model=models[0], method=name) for name in METHODS}
    calls = {name: lambda it=it: it.run(steps) for name, it in methods.items()}
    times = {name: seconds[:, 0] / steps for name, seconds in interleaved(calls, repeats).items()}
    rows = [
        {
            "method": name,
            "ms a step": milliseconds(seconds),
            "ratio": f"{np.median(seconds) / np.median(times['none']):.3f}",
        }
        for name, seconds in times.items()
    ]
    print("", table(rows), sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
