"""How long the runs of a study will take."""

import dataclasses
import statistics
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

import jax
import numpy as np

from reproduction.records import Run
from reproduction.studies import cost
from training import data, devices
from training.options import Experiment
from training.step import Program

MEASURED_STEPS = 3

Rates = dict[str, float]  # seconds per unit of cost, by model


def rates_of(runs: Iterable[Run]) -> Rates:
    """The rates of finished runs on devices like these; the median of each model."""
    here = (jax.devices()[0].device_kind, jax.device_count())
    rates: dict[str, list[float]] = {}
    for run in runs:
        description = run.description
        if run.records and (description["device"], description["device_count"]) == here:
            seconds = statistics.median(record["seconds"] for record in run.records)
            rate = seconds * run.experiment.epochs / cost(run.experiment)
            rates.setdefault(run.experiment.model, []).append(rate)
    return {model: statistics.median(values) for model, values in rates.items()}


def measured_rate(experiment: Experiment) -> float:
    """The rate of a few steps on random images; it takes the time to compile the program."""
    print(f"measuring {MEASURED_STEPS} steps of {experiment.model} ...", flush=True)
    dataset = data.random_dataset(experiment.dataset)
    one_epoch = dataclasses.replace(experiment, train_size=None, epochs=1)
    program = Program(one_epoch, dataset, devices.make_mesh())
    train_data = program.put(dataset.train_images, dataset.train_labels)
    state, order = program.first_state(), program.epoch_order(np.int32(1))
    seconds = []
    for _ in range(1 + MEASURED_STEPS):  # the first one is compiled
        start = time.perf_counter()
        state, measured = program.train_step(state, train_data, order)
        jax.block_until_ready(measured)
        seconds.append(time.perf_counter() - start)
    epoch = statistics.median(seconds[1:]) * (program.steps_per_epoch + program.evaluation_steps)
    return epoch / cost(one_epoch)


def time_left(missing: Sequence[Experiment], rates: Rates, *, measure: bool = False) -> str:
    """The estimated time of the missing runs, in words that say what it is estimated from.

    Args:
      missing: the runs.
      rates: those that are known. Models without one are taken to be as fast as the others, in
        multiply-adds per second.
      measure: whether to measure some steps of such models instead.
    """
    if not missing:
        return "nothing left"
    unknown = {each.model: each for each in missing if each.model not in rates}
    sources = ["finished runs on such devices"] * any(each.model in rates for each in missing)
    if measure and unknown:
        rates = rates | {model: measured_rate(each) for model, each in unknown.items()}
        sources.append(f"{MEASURED_STEPS} steps of {', '.join(unknown)}")
    if not rates:
        return "time left unknown until a run has finished"
    other = statistics.median(rates.values())
    seconds = sum(cost(each) * rates.get(each.model, other) for each in missing)
    by = " and ".join(sources or ["finished runs of other models"])
    return f"about {timedelta(seconds=round(seconds))} left, by the rate of {by}"
