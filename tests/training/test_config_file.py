"""The valid contents of `config.json`, and the messages about others."""

import dataclasses
import json
import re

import pytest
from training.config import Experiment, Launch, check_resumes, parse

from training import config
from training.record import SCHEMA

EXPERIMENT = Experiment("cifar10", "vit", "zscore", "sgd", 7, 9, 0.5, 4.5, seed=3, train_size=99)


@pytest.fixture
def folder(tmp_path):
    config.save(tmp_path, EXPERIMENT, Launch(), schema=SCHEMA, commit="abc")
    return tmp_path


def test_it_is_read_as_it_was_written(folder):
    assert config.load(folder) == EXPERIMENT
    assert parse(["--resume", "--out", str(folder)]).experiment == EXPERIMENT
    assert not list(folder.glob("*.part"))


def edited(**options) -> str:
    return json.dumps({"schema": SCHEMA, "config": dataclasses.asdict(EXPERIMENT) | options})


def without(name: str) -> str:
    description = json.loads(edited())
    del description["config"][name]
    return json.dumps(description)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Expecting value"),
        ("{}", "no options are in it"),
        ("[]", "no options are in it"),
        ("null", "no options are in it"),
        (edited()[: len(edited()) // 2], "Expecting|Unterminated"),
        (json.dumps({"schema": SCHEMA, "config": None}), "no options are in it"),
        (edited(epochss=3), "there is no option epochss"),
        (without("seed"), "it lacks seed"),
        (edited(epochs="7"), "epochs is '7', not of type int"),
        (edited(epochs=None), "epochs is None, not of type int"),
        (edited(seed=1.5), "seed is 1.5, not of type int"),
        (edited(seed=True), "seed is True, not of type int"),
        (edited(model=[]), r"model is \[\], not of type str"),
        (edited(train_size="all"), "train_size is 'all', not of type int or NoneType"),
        (edited(model="resnet21"), "--model is 'resnet21'; did you mean 'resnet20'"),
        (edited(epochs=0), "--epochs is 0; it must be"),
        (edited(learning_rate=float("nan")), "--learning-rate is nan; it must be"),
        (edited(batch_size=-1), "--batch-size is -1; it must be"),
    ],
)
def test_a_damaged_file_is_named(text, problem, folder):
    path = folder / "config.json"
    path.write_text(text)
    message = rf"^{re.escape(str(path))} is damaged: {problem}.*; put back a copy .* another --out$"
    for read in (
        lambda: config.load(folder),
        lambda: check_resumes(EXPERIMENT, folder),
        lambda: parse(["--resume", "--out", str(folder)]),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    assert path.read_text() == text


def test_a_file_that_is_not_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config.json is damaged: 'utf-8' codec"):
        config.load(folder)


def test_whole_numbers_may_stand_for_others(folder):
    (folder / "config.json").write_text(edited(learning_rate=1, train_size=None))
    assert config.load(folder) == dataclasses.replace(EXPERIMENT, learning_rate=1, train_size=None)


@pytest.mark.parametrize(("schema", "version"), [(None, "an earlier"), (SCHEMA + 1, "another")])
def test_a_run_of_another_version_is_not_resumed(schema, version, folder):
    path = folder / "config.json"
    description = json.loads(path.read_text()) | {"schema": schema}
    description["config"]["method"] = "adamw"
    if schema is None:
        del description["schema"]
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=rf"^{path} was written by {version} .* commit abc$"):
        parse(["--resume", "--out", str(folder)])
    with pytest.raises(ValueError, match=f"was written by {version} version"):
        parse(["--auto-resume", "--out", str(folder)])


@pytest.mark.parametrize("args", [["--method", "adamw"], ["--method=adamw"]])
def test_the_old_name_of_no_method(args):
    with pytest.raises(ValueError, match=r"^--method adamw is now called none: .*--optimizer"):
        parse([*args, "--optimizer", "sgd"])


def test_auto_resume(folder, tmp_path):
    options = parse(["--auto-resume", "--out", str(folder), "--epochs", "8"])
    assert options.launch.resume
    assert options.experiment == dataclasses.replace(EXPERIMENT, epochs=8)
    options = parse(["--auto-resume", "--out", str(tmp_path / "none")])
    assert not options.launch.resume
    assert options.experiment == Experiment()


def test_options_that_came_later_have_their_defaults(tmp_path):
    options = dataclasses.asdict(Experiment())
    for name in ("warmup_epochs", "tag", "effect"):
        del options[name]
    assert config.experiment_of(options) == Experiment()
