"""What `train.py --list` prints: the data sets, models, methods and optimizers by name."""

import shutil
import sys
import textwrap
from collections.abc import Callable
from functools import partial

import jax
from flax import nnx

from models import MODELS
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS


def show_choices(dataset: str) -> None:
    """Prints a line about each; models with their number of parameters for `dataset`.

    In a terminal the lines are wrapped.
    """
    spec = DATASETS[dataset]
    make = {
        name: partial(model.make, num_classes=spec.num_classes, channels=len(spec.mean))
        for name, model in MODELS.items()
    }
    options = {
        "dataset": {
            name: f"{data.label}: {data.description}; {data.num_train:,} training images of "
            f"{data.image_size}x{data.image_size} pixels, {data.num_classes} classes"
            for name, data in DATASETS.items()
        },
        "model": {
            name: f"{model.label}: {model.description}; {number_of_parameters(make[name]):,} "
            f"parameters for {spec.label}"
            for name, model in MODELS.items()
        },
        "method": {
            name: f"{method.label}: {method.description}" for name, method in METHODS.items()
        },
        "optimizer": {
            name: f"{optimizer.label}: {optimizer.description}"
            for name, optimizer in OPTIMIZERS.items()
        },
    }
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for option, choices in options.items():
        print(f"--{option}")
        longest = max(map(len, choices))
        for name, text in choices.items():
            start = f"  {name:{longest}}  "
            print(
                textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * len(start))
            )


def number_of_parameters(make: Callable[..., nnx.Module]) -> int:
    """The number of a network's trainable parameters.

    >>> number_of_parameters(partial(nnx.Linear, 3, 2))
    8
    """
    shapes = nnx.eval_shape(lambda: nnx.state(make(rngs=nnx.Rngs(0)), nnx.Param))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
