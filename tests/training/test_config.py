import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from models import MODELS
from training import data
from training.config import Config, parse, recipe


def test_choices_are_those_that_exist():
    hints = get_type_hints(Config)
    assert get_args(hints["model"]) == tuple(MODELS)
    assert get_args(hints["dataset"]) == tuple(data.DATASETS)


def test_cifar_100_has_the_papers_recipe():
    config = recipe("cifar100")
    assert (config.epochs, config.batch_size, config.learning_rate) == (200, 256, 1e-3)
    assert (config.weight_decay, config.label_smoothing) == (5e-5, 0.1)
    assert config.cutmix_probability == 1
    assert recipe("cifar10").epochs == 300


def test_every_option_is_read():
    changed = {
        "dataset": "cifar10",
        "model": "vgg16_bn",
        "method": "zscore",
        "optimizer": "sgd",
        "epochs": 3,
        "batch_size": 7,
        "learning_rate": 0.5,
        "decay_epochs": 4.5,
        "weight_decay": 0.25,
        "label_smoothing": 0.2,
        "cutmix_probability": 0.3,
        "seed": 9,
        "precision": "bfloat16",
        "data_dir": Path("data"),
        "train_size": 99,
        "out": Path("results"),
        "resume": True,
        "checkpoint_minutes": 1.5,
        "fsdp": True,
        "coordinator": "localhost:1234",
        "num_processes": 2,
        "process_id": 1,
        "wandb": True,
        "list": True,
        "debug": True,
    }
    args = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in changed.items()
    ]
    assert set(changed) == {field.name for field in dataclasses.fields(Config)}
    assert dataclasses.asdict(parse(args)) == changed


def test_defaults_follow_the_data_set_and_the_optimizer():
    assert parse([]) == Config()
    assert parse(["--epochs", "5", "--dataset", "cifar100"]) == dataclasses.replace(
        recipe("cifar100"), epochs=5
    )
    assert parse(["--optimizer", "sgd"]).learning_rate == 0.1
    assert parse(["--dataset=cifar100"]).folder == Path("runs/cifar100-resnet20-autoscale-seed0")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("decay_epochs", 0.0),
        ("checkpoint_minutes", -1.0),
        ("weight_decay", float("inf")),
        ("label_smoothing", 1.5),
        ("cutmix_probability", -0.5),
        ("seed", -1),
    ],
)
def test_impossible_values_are_named(name, value):
    config = dataclasses.replace(Config(), **{name: value})
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is {value}; it must be"):
        config.validate()


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--dataset", "cifar100", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "Number of passes over the training images. (default: 200)" in text
