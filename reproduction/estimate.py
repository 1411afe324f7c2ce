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

Rates = dict[tuple[str, str], float]  # seconds per unit of cost, by data set and model


def rates_of(runs: Iterable[Run]) -> Rates:
    """The rates of finished runs on devices like these; of several, their median."""
    here = (jax.devices()[0].device_kind, jax.device_count())
    rates: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        it, description = run.experiment, run.description
        if run.records and (description["device"], description["device_count"]) == here:
            seconds = statistics.median(record["seconds"] for record in run.records)
            rates.setdefault((it.dataset, it.model), []).append(seconds * it.epochs / cost(it))
    return {kind: statistics.median(values) for kind, values in rates.items()}


def measured_rate(experiment: Experiment) -> float:
    """The rate of a few steps on random images; it takes the time to compile the program."""
    print(f"measuring {MEASURED_STEPS} steps of {experiment.model} ...", flush=True)
    dataset = data.random_dataset(experiment.dataset)
    one_epoch = dataclasses.replace(experiment, train_size=None, validation_size=0, epochs=1)
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


def time_left(missing: Sequence[Experiment], rates: Rates) -> str:
    """The estimated time of the missing runs, in words.

    Args:
      missing: the runs.
      rates: those that are known; others are measured, and added.
    """
    if not missing:
        return "nothing left"
    seconds = 0.0
    for each in missing:
        kind = (each.dataset, each.model)
        if kind not in rates:
            rates[kind] = measured_rate(each)
        seconds += cost(each) * rates[kind]
    return f"about {timedelta(seconds=round(seconds))} left"
