import dataclasses
from pathlib import Path

import pytest
from training.config import (
    CHOICES,
    GROUPS,
    Experiment,
    Launch,
    Options,
    parse,
    recipe,
    run_folder,
)

from models import MODELS
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS

FIELDS = (*dataclasses.fields(Experiment), *dataclasses.fields(Launch))


def test_choices_are_those_that_exist():
    assert {
        "dataset": tuple(DATASETS),
        "model": tuple(MODELS),
        "method": tuple(METHODS),
        "optimizer": tuple(OPTIMIZERS),
        "precision": ("float32", "bfloat16"),
    } == CHOICES


def test_cifar_100_has_the_papers_recipe():
    full = recipe("cifar100")
    assert (full.epochs, full.batch_size, full.learning_rate) == (200, 256, 1e-3)
    assert (full.weight_decay, full.label_smoothing) == (5e-5, 0.1)
    assert full.cutmix_probability == 1
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
        "warmup_epochs": 1.5,
        "weight_decay": 0.25,
        "label_smoothing": 0.2,
        "cutmix_probability": 0.3,
        "tag": "wide",
        "seed": 9,
        "precision": "bfloat16",
        "data_dir": Path("data"),
        "train_size": 99,
        "effect": True,
        "out": Path("results"),
        "resume": True,
        "auto_resume": True,
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
    assert set(changed) == {field.name for field in FIELDS}
    experiment, launch = parse(args)
    assert dataclasses.asdict(experiment) | dataclasses.asdict(launch) == changed


def test_customary_short_options():
    given = ["-b", "8", "--lr", "0.5", "--wd=0.25"]
    long = ["--batch-size", "8", "--learning-rate", "0.5", "--weight-decay", "0.25"]
    assert parse(given) == parse(long)
    assert parse(given).experiment == Experiment(batch_size=8, learning_rate=0.5, weight_decay=0.25)


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit):
        parse(["--lrate", "0.1"])
    assert "Unrecognized options: --lrate" in capsys.readouterr().err


def test_every_option_is_in_one_group():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(field.name for field in FIELDS)


def test_defaults_follow_the_data_set_and_the_optimizer():
    assert parse([]) == Options(Experiment(), Launch())
    assert parse(["--epochs", "5", "--dataset", "cifar100"]).experiment == dataclasses.replace(
        recipe("cifar100"), epochs=5
    )
    assert parse(["--optimizer", "sgd"]).experiment.learning_rate == 0.1


def test_the_folder_is_named_after_the_run():
    for args, folder in [
        (["--dataset=cifar100"], "runs/cifar100-resnet20-autoscale-adamw-seed0"),
        (["--method=none", "--optimizer=sgd", "--seed=3"], "runs/digits-resnet20-none-sgd-seed3"),
        (["--tag", "wd-4x"], "runs/digits-resnet20-autoscale-adamw-seed0-wd-4x"),
        (["--out", "elsewhere"], "elsewhere"),
    ]:
        assert run_folder(*parse(args)) == Path(folder)


def test_the_former_name_of_no_method_is_explained():
    for args in (["--method", "adamw"], ["--method=adamw"]):
        with pytest.raises(ValueError, match="--method adamw is now called none"):
            parse(args)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("decay_epochs", 0.0),
        ("checkpoint_minutes", -1.0),
        ("warmup_epochs", -1.0),
        ("weight_decay", float("inf")),
        ("label_smoothing", 1.5),
        ("cutmix_probability", -0.5),
        ("seed", -1),
    ],
)
def test_impossible_values_are_named(name, value):
    part = Launch() if name == "checkpoint_minutes" else Experiment()
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is {value}; it must be"):
        dataclasses.replace(part, **{name: value}).validate()


def test_a_tag_that_would_be_a_folder_is_refused():
    with pytest.raises(ValueError, match="it is part of a file name"):
        Experiment(tag="../up").validate()


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--dataset", "cifar100", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "a resumed run may have more. (default: 200)" in text
    for field in FIELDS:
        assert f"--{field.name.replace('_', '-')}" in text
    assert "None" not in text
    at = [text.index(f" {group} options ") for group in GROUPS]
    assert at == sorted(at)
    assert at[0] < text.index("--train-size INT") < at[1]
