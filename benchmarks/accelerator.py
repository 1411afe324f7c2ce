"""How fast the accelerator of this machine trains, and whether it does what it should.

    python -m benchmarks.accelerator --output accelerator.json

Neither a network nor a data set is needed: images are random, in the shapes of CIFAR-100. It has
not been seen to its end on a GPU yet. There most of its time goes into compiling, more than half a
minute a program on an H200, as XLA tries out kernels; what is compiled is kept, and a second run
finds it. A CPU does less of the same, to try it. The tables can be pasted into
`benchmarks/README.md`.

- *images/s*, *ms*: of training steps that follow each other, as in a run.
- *host ms*: how long the host takes to hand over a step while the device has nothing to do.
- *update*: what a step takes longer with a method than with the optimizer alone, interleaved.
- *epoch*: all steps of an epoch of CIFAR-100, and its evaluation.
- *resume*: whether steps after a checkpoint that was read back are those that were taken before, to
  the bit.
- *compiled*: whether the program compiled here consists of what `make accelerators` counted in it.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.accelerators import compilers, counts, programs
from models import MODELS
from training import cpu, data, devices
from training.checkpoints import Checkpoints, digest
from training.compiled import keep_compiled
from training.config import recipe
from training.program import Program, TrainState

METHODS = ("none", "autoscale", "clip", "zscore")
ACCELERATORS = Path(__file__).with_name("accelerators.json")


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
        self.batch_size = batch_size
        self.program = Program(experiment, dataset, devices.make_mesh())
        self.train_data = self.program.put(dataset.train_images, dataset.train_labels)
        self.test_data = self.program.put(dataset.test_images, dataset.test_labels)
        self.state = self.program.first_state()
        self.order = self.program.epoch_order(np.int32(1))
        for _ in range(2):  # compiles, and fills the caches
            self.step()
        self.wait()

    def step(self) -> None:
        """Hands a step to the devices."""
        self.state, _ = self.program.train_step(self.state, self.train_data, self.order)

    def wait(self) -> None:
        """Waits until the devices have done all steps."""
        jax.block_until_ready(self.state)

    def milliseconds(self, steps: int) -> float:
        """How long each of some steps takes."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        return 1000 * (time.perf_counter() - start) / steps

    def host_milliseconds(self, steps: int) -> float:
        """How long the host takes to hand over a step; the median of some."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
            self.wait()
        return 1000 * statistics.median(seconds)


def speed(
    models: Sequence[str], precisions: Sequence[str], batch_size: int, steps: int
) -> list[dict[str, Any]]:
    """Images per second and host time of each model in each precision."""
    rows = []
    for model in models:
        for precision in precisions:
            training = Training(batch_size, model=model, precision=precision)
            times = [training.milliseconds(steps) for _ in range(5)]
            low, median, high = np.percentile(times, [25, 50, 75])
            rows.append(
                {
                    "model": model,
                    "precision": precision,
                    "images/s": round(1000 * batch_size / median),
                    "ms": f"{median:.2f} ({low:.2f} to {high:.2f})",
                    "host ms": round(training.host_milliseconds(steps), 3),
                }
            )
    return rows


def update(
    methods: Sequence[str], model: str, batch_size: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """What the methods add to a training step, interleaved; the first one is compared with."""
    trainings = {method: Training(batch_size, model=model, method=method) for method in methods}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method, training in trainings.items():
            times[method].append(training.milliseconds(steps))
    base = np.array(times[methods[0]])
    rows = []
    for method in methods:
        ratios = np.array(times[method]) / base
        low, median, high = np.percentile(ratios, [25, 50, 75])
        rows.append(
            {
                "model": model,
                "method": method,
                "ms": round(statistics.median(times[method]), 3),
                "ratio": f"{median:.3f} ({low:.3f} to {high:.3f})",
            }
        )
    return rows


def epoch(model: str, batch_size: int, steps: int | None) -> list[dict[str, Any]]:
    """An epoch and its evaluation, in seconds; of its first `steps` steps if that is given."""
    training = Training(batch_size, model=model)
    training.program.evaluate(training.state, training.test_data)  # compiles
    steps = steps or training.program.steps_per_epoch
    start = time.perf_counter()
    training.milliseconds(steps)
    trained = time.perf_counter()
    training.program.evaluate(training.state, training.test_data)
    return [
        {
            "model": model,
            "steps": steps,
            "training s": round(trained - start, 2),
            "evaluation s": round(time.perf_counter() - trained, 2),
        }
    ]


def resume(model: str, batch_size: int, steps: int) -> list[dict[str, Any]]:
    """Whether the same steps, taken from a checkpoint again, end in the same state."""
    training = Training(batch_size, model=model)

    def go_on() -> TrainState:
        for _ in range(steps):
            training.step()
        return training.state

    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(Path(folder, "run", "checkpoints"), print) as checkpoints,
    ):
        checkpoints.save(int(training.state.step), training.state)
        checkpoints.wait()
        expected = int(digest(go_on()))
        restored = checkpoints.restore(training.program.first_state())
        assert restored is not None
        training.state = restored
        found = int(digest(go_on()))
    return [{"model": model, "steps": steps, "equal to the bit": found == expected}]


def compiled(models: Sequence[str], precisions: Sequence[str]) -> list[dict[str, Any]]:
    """What the training steps compiled here have of what was counted for the target, in words."""
    device = jax.devices()[0]
    # The processor of an H200 is that of an H100; its memory is larger and faster.
    target = "h100" if any(name in device.device_kind for name in ("H100", "H200")) else None
    if target is None or not ACCELERATORS.exists():
        return [{"compiled": f"no counts for {device.device_kind}"}]
    known = json.loads(ACCELERATORS.read_text())["programs"]
    rows = []
    for model in models:
        for precision in precisions:
            case = programs.Case(target, precision, "train", model, "replicated")
            if case.name not in known:
                continue
            lowered = compilers.lower(programs.trace(case, devices.make_mesh()), target)
            found = dataclasses.asdict(counts.count(compilers.compile(lowered, target)))
            differences = [
                f"{name} {value:,} here, {known[case.name][name]:,} there"
                for name, value in found.items()
                if value != known[case.name][name]
            ]
            rows.append(
                {
                    "model": model,
                    "precision": precision,
                    "compiled": "; ".join(differences) or "the same",
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(output: Path | None = None) -> None:
    """Measures the accelerator of this machine.

    Args:
      output: a JSON file for the same numbers.
    """
    cpu.use_cores(256)
    cpu.keep_memory()
    keep_compiled()
    device = jax.devices()[0]
    everything = device.platform != "cpu"
    models = tuple(MODELS) if everything else ("resnet20",)
    precisions = ("float32", "bfloat16") if everything else ("float32",)
    batch_size, steps, rounds = (256, 100, 11) if everything else (16, 2, 3)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "speed": lambda: speed(models, precisions, batch_size, steps),
        "update": lambda: update(METHODS, "resnet20", batch_size, steps, rounds),
        "epoch": lambda: epoch("resnet20", batch_size, None if everything else steps),
        "resume": lambda: resume("resnet20", batch_size, steps),
        "compiled": lambda: compiled(models, precisions),
    }
    results: dict[str, Any] = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "batch_size": batch_size,
    }
    print(
        f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}, batch {batch_size}, "
        f"groups of {steps} steps\n"
    )
    begin = time.perf_counter()
    for name, part in parts.items():
        print(f"{name} ({time.perf_counter() - begin:.0f} s so far) ...", file=sys.stderr)
        results[name] = part()
        print(table(results[name]), end="\n\n", flush=True)
        if output is not None:  # after each part, lest a later one fails
            output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
