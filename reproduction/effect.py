"""The effect of each method on AdamW's steps, measured on the gradients of the same runs.

AdamW alone trains a network with the recipe for CIFAR-100. Every method, followed by its own AdamW,
gets the gradients of that run, and `measure_effect` compares its updates with AdamW's.

    python -m reproduction.effect --data-dir ~/tensorflow_datasets
    python -m reproduction.effect --report    # tables and figures, from the records alone

A seed takes 200 steps, each with the gradients of two batches. Seeds with a record are skipped.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from matplotlib.figure import Figure

from models import MODELS
from optax_autoscale import measure_effect
from reproduction import replacing
from reproduction.figures import COLORS, common_legend, figure_of
from reproduction.records import Table
from reproduction.report import listed, markdown, short
from training import UserError, data, devices
from training.data import Dataset
from training.optimizers import METHODS, OPTIMIZERS, make_optimizer
from training.options import Experiment, ModelName, recipe
from training.record import environment
from training.signals import one_line_errors
from training.step import Arrays, Data, Program, TrainState

STEPS = 200
BURN_IN = 20  # initial steps that the medians leave out
NETWORKS = ("resnet20", "vgg7")  # with normalization and without
EXPERIMENT = dataclasses.replace(recipe("cifar100"), method="none")
COMPARED = (
    *("centering", "scaling", "autoscale", "autoscale_p1"),
    *("gradient_centralization", "gradient_normalization", "zscore", "clip"),
)
# Not methods, but AdamW on a second, independent batch at the same parameters: in every step, or
# only in the current step.
OTHER_BATCHES, OTHER_BATCH = "other_batches", "other_batch"
OTHERS = {
    OTHER_BATCHES: "AdamW, other batches in every step",
    OTHER_BATCH: "AdamW, another batch in this step",
}
KEYS = ("scale_factor", "norm_ratio", "cosine")  # of each method, from `measure_effect`
DRAWN = ("autoscale", "scaling", "centering", "zscore")


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what each method does to AdamW's steps on CIFAR-100."""

    models: tuple[ModelName, ...] = NETWORKS
    """Networks."""
    seeds: int = 3
    """Number of seeds."""
    data_dir: Path | None = None
    """Folder of TensorFlow Datasets (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    results: Path = Path("results/effect")
    """Folder of the records and the report."""
    report: bool = False
    """Only write the report, from the records alone."""


class Trajectory(NamedTuple):
    """The record of one seed."""

    description: dict[str, Any]
    global_std: np.ndarray  # of the raw gradients, s_t of the paper; shape=(steps,)
    small_entries: (
        np.ndarray | None
    )  # their share of the entries; shape=(steps,); not in the oldest
    # By step, a column for each method:
    scale_factor: Table  # a_t, of the methods that have one
    norm_ratio: Table  # of the method's update and AdamW's
    cosine: Table


def main() -> None:
    options = tyro.cli(Options)
    with one_line_errors("effect.py"):
        if not options.report:
            devices.prepare(EXPERIMENT.batch_size)
            dataset = data.load(EXPERIMENT.dataset, options.data_dir)
            for model, seed in itertools.product(options.models, range(options.seeds)):
                experiment = dataclasses.replace(EXPERIMENT, model=model, seed=seed)
                record(experiment, dataset, STEPS, options.results / f"{model}-seed{seed}.jsonl")
        write_report(options.results)


def record(experiment: Experiment, dataset: Dataset, steps: int, path: Path) -> None:
    """Writes the record of a run: one line with its description, then one for each step.

    If the file exists, this does nothing; until the record is complete, there is none.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "command": "python -m reproduction.effect",
        "config": dataclasses.asdict(experiment),
        "steps": steps,
        **environment(),
    }
    with replacing(path) as part, part.open("w") as file:
        file.write(json.dumps(description) + "\n")
        for line in measure(experiment, dataset, steps):
            file.write(json.dumps(line) + "\n")
            if line["step"] % 20 == 0:
                print(
                    f"{path}: step {line['step']} of {steps}, loss {line['loss']:.3f}", flush=True
                )


def measure(experiment: Experiment, dataset: Dataset, steps: int) -> Iterator[dict[str, Any]]:
    """Trains with the plain optimizer, and yields for each step what the methods would have done.

    Args:
      experiment: the run's configuration, with the method `none`.
      dataset: the data set to train on.
      steps: the number of steps.

    Yields:
      For each step its number from 1, the seconds so far, the loss, s_t, the share of small
      entries, and by method a_t and the norm ratio and cosine from `measure_effect`.
    """
    mesh = devices.make_mesh()
    program, everywhere = Program(experiment, dataset, mesh), devices.replicated(mesh)
    images = program.put(dataset.train_images, dataset.train_labels)
    schedule, decay = program.schedule, experiment.weight_decay
    plain = OPTIMIZERS[experiment.optimizer].make(schedule, decay)
    meters: dict[str, Any] = {
        method: make_optimizer(method, experiment.optimizer, schedule, decay, effect=True)
        for method in COMPARED
    } | {
        OTHER_BATCHES: measure_effect(on_other_batch(plain, every_step=True), plain),
        OTHER_BATCH: measure_effect(on_other_batch(plain, every_step=False), plain),
    }

    def first_effects(params: Arrays) -> dict[str, Any]:
        return {name: meter.init(params) for name, meter in meters.items()}

    def gradients(state: TrainState, data: Data, order: jax.Array) -> Arrays:
        x, y = program.batch(state, data, order)
        return jax.grad(program.loss, has_aux=True)(state.params, state.batch_stats, x, y)[0]

    @partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def compare(
        effects: Any, state: TrainState, data: Data, order: jax.Array, other_order: jax.Array
    ) -> Any:
        grads = gradients(state, data, order)
        # The second batch comes from another order of the images, with another seed for its
        # augmentation.
        others = gradients(state._replace(seed=state.seed + np.uint32(2**31)), data, other_order)
        effects = {
            name: meter.update(grads, effects[name], state.params, other_grads=others)[1]
            for name, meter in meters.items()
        }
        numbers = {
            key: {name: optax.tree.get(effect, key, None) for name, effect in effects.items()}
            for key in KEYS
        }
        return effects, small_entries(grads, state), numbers

    start = time.perf_counter()
    state = program.first_state()
    effects = jax.jit(first_effects, out_shardings=everywhere)(state.params)
    for step in range(steps):
        epoch = 1 + step // program.steps_per_epoch
        order, other_order = (
            program.epoch_order(np.int32(number)) for number in (epoch, 2**30 + epoch)
        )
        effects, small, numbers = compare(effects, state, images, order, other_order)
        state, measured = program.train_step(state, images, order)
        yield {
            "step": step + 1,
            "seconds": round(time.perf_counter() - start, 1),
            "loss": rounded(measured.loss),
            "global_std": rounded(measured.global_std),
            "small_entries": rounded(small),
            **{
                key: {name: rounded(value) for name, value in values.items() if value is not None}
                for key, values in numbers.items()
            },
        }


def small_entries(grads: Arrays, state: TrainState) -> jax.Array:
    """The share of entries whose rms gradient so far, Adam's, is below the mean of their layer."""
    decay, small, total = 0.999, jnp.zeros(()), 0
    seconds = optax.tree.get(state.opt_state, "nu")
    for grad, second in zip(jax.tree.leaves(grads), jax.tree.leaves(seconds), strict=True):
        if grad.ndim > 1:
            second = optax.tree.bias_correction(
                decay * second + (1 - decay) * grad**2, decay, state.step + 1
            )
            small += jnp.sum(jnp.sqrt(second) < jnp.abs(grad.mean()))
            total += grad.size
    return small / total


def on_other_batch(
    tx: optax.GradientTransformation, *, every_step: bool
) -> optax.GradientTransformationExtraArgs:
    """The step of `tx` on the gradients in the extra argument `other_grads`.

    Its state results from these, too, or unless `every_step` from its own gradients.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        step, others = tx.update(extra_args["other_grads"], state, params)
        return step, others if every_step else tx.update(updates, state, params)[1]

    return optax.GradientTransformationExtraArgs(tx.init, update)


def closed_form(global_std: np.ndarray, scale_factor: np.ndarray) -> np.ndarray:
    """The expected ratio of norms for `scaling` before Adam.

    Args:
      global_std: s_t, of shape `(steps,)`.
      scale_factor: a_t, of the same shape.

    Returns:
      EMA(a) / sqrt(EMA(a^2 s^2) / EMA(s^2)), of the same shape, where the first mean has Adam's
      first decay and the others its second, all with bias correction.
    """
    squares = global_std**2
    return moving_average(scale_factor, 0.9) / np.sqrt(
        moving_average(scale_factor**2 * squares, 0.999) / moving_average(squares, 0.999)
    )


def moving_average(values: np.ndarray, decay: float) -> np.ndarray:
    """The exponential moving average, with Adam's bias correction."""
    return pd.Series(values).ewm(alpha=1 - decay, adjust=True).mean().to_numpy()


def read(path: Path) -> Trajectory:
    """The record in a file."""
    first, *lines = map(json.loads, path.read_text().splitlines())
    frames = (pd.DataFrame([line[key] for line in lines]) for key in KEYS)
    small = [line["small_entries"] for line in lines if "small_entries" in line]
    global_std = np.array([line["global_std"] for line in lines])
    return Trajectory(first, global_std, np.array(small) if small else None, *frames)


def write_report(folder: Path) -> None:
    """Writes `REPORT.md` and its figures from the records in a folder.

    Raises:
      ValueError: if there is no record.
    """
    runs = read_all(folder)
    if not runs:
        raise UserError(f"{folder} holds no records; run it without --report")
    for model, of_model in runs.items():
        with figure_of(folder / model, (9, 3.6)) as figure:
            draw(figure, of_model)
    (folder / "REPORT.md").write_text(report(runs))


def read_all(folder: Path) -> dict[str, list[Trajectory]]:
    """The records in a folder, by network."""
    found = {model: sorted(folder.glob(f"{model}-seed*.jsonl")) for model in MODELS}
    return {model: [read(path) for path in paths] for model, paths in found.items() if paths}


def report(runs: Mapping[str, Sequence[Trajectory]]) -> str:
    """The report's text; the comments in it mark the parts that the guide includes."""
    every = [run.description for each in runs.values() for run in each]
    first = every[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("jax", "flax", "optax"))
    commits = listed(short(description["commit"]) for description in every)
    return f"""\
# What the methods do to AdamW's steps

AdamW alone trains a network on CIFAR-100 with the paper's recipe as we read it, for the first \
{first["steps"]} of 39,000 steps. Every method, followed by its own AdamW, gets the gradients of \
that run. For comparison, AdamW on a second, independent batch at the same parameters.

Numbers are medians over the steps after step {BURN_IN}: the median of the seeds, and in brackets \
the smallest and the largest. *Unexplained* is the share of the squared step that no learning rate \
of AdamW would have produced: $1 - \\mathrm{{cosine}}^2$.

{"".join(part(model, of_model) for model, of_model in runs.items())}\
<!-- command -->

```sh
python -m reproduction.effect --data-dir ~/tensorflow_datasets
python -m reproduction.effect --report    # this page, from the records beside it
```

{first["device_count"]} x {first["device"]}; {versions}; commit {commits}.
"""


def part(model: str, runs: Sequence[Trajectory]) -> str:
    """What the report says about a network."""
    rows = []
    for name in (*COMPARED, *OTHERS):
        cosines = [run.cosine[name] for run in runs]
        unexplained = [100 * (1 - cosine**2) for cosine in cosines]
        row = {
            "followed by AdamW": label(name),
            "norm ratio": over_seeds([run.norm_ratio[name] for run in runs]),
            "cosine": over_seeds(cosines),
            "unexplained, %": over_seeds(unexplained, digits=1),
        }
        rows.append(row)
        if name == "scaling":
            form = over_seeds([expected(run) for run in runs])
            cells = ("*the same in closed form*", form, "*1*", "*0*")
            rows.append(dict(zip(row, cells, strict=True)))
    start, end = (
        over_seeds([run.scale_factor["scaling"].iloc[[step]] for run in runs], skip=0)
        for step in (0, -1)
    )
    shares = [100 * run.small_entries for run in runs if run.small_entries is not None]
    small = (
        " Entries whose rms gradient so far is below the mean of their layer's gradient: "
        f"{over_seeds(shares, digits=1)} %."
        if shares
        else ""
    )
    return f"""\
## {MODELS[model].label}

<!-- {model} -->

{markdown(rows)}

{len(runs)} seeds. The scale factor $a_t$ of Autoscale was {start} in the first step and {end} in \
the last.{small}

![{MODELS[model].label}: norm ratio, and share of the step that no learning rate explains, over \
the steps, by method]({model}.png)

*Each method's step in {MODELS[model].label}, compared with AdamW's. Left: the ratio of their \
norms; black and dashed, its closed form for the scaling. Right: the share of the squared step \
that no learning rate of AdamW explains. Lines are means over seeds, bands range from the smallest \
to the largest. The other methods are in the table.*

<!-- end of {model} -->

"""


def draw(figure: Figure, runs: Sequence[Trajectory]) -> None:
    """Draws the ratio of norms, and the share that no learning rate explains, over the steps."""
    left, right = figure.subplots(1, 2)
    panels = (left, [run.norm_ratio for run in runs]), (right, [1 - run.cosine**2 for run in runs])
    for axes, values in panels:
        for name in DRAWN:
            lines = np.array([each[name] for each in values])
            steps = np.arange(1, lines.shape[1] + 1)
            axes.plot(steps, lines.mean(0), color=COLORS[name], label=label(name), linewidth=1.2)
            axes.fill_between(
                steps, lines.min(0), lines.max(0), color=COLORS[name], alpha=0.12, linewidth=0
            )
    forms = np.mean([expected(run) for run in runs], axis=0)
    left.plot(1 + np.arange(len(forms)), forms, "k--", linewidth=1, label="scaling in closed form")
    left.set(title="Norm ratio", xlabel="step", yscale="log")
    left.set_yticks((0.5, 0.7, 1, 1.4, 2, 3), ("0.5", "0.7", "1", "1.4", "2", "3"))
    left.minorticks_off()
    title = "Share that no learning rate explains"
    right.set(title=title, xlabel="step", yscale="log", ylim=(1e-3, 1))
    common_legend(figure, [left])


def expected(run: Trajectory) -> np.ndarray:
    return closed_form(run.global_std, run.scale_factor["scaling"].to_numpy())


def label(name: str) -> str:
    return OTHERS.get(name) or METHODS[name].label


def over_seeds(values: Sequence[Any], *, skip: int = BURN_IN, digits: int = 3) -> str:
    """The median over seeds of the medians over steps, with the smallest and the largest of those.

    >>> over_seeds([np.array([9.0, 1.0]), np.array([9.0, 2.0]), np.array([9.0, 4.0])], skip=1)
    '2.000 [1.000, 4.000]'
    """
    medians = [float(np.median(each[skip:])) for each in values]
    return f"{np.median(medians):.{digits}f} [{min(medians):.{digits}f}, {max(medians):.{digits}f}]"


def rounded(value: jax.typing.ArrayLike) -> float:
    return float(f"{float(np.asarray(value)):.6g}")


if __name__ == "__main__":
    main()
