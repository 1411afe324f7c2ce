"""A transformer at equal tuning: each method before AdamW, over the same learning rates.

    python -m reproduction.transformer             # 60 runs, each of 3 to 4 minutes on two cores
    python -m reproduction.transformer --report    # the tables and the figure, from records alone

The network and its training step are those of `examples/transformer.py`. Runs with a record are
skipped; one that was interrupted begins again.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from flax import nnx
from rich.progress import Progress

from examples import transformer
from optax_autoscale import global_std, measure_effect
from reproduction import replacing
from reproduction.effect import over_seeds
from reproduction.figures import against, figure_of
from reproduction.presets import best_rates, described
from reproduction.records import Table, choose_rates
from reproduction.report import difference_section, listed, markdown, short, spread
from reproduction.statistics import differences
from reproduction.studies import Outcome, Study
from training import UserError, devices
from training.optimizers import METHODS, graft
from training.record import environment
from training.signals import one_line_errors

EVERY = 50  # steps between the lines of a record
DEFAULT = 1e-3  # the learning rate of the recipe
LABELS = {
    "none": "AdamW",
    "autoscale": "Autoscale",
    "autoscale_no_embeddings": "Autoscale without the embeddings",
    "autoscale_norm": METHODS["autoscale_norm"].label,
}
KEYS = ("global_std", "scale_factor", "norm_ratio", "cosine")  # of the optimizer's state

PLAN = """\
Fixed before the first run. All runs: `examples/transformer.py`, a transformer on bytes, here of the
help pages of Python (`pydoc_data.topics`). Four blocks of width 128, four heads, a context of 64
bytes, 2,000 batches of 12, a warm-up over 100 steps and a cosine decay to a tenth, as in nanoGPT's
recipe for a CPU. AdamW has Optax's defaults, as in all studies here: a second decay of 0.999 and a
weight decay of 1e-4 (nanoGPT: 0.99, 0.1, and clipping). Runs of one seed start from the same
parameters and see the same batches.

- **Runs.** `none`, `autoscale`, `autoscale` without the two embedding tables, and `autoscale_norm`,
  AdamW's direction with the length of the step under `autoscale`; learning rates 0.5, 1, 2, 4 and
  8e-3; 3 seeds: 60 runs.
- **Outcome.** The last tenth of the text is not trained on. Its first half, for validation, chooses
  the learning rate of each method: the lowest mean loss over seeds. The outcome is the loss on the
  second half, for testing; both in nats per byte after the last step. If one text did both, every
  best would look better than it is.
- **Expected**, from a pilot of 400 steps with 2 seeds at equal rates: `autoscale` was 0.026 and
  0.019 nats worse, two thirds of it by the length of its steps. So at 1e-3 it is worse by that or
  less, and `autoscale_norm` by two thirds of it. Tuning makes up for the length: at each one's best
  rate a third of the difference is left or none, and the best rate of `autoscale` is the same or
  higher. Without the embeddings the difference is smaller.
- **Primary.** `autoscale` minus `none`, each at its best rate: the paired t-test at 0.05 and
  equivalence within 0.02 nats (two one-sided paired t-tests at 0.05). That is about 1% of the loss,
  and what the pilot saw without tuning: a smaller difference would not decide which to use. With 3
  seeds both tests are weak. The 95% interval extends 2.5 standard deviations of the differences to
  each side, and equivalence needs one below 0.012 even if their mean is 0. So the intervals are the
  result, more than the tests.
- **Descriptive.** The other methods minus `none` at each one's best rate, and all at 1e-3; the norm
  ratio and the cosine of the steps.
- **Divergence.** A run diverges if its last loss is not finite. A rate at which a run of a method
  diverged is not that method's best.
- **Ends of the grid.** If a best rate is the lowest or the highest, half of it or twice as much is
  added for all methods, until none is.

Nothing is tested before all runs are in. Whatever else is looked at later is called exploratory."""


STUDY = Study(
    *("transformer", "A transformer at equal tuning", ()),
    families=partial(best_rates, kind="primary"),
    outcome=Outcome("test_loss", "test loss", "nat", "nats per byte", 3, 0.02, 1e9),
    plan=PLAN,
    preset=True,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What distinguishes a run from the others."""

    method: str
    learning_rate: float
    seed: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a transformer with each method, over learning rates and seeds."""

    learning_rates: tuple[float, ...] = (0.5e-3, 1e-3, 2e-3, 4e-3, 8e-3)
    """The highest of each run, after its warm-up."""
    seeds: int = 3
    """Number of seeds."""
    steps: int = 2000
    """Steps of a run; for fewer, choose another folder."""
    results: Path = Path("results/transformer")
    """Folder of the records and the report."""
    report: bool = False
    """Only write the report, from the records alone."""


def main() -> None:
    options = tyro.cli(Options)
    with one_line_errors("transformer.py"):
        if not options.report:
            devices.prepare(1)  # a step is not split between devices
            record(
                [
                    Run(method, rate, seed, options.steps)
                    for seed in range(options.seeds)
                    for rate in options.learning_rates
                    for method in LABELS
                ],
                options.results,
            )
        write_report(options.results)


def record(runs: Sequence[Run], folder: Path) -> None:
    """Writes the record of each run that has none: a line that describes it, then its lines.

    A record appears when it is complete. Without times in it, an interruption changes nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {folder / f"{run.method}-{run.learning_rate:g}-{run.seed}.jsonl": run for run in runs}
    missing = {path: run for path, run in paths.items() if not path.exists()}
    text = hashlib.sha256(np.concatenate(transformer.load_text()).tobytes()).hexdigest()
    with Progress(speed_estimate_period=math.inf) as progress:
        task = progress.add_task("training", total=sum(run.steps for run in missing.values()))
        for number, (path, run) in enumerate(missing.items(), start=1):
            jax.clear_caches()  # of the run before; each has a program of its own
            config = {"config": dataclasses.asdict(run), "text": text}  # Python's version sets it
            before = progress.tasks[task].completed
            with replacing(path) as part, part.open("w") as file:
                file.write(json.dumps(config | environment()) + "\n")
                for line in measure(run):
                    file.write(json.dumps(line) + "\n")
                    progress.update(task, completed=before + line["step"])
            left = timedelta(seconds=round(progress.tasks[task].time_remaining or 0))
            print(f"{path.name}: run {number} of {len(missing)}, {left} left", flush=True)


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """Trains, and yields every `EVERY` steps and after the last what is known by then.

    Yields:
      The step, the losses in nats per byte, and of this step s_t, a_t, and norm ratio and cosine
      beside AdamW's. The training loss is a mean over the steps since the last time. A number that
      is not finite, or that the method does not have, is None.
    """
    train, held_out = map(jnp.asarray, transformer.load_text())
    starts = jnp.arange(0, len(held_out) - transformer.CONTEXT, transformer.CONTEXT)
    parts = transformer.windows(held_out, starts)
    rngs = nnx.Rngs(run.seed)
    model = transformer.Transformer(rngs)
    optimizer = nnx.Optimizer(model, make_optimizer(run), wrt=nnx.Param)
    losses = []
    for step in range(1, run.steps + 1):
        losses.append(transformer.train_step(model, optimizer, rngs, train)[0])
        if step % EVERY == 0 or step == run.steps:
            validation, test = np.array_split(transformer.losses(model, parts), 2)
            numbers: dict[str, Any] = {"train_loss": jnp.stack(losses).mean()}
            numbers |= {"validation_loss": validation.mean(), "test_loss": test.mean()}
            for key in KEYS:
                value = optax.tree.get(optimizer.opt_state, key)
                numbers[key] = jnp.nan if value is None else value[...]
            yield {"step": step} | {key: rounded(value) for key, value in numbers.items()}
            losses.clear()


def make_optimizer(run: Run) -> optax.GradientTransformation:
    """The method before AdamW, measured against AdamW alone."""
    plain = transformer.adamw(run.learning_rate, run.steps)
    std = optax.snapshot("global_std", partial(global_std, layer_axes=transformer.LAYERS))
    methods = transformer.METHODS
    methods = methods | {"none": std, "autoscale_norm": methods["autoscale"]}
    tx = optax.chain(methods[run.method], plain)
    return measure_effect(graft(plain, tx) if run.method == "autoscale_norm" else tx, plain)


def rounded(value: jax.typing.ArrayLike) -> float | None:
    number = float(f"{float(np.asarray(value)):.6g}")
    return number if math.isfinite(number) else None


def read(folder: Path) -> Table:
    """The runs whose records are in a folder, and those that their grid lacks, a row each.

    Its columns are the options, the losses after the last step, the effect by step, and those of
    `reproduction.records.table` that statistics need.

    Raises:
      ValueError: if there is no record.
    """
    rows: dict[Run, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        first, *lines = map(json.loads, path.read_text().splitlines())
        steps = pd.DataFrame(lines, dtype=float)
        effect = {key: steps[key].to_numpy() for key in ("norm_ratio", "cosine")}
        last = steps.iloc[-1]
        state = "finished" if math.isfinite(last["test_loss"]) else "diverged"
        rows[Run(**first["config"])] = {**first, **last, **effect, "state": state}
    if not rows:
        raise UserError(f"{folder} holds no records; run it without --report")
    seen = [sorted(set(values)) for values in zip(*map(dataclasses.astuple, rows), strict=True)]
    seen[0].sort(key=[*LABELS].index)
    seen[2] = sorted({*seen[2], *range(Options.seeds)})  # a seed may lack all its runs
    runs: Table = pd.DataFrame(
        {"experiment": run, "arm": LABELS[run.method], "state": "missing"}
        | dataclasses.asdict(run)
        | rows.get(run, {})
        for run in itertools.starmap(Run, itertools.product(*seen))
    )
    runs = runs.assign(group="At each one's best learning rate", repeat="", planned=True)
    return choose_rates(runs.assign(validation_size=1, outcome=runs["test_loss"]), waits=True)


def write_report(folder: Path) -> None:
    """Writes `REPORT.md` and its figure from the records in a folder."""
    runs = read(folder)
    with figure_of(folder / "transformer", (6, 3.2)) as figure:
        against(figure, [("", runs)], "learning_rate")
    (folder / "REPORT.md").write_text(report(runs))


def report(runs: Table) -> str:
    """The report's text; the comments in it mark the parts that the guide includes."""
    made = runs[runs["state"] != "missing"]
    default = runs[runs["chosen"].any() & (runs["learning_rate"] == DEFAULT)]
    grid = []
    for arm, each in runs.groupby("arm", sort=False):
        grid.append({"method": str(arm)})
        for rate, there in each.groupby("learning_rate"):
            text = spread(there["validation_loss"].dropna(), 3)
            grid[-1][f"{rate:g}"] = f"**{text}**" if there["chosen"].all() else text
    rows = [*outcomes(runs[runs["chosen"]]), *outcomes(default)]
    at_default = STUDY._replace(families=described)
    of_default = default.assign(chosen=True, group=f"At {DEFAULT:g}")
    found = [differences(STUDY, runs), differences(at_default, of_default)]
    first = made.iloc[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("python", "jax", "flax"))
    commits = listed(map(short, made["commit"]))
    return f"""\
# {STUDY.title}

## The plan

{STUDY.plan}

## Validation loss by learning rate

{markdown(grid)}

In nats per byte: mean ± standard deviation over seeds; in bold at the rate that is chosen once \
all runs are in. Runs that diverged, and are left out: {(runs["state"] == "diverged").sum()}. Runs \
that are missing: {len(runs) - len(made)}.

## Test loss

<!-- table -->

{markdown(rows) if rows else ""}

At the chosen rates, then at {DEFAULT:g}. Norm ratio and cosine beside AdamW on the same \
gradients: medians over every {EVERY}th step; of these the median, smallest and largest of the \
seeds.

{difference_section(STUDY, pd.concat(found))}

<!-- figure -->

![Validation loss against the learning rate, by method](transformer.png)

*Validation loss in nats per byte; lines are means over seeds, dots the seeds.*

<!-- command -->

```sh
python -m reproduction.transformer
python -m reproduction.transformer --report    # this page, from the records beside it
```

{first["device_count"]:g} x {first["device"]}; {versions}; commit {commits}.
"""


def outcomes(runs: Table) -> list[dict[str, str]]:
    """The test loss of each method, and its effect on AdamW's steps."""
    return [
        {
            "method": str(arm),
            "learning rate": f"{rate:g}"
            + ", an end of the grid" * bool((each["chosen"] & each["at_end"]).all()),
            "test loss": spread(each["test_loss"].dropna(), 3),
            "norm ratio": over_seeds(each["norm_ratio"].to_list(), skip=0),
            "cosine": over_seeds(each["cosine"].to_list(), skip=0),
        }
        for (arm, rate), each in runs.groupby(["arm", "learning_rate"], sort=False)
    ]


if __name__ == "__main__":
    main()
