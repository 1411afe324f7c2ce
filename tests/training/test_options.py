"""What is read from the command line and from `config.json`, and what is refused with a remedy."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from models import MODELS
from training.data import DATASETS
from training.optimizers import METHODS, OPTIMIZERS
from training.options import (
    MAX_STEPS,
    Experiment,
    Launch,
    check_resumes,
    experiment_of,
    load,
    option,
    parse,
    recipe,
    show_choices,
    validate,
)
from training.record import SCHEMA

EXPERIMENT = Experiment("cifar10", "vit", "zscore", "sgd", 7, 9, 0.5, 4.5, seed=3, train_size=99)
FIELDS = (*dataclasses.fields(Experiment), *dataclasses.fields(Launch))
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@pytest.fixture
def folder(tmp_path):
    """That of a run of `EXPERIMENT`."""
    write(tmp_path)
    return tmp_path


def write(folder: Path, schema: int | None = SCHEMA, launch: object = None, **options) -> Path:
    config = dataclasses.asdict(EXPERIMENT) | options
    description = {"config": config, "schema": schema, "commit": "abc", "launch": launch}
    description = {name: value for name, value in description.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(description))
    return folder / "config.json"


def test_every_option_is_read():
    changed: dict = vars(EXPERIMENT) | {"warmup_epochs": 1.5, "weight_decay": 0.25, "tag": "wide"}
    changed |= {"label_smoothing": 0.2, "cutmix_probability": 0.3, "precision": "bfloat16"}
    changed |= {"data_dir": Path("data").absolute(), "out": Path("o"), "checkpoint_minutes": 1.5}
    changed |= {"coordinator": "localhost:1234", "num_processes": 2, "process_id": 1}
    flags = ("effect", "resume", "auto_resume", "fsdp", "wandb", "list", "debug")
    changed |= dict.fromkeys(flags, True)
    pairs = changed.items()
    args = [option(name) + ("" if value is True else f"={value}") for name, value in pairs]
    experiment, launch = parse(args)
    assert vars(experiment) | vars(launch) == changed | {"config": None}


def test_defaults_follow_the_data_set_and_the_optimizer_and_the_folder_the_name():
    assert parse([]) == (Experiment(), Launch(out=Path("runs", Experiment().name)))
    paper = {"epochs": 200, "batch_size": 256, "learning_rate": 1e-3, "weight_decay": 5e-5}
    paper |= {"label_smoothing": 0.1, "cutmix_probability": 1}
    assert paper.items() < vars(recipe("cifar100")).items()
    assert recipe("cifar10").epochs == 300
    expected = dataclasses.replace(recipe("cifar100"), epochs=5)
    assert parse(["--epochs", "5", "--dataset", "cifar100"])[0] == expected
    assert parse(["--optimizer", "sgd"])[0].learning_rate == 0.1
    expected = Experiment(batch_size=8, learning_rate=0.5, weight_decay=0.25)
    assert parse(["-b", "8", "--lr", "0.5", "--wd=0.25"])[0] == expected
    for args, name in [
        ("--dataset=cifar100", "runs/cifar100-resnet20-autoscale-adamw-seed0"),
        ("--method=none --optimizer=sgd --seed=3", "runs/digits-resnet20-none-sgd-seed3"),
        ("--tag wd-4x", "runs/digits-resnet20-autoscale-adamw-seed0-wd-4x"),
        ("--out café/本", "café/本"),
    ]:
        assert parse(args.split())[1].out == Path(name)


@pytest.mark.parametrize(
    "args", ["--lrate 0.1", "--no-list", "--no-effect", "--model resnet21", "--train-size None"]
)
def test_what_is_no_option_is_named(args, capsys):
    with pytest.raises(SystemExit):
        parse(args.split())
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert args.split()[0] in said
    assert ("Unrecognized" in said) == (args[:3] in ("--l", "--n"))
    assert ("'resnet20', 'resnet56'" in said) == ("model" in args)


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--dataset", "cifar100", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(r"--epochs INT [^(]* \(default: 200\)", text)
    assert all(f"{option(field.name)} " in text for field in FIELDS)
    assert "None" not in text
    assert "--no-" not in text


# Of each number, the values at both sides of each limit.
@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("epochs", [1, MAX_STEPS], [0, MAX_STEPS + 1]),
        ("batch_size", [1, 10**6], [0]),
        ("learning_rate", [SMALLEST, LARGEST], [0.0, SMALLEST / 2, 2 * LARGEST, float("nan")]),
        ("decay_epochs", [1e-9, 1e300], [0.0, float("inf"), float("nan")]),
        ("warmup_epochs", [0.0, 1e300], [-1e-9, float("inf")]),
        ("weight_decay", [0.0, LARGEST], [-1e-9, 2 * LARGEST, float("nan")]),
        ("label_smoothing", [0.0, 1.0], [-1e-9, 1 + 1e-9]),
        ("cutmix_probability", [0.0, 1.0], [-1e-9, 1 + 1e-9]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("tag", ["", "a_b.c+d-1"], ["../up_1", "a b", "a/b"]),
        ("precision", ["float32", "bfloat16"], ["float16"]),
        ("checkpoint_minutes", [1e-9, 1e300], [0.0, -1.0, float("inf"), float("nan")]),
        ("coordinator", ["a:1"], ["here", "a:b", "a:123456"]),
        ("num_processes", [2, 2**31 - 1], [0, 1, 2**31]),
        ("process_id", [0, 1], [-1, 2]),
    ],
)
def test_limits(name, valid, invalid):
    together = {"coordinator": "a:1", "num_processes": 2, "process_id": 1}

    def check(value):
        if name in Experiment.__dataclass_fields__:
            validate(dataclasses.replace(Experiment(), **{name: value}), Launch())
        else:
            launch = together if name in together else {}
            validate(Experiment(), Launch(**launch | {name: value}))

    for value in valid:
        check(value)
    for value in invalid:
        shown = "--process-id is 1" if (name, value) == ("num_processes", 1) else None
        shown = shown or f"{option(name)} is {value!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(shown)}; .*(should|must|can) "):
            check(value)
    if name in together:
        with pytest.raises(ValueError, match=r"--num-processes and --process-id go together"):
            validate(Experiment(), Launch(**{name: together[name]}))


@pytest.mark.parametrize("name", ["out", "data_dir"])
def test_paths(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(parse([option(name), "~/x"])[1], name) == tmp_path / "x"
    for path, problem in [
        ("gs://b/run", "only a local or mounted folder"),
        ("~nosuchuser/x", "give the whole path"),
        ("caf\udce9", "not UTF-8"),
    ]:
        with pytest.raises(ValueError, match=rf"^{option(name)} is .*{problem}"):
            parse([option(name), path])
    (tmp_path / "caf\udce9").mkdir()
    monkeypatch.chdir(tmp_path / "caf\udce9")
    with pytest.raises(ValueError, match=rf"^{option(name)} is .* not UTF-8"):
        parse(["--out", str(tmp_path), option(name), "x"])
    parse(["--out", str(tmp_path), "--data-dir", str(tmp_path)])


def test_a_run_is_repeated_from_its_config_and_other_options_change_it(folder, tmp_path):
    given = ["--config", str(folder / "config.json")]
    experiment, launch = parse(given)
    assert (experiment, launch.resume) == (EXPERIMENT, False)
    assert launch.out == Path("runs", EXPERIMENT.name)
    experiment, launch = parse([*given, "--seed", "4", "--out", "again"])
    assert (experiment, launch.out) == (dataclasses.replace(EXPERIMENT, seed=4), Path("again"))
    with pytest.raises(ValueError, match=r"none/config.json cannot be read"):
        parse(["--config", str(tmp_path / "none" / "config.json")])
    write(folder, schema=2)
    assert parse(given)[0] == EXPERIMENT


@pytest.mark.parametrize("how", ["--resume", "--auto-resume"])
def test_a_resumed_run_has_its_own_options_and_data_and_others_change_it(how, folder, tmp_path):
    kept = {"data_dir": "/data", "checkpoint_minutes": 0.5, "wandb": True, "fsdp": True}
    write(folder, launch=kept | {"out": "moved", "debug": True, "of_another_version": 1})
    experiment, launch = parse([how, "--out", str(folder)])
    assert (experiment, launch.out) == (EXPERIMENT, folder)
    assert (launch.resume, launch.debug) == (True, False)
    assert dataclasses.asdict(launch) | kept | {"data_dir": Path("/data")} == vars(launch)
    experiment, launch = parse([how, "--out", str(folder), "--epochs", "8", "--data-dir", "/other"])
    assert (experiment.epochs, launch.data_dir) == (8, Path("/other"))
    experiment, launch = parse([how, "--out", str(tmp_path / "none")])
    assert (experiment, launch.resume) == (Experiment(), how == "--resume")


def test_only_the_number_of_epochs_may_change(folder):
    check_resumes(dataclasses.replace(EXPERIMENT, epochs=100), folder)
    for name, value in dataclasses.asdict(Experiment()).items():
        if name != "epochs" and value != getattr(EXPERIMENT, name):
            with pytest.raises(ValueError, match=rf"^{option(name)} is {value}, .* started with"):
                check_resumes(dataclasses.replace(EXPERIMENT, **{name: value}), folder)
    with pytest.raises(ValueError, match=r"there is no run in .*none to resume"):
        check_resumes(EXPERIMENT, folder / "none")


@pytest.mark.parametrize("schema", [None, 2, SCHEMA + 1])
def test_a_run_of_another_version_is_not_resumed_and_its_commit_is_named(schema, folder):
    path = write(folder, schema)
    named = rf"^{path} was written by another version .* --out, or .* commit abc$"
    with pytest.raises(ValueError, match=named):
        check_resumes(EXPERIMENT, folder)
    with pytest.raises(ValueError, match=named):
        parse(["--resume", "--out", str(folder)])
    if schema != 2:  # whose options can be repeated
        with pytest.raises(ValueError, match=named):
            parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"config"', "Expecting"),
        (b"\xff\xfe", "'utf-8' codec"),
        *[(text, "no options are in it") for text in ("{}", "[]", "null")],
        ({"schema": SCHEMA, "config": None}, "None; it should be"),
        ({"epochss": 3}, "epochss is unknown"),
        ({"epochs": "7"}, "epochs is '7'; it should be a valid integer"),
        ({"epochs": 0}, "epochs is 0; it should be"),
        ({"seed": True}, "seed is True; it should be a valid integer"),
        ({"model": "resnet21"}, "model is 'resnet21'; it should be 'resnet20', 'resnet56'"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it should be a finite number"),
        ({"schema": SCHEMA, "config": {}, "launch": {"data_dir": 3}}, "data_dir is 3"),
    ],
)
def test_a_damaged_config_is_named_and_left(text, problem, folder):
    path = folder / "config.json"
    if isinstance(text, dict) and "schema" not in text:
        write(folder, **text)
    else:
        text = json.dumps(text) if isinstance(text, dict) else text
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before, launch = path.read_bytes(), "launch" in str(text)
    message = rf"^{re.escape(str(path))} is damaged: .*{problem}.*; put back a copy .* --out$"
    reads = [lambda: parse(["--resume", "--out", str(folder)])]
    reads += [lambda: load(path), lambda: check_resumes(EXPERIMENT, folder)] * (not launch)
    for read in reads:
        with pytest.raises(ValueError, match=message):
            read()
    assert path.read_bytes() == before
    assert experiment_of({"learning_rate": 1}) == Experiment(learning_rate=1)  # others: defaults


def test_the_list_has_a_line_for_each_choice(capsys):
    show_choices("cifar100")
    lines = capsys.readouterr().out.splitlines()
    choices = {"dataset": DATASETS, "model": MODELS, "method": METHODS, "optimizer": OPTIMIZERS}
    expected = [word for name, options in choices.items() for word in (option(name), *options)]
    assert [line.split()[0] for line in lines] == expected
    assert any("ResNet-20: residual network" in line and "275,572" in line for line in lines)
    assert all(len(line.split()) > 3 for line in lines if not line.startswith("--"))
