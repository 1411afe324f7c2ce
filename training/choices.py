"""What `train.py --list` shows: the data sets, models and methods that it knows by name."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx

from models import MODELS
from training.config import Config
from training.data import DATASETS
from training.optimizers import METHODS


def show_choices(config: Config) -> None:
    """Prints a line about each; models have the number of parameters for `config.dataset`."""
    classes, mean, _ = DATASETS[config.dataset]
    sizes = {
        name: number_of_parameters(partial(model, num_classes=classes, channels=len(mean)))
        for name, model in MODELS.items()
    }
    options = {
        "dataset": {
            name: f"{classes} classes; images with {len(mean)} channel{'s' * (len(mean) > 1)}."
            for name, (classes, mean, _) in DATASETS.items()
        },
        "model": {
            name: f"{sizes[name]:,} parameters for {config.dataset}. {summary(model)}"
            for name, model in MODELS.items()
        },
        "method": {name: summary(method) for name, method in METHODS.items()},
    }
    for option, choices in options.items():
        print(f"--{option}")
        for name, text in choices.items():
            print(f"  {name:{max(map(len, choices))}}  {text}")


def summary(make: Callable[..., Any]) -> str:
    """The first line of a docstring, and the arguments that a `partial` has.

    >>> summary(partial(summary, print))
    'The first line of a docstring, and the arguments that a `partial` has. (<built-in ...>)'
    """
    arguments = ""
    if isinstance(make, partial):
        given = [*map(str, make.args), *(f"{key}={value}" for key, value in make.keywords.items())]
        arguments = f" ({', '.join(given)})"
        make = make.func
    line = (inspect.getdoc(make) or "").partition("\n")[0]
    return re.sub(r":\w+:(?=`)", "", line) + arguments


def number_of_parameters(make: Callable[..., nnx.Module]) -> int:
    """The number of a network's trainable parameters.

    >>> number_of_parameters(partial(nnx.Linear, 3, 2))
    8
    """
    shapes = nnx.eval_shape(lambda: nnx.state(make(rngs=nnx.Rngs(0)), nnx.Param))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
