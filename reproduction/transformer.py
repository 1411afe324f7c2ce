"""A transformer at equal tuning: each method before AdamW, over the same learning rates.

    python -m reproduction.transformer             # 60 runs, each of 3 to 4 minutes on two cores
    python -m reproduction.transformer --report    # the tables and the figure, from records alone

The network and its training step are those of `examples/transformer.py`. Runs with a record are
skipped; one that was interrupted begins again.
"""

import dataclasses
import hashlib
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
from matplotlib.figure import Figure
from rich.progress import Progress
from statsmodels.stats.weightstats import DescrStatsW

from examples import transformer
from optax_autoscale import global_std, measure_effect
from reproduction import replacing
from reproduction.effect import over_seeds
from reproduction.figures import COLORS, figure_of
from reproduction.records import Table
from reproduction.report import between, listed, markdown, p_value, short, spread
from reproduction.statistics import mean_interval
from training import UserError, devices
from training.optimizers import graft
from training.record import environment
from training.signals import one_line_errors

EVERY = 50  # steps between the lines of a record
MARGIN = 0.02  # nats per byte
DEFAULT = 1e-3  # the learning rate of the recipe
LABELS = {
    "none": "AdamW",
    "autoscale": "Autoscale",
    "autoscale_no_embeddings": "Autoscale without the embeddings",
    "autoscale_norm": "AdamW's direction, Autoscale's norm",
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
    """The runs whose records are in a folder, a row each, with the losses after the last step.

    Raises:
      ValueError: if there is no record.
    """
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        first, *lines = map(json.loads, path.read_text().splitlines())
        steps = pd.DataFrame(lines, dtype=float)
        row = {**first, **first["config"], **steps.iloc[-1]}
        rows.append(row | {key: steps[key].to_numpy() for key in ("norm_ratio", "cosine")})
    if not rows:
        raise UserError(f"{folder} holds no records; run it without --report")
    return pd.DataFrame(rows)


def best_rates(runs: Table) -> dict[str, float]:
    """The learning rate of each method with the lowest validation loss, as a mean over seeds."""
    means = by_seed(runs, "validation_loss").mean(axis=1, skipna=False)
    return means.unstack().idxmin(axis=1).to_dict()


def by_seed(runs: Table, name: str) -> Table:
    """A loss by method and learning rate, a column for each seed; NaN where a run diverged."""
    return runs.pivot(index=["method", "learning_rate"], columns="seed", values=name)


def write_report(folder: Path) -> None:
    """Writes `REPORT.md` and its figure from the records in a folder."""
    runs = read(folder)
    with figure_of(folder / "transformer", (6, 3.6)) as figure:
        draw(figure, runs)
    (folder / "REPORT.md").write_text(report(runs))


def report(runs: Table) -> str:
    """The report's text; the comments in it mark the parts that the guide includes."""
    methods = [method for method in LABELS if method in set(runs["method"])]
    rates, seeds = sorted(set(runs["learning_rate"])), runs["seed"].nunique()
    missing = len(methods) * len(rates) * seeds - len(runs)
    best = {} if missing else best_rates(runs)
    grid = []
    for method in methods:
        row = {"method": LABELS[method]}
        for rate in rates:
            there = runs[(runs["method"] == method) & (runs["learning_rate"] == rate)]
            text = spread(there["test_loss"].dropna(), 3)
            row[f"{rate:g}"] = f"**{text}**" if best.get(method) == rate else text
        grid.append(row)
    first = runs.iloc[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("python", "jax", "flax"))
    commits = listed(map(short, runs["commit"]))
    return f"""\
# A transformer at equal tuning

## The plan

{PLAN}

## Test loss by learning rate

<!-- table -->

{markdown(grid)}

In nats per byte: mean ± standard deviation over {seeds} seeds; in bold at the rate that the \
validation loss chose. Runs that diverged, and are left out: {runs["test_loss"].isna().sum()}.

{f"Comparisons wait for {missing} runs." if missing else comparisons(runs, best)}

<!-- figure -->

![Test loss against the learning rate, by method](transformer.png)

*Test loss in nats per byte; lines are means over seeds, dots the seeds.*

<!-- command -->

```sh
python -m reproduction.transformer
python -m reproduction.transformer --report    # this page, from the records beside it
```

{first["device_count"]} x {first["device"]}; {versions}; commit {commits}.
"""


def comparisons(runs: Table, best: dict[str, float]) -> str:
    """Each method minus AdamW within seeds, at each one's best rate and at the default."""
    test, rows = by_seed(runs, "test_loss"), []
    default = dict.fromkeys(best, DEFAULT) if DEFAULT in set(runs["learning_rate"]) else {}
    for rates in (best, default):
        for method in sorted(rates, key=[*LABELS].index):
            losses = test.loc[(method, rates[method])]
            minus = losses - test.loc[("none", rates["none"])]
            where = (runs["method"] == method) & (runs["learning_rate"] == rates[method])
            ratios, cosines = runs[where]["norm_ratio"], runs[where]["cosine"]
            row = {"method": LABELS[method], "learning rate": f"{rates[method]:g}"}
            row["test loss"] = spread(losses.dropna(), 3)
            row["minus AdamW (95% interval)"] = "-" if method == "none" else interval(minus)
            row["norm ratio"] = over_seeds(ratios.to_list(), skip=0)
            rows.append(row | {"cosine": over_seeds(cosines.to_list(), skip=0)})
    primary = test.loc[("autoscale", best["autoscale"])] - test.loc[("none", best["none"])]
    tests: Any = DescrStatsW(primary)
    return f"""\
Within seeds, at each one's best rate, then at {DEFAULT:g}:

{markdown(rows)}

Norm ratio and cosine beside AdamW on the same gradients: medians over every {EVERY}th step; of \
these the median, smallest and largest of the seeds.

Primary, Autoscale minus AdamW at each one's best rate: {interval(primary)}; \
p = {p_value(tests.ttest_mean()[1])}, for equivalence within {MARGIN:g} \
p = {p_value(tests.ttost_mean(-MARGIN, MARGIN)[0])}."""


def interval(differences: Table) -> str:
    """The mean and its 95% interval; NaN where a run of the two diverged."""
    mean = differences.mean(skipna=False)
    return f"{mean:+z.3f} ({between(*mean_interval(differences), '+z.3f')})"


def draw(figure: Figure, runs: Table) -> None:
    """The test loss against the learning rate, a line for each method, the seeds as dots."""
    axes = figure.subplots()
    for method, text in LABELS.items():
        there = runs[runs["method"] == method]
        color, line = (COLORS["autoscale"], "--") if method not in COLORS else (COLORS[method], "-")
        axes.plot(there.groupby("learning_rate")["test_loss"].mean(), line, color=color, label=text)
        axes.plot(there["learning_rate"], there["test_loss"], "o", color=color, markersize=3)
    rates = sorted(set(runs["learning_rate"]))
    axes.set(xscale="log", xlabel="learning rate", ylabel="test loss, nats per byte")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.legend()


if __name__ == "__main__":
    main()
