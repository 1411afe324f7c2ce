"""Only complete runs become records, only complete records count, and all of them are a table."""

import dataclasses
import json
from pathlib import Path

import pytest
from synthetic import ABOUT, record, short, write, write_run

from reproduction import records, replacing
from reproduction.presets import PRESETS
from reproduction.records import table
from reproduction.studies import of_runs
from training.options import Experiment, parse, recipe
from training.record import RecordError

VIT = short(PRESETS["vit"])
EXPERIMENT = VIT.experiments[0]
WHOLE = [record(1), record(2), record(3)]


def make_run(folder: Path, lines: list[dict], experiment: Experiment = EXPERIMENT) -> Path:
    """The output of a run of train.py."""
    folder.mkdir(parents=True)
    about = {"config": dataclasses.asdict(experiment), "launch": {"out": str(folder)}} | ABOUT
    (folder / "config.json").write_text(json.dumps(about))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


BROKEN = [
    (WHOLE[:2], "2 of 3 epochs"),
    ([*WHOLE, record(4, test_accuracy=1.0)], "4 of 3 epochs"),
    ([*WHOLE[:2], record(3, test_accuracy=1.01)], "epoch 3: test_accuracy is 1.01"),
]


@pytest.mark.parametrize(("lines", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_broken_run_is_neither_published_nor_read(lines, message, tmp_path):
    path = tmp_path / "results" / f"{EXPERIMENT.name}.jsonl"
    make_run(tmp_path / "run", lines)
    with pytest.raises(RecordError) as refused:
        records.publish(EXPERIMENT, tmp_path / "run", path, None)
    assert message in str(refused.value)
    assert str(tmp_path / "run" / "metrics.jsonl") in str(refused.value)
    assert not path.parent.exists()  # nothing is written, under no name

    write_run(path, EXPERIMENT, lines)
    with pytest.raises(RecordError) as refused:
        records.read(path.parent)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert str(refused.value).endswith("; delete it to rerun")


NO_DEVICE = {key: value for key, value in ABOUT.items() if key != "device"}
NO_DEVICE |= {"config": dataclasses.asdict(EXPERIMENT), "diverged": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Invalid JSON"),
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        (json.dumps(NO_DEVICE), "device is missing"),
        (
            json.dumps(NO_DEVICE | {"device": "cpu", "schema": 1}),
            "schema is 1; it should be 2 or 3",
        ),
        ('{"schema": 2, "config": {"colour": "red"}}', "config.colour is unknown"),
    ],
)
def test_a_file_that_is_no_record_is_named(text, message, tmp_path):
    (tmp_path / f"{EXPERIMENT.name}.jsonl").write_text(text)
    with pytest.raises(RecordError, match=rf"\.jsonl is not the record of a run: .*{message}"):
        records.read(tmp_path)


def test_a_file_is_named_after_its_run_and_can_be_read(tmp_path):
    write_run(tmp_path / f"{EXPERIMENT.name}.jsonl", EXPERIMENT, WHOLE)
    assert list(records.read(tmp_path)) == [EXPERIMENT.name]
    write_run(tmp_path / "copy.jsonl", EXPERIMENT, WHOLE)
    with pytest.raises(RecordError, match=f"copy.jsonl is the record of {EXPERIMENT.name}; move"):
        records.read(tmp_path)
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(RecordError, match=r"a\.jsonl cannot be read: Is a dir"):
        records.read(tmp_path)


def test_a_run_that_diverged_may_have_fewer_epochs_and_not_more(tmp_path):
    path = tmp_path / f"{EXPERIMENT.name}.jsonl"
    for count in (0, 2):
        write_run(path, EXPERIMENT, WHOLE[:count], diverged="step 25: the training loss is nan")
        assert len(records.read_run(path).records) == count
    more = [*WHOLE, record(4, test_accuracy=1.0)]
    write_run(path, EXPERIMENT, more, diverged="step 45: the training loss is nan")
    with pytest.raises(RecordError, match="4 of 3 epochs"):
        records.read_run(path)


def test_what_is_published_reads_back_names_no_folder_and_can_be_made_again(tmp_path):
    runs = [study.experiments[-1] for study in PRESETS.values()]
    runs.append(dataclasses.replace(recipe("cifar10", "sgd"), batch_size=64))
    for number, experiment in enumerate(runs):
        folder = make_run(tmp_path / str(number), WHOLE[:1], experiment)
        path = tmp_path / "results" / f"{experiment.name}.jsonl"
        records.publish(experiment, folder, path, diverged="step 11")
        run = records.read_run(path)
        assert (run.experiment, len(run.records)) == (experiment, 1)
        assert str(tmp_path) not in path.read_text()
        python, script, *arguments = run.description["command"].split()
        assert (python, script) == ("python", "train.py")
        assert parse(arguments)[0] == experiment


def test_a_file_is_replaced_at_once_or_stays(tmp_path):
    path = tmp_path / "REPORT.md"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as part:
        part.write_text("half \udc80")
    assert path.read_text() == "old"
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# --- The table ------------------------------------------------------------------------------------


def test_the_table_has_what_was_planned_and_what_exists(tmp_path):
    write(VIT, tmp_path, {("vit", "autoscale", "adamw"): [0.5, None]})
    write(VIT, tmp_path / "TPU-v4", {("vit", "none", "adamw"): [0.6]}, device="TPU v4")
    more = dataclasses.replace(EXPERIMENT, seed=9)
    write_run(tmp_path / f"{more.name}.jsonl", more, WHOLE)
    runs = table(VIT, tmp_path)
    columns = ["repeat", "arm", "seed", "state", "planned"]
    assert [tuple(row) for row in runs[columns].to_numpy()] == [
        *(("", "AdamW", seed, "missing", True) for seed in range(3)),
        ("", "AdamW", 9, "finished", False),
        ("", "Autoscale", 0, "finished", True),
        ("", "Autoscale", 1, "diverged", True),
        ("", "Autoscale", 2, "missing", True),
        ("TPU-v4", "AdamW", 0, "finished", True),
        *(("TPU-v4", "AdamW", seed, "missing", True) for seed in (1, 2)),
        *(("TPU-v4", "Autoscale", seed, "missing", True) for seed in range(3)),
    ]
    assert runs["accuracy"].dropna().tolist() == pytest.approx([75.0, 50.0, 60.0])
    assert set(runs["group"]) == {"ViT on digits, AdamW, cpu", "ViT on digits, AdamW, TPU v4"}
    curve = records.by_epoch(runs[runs["arm"] == "Autoscale"][:2], "test_accuracy")
    assert curve.loc[0].tolist() == pytest.approx([0.5 / 3, 1 / 3, 0.5])
    assert list(curve.columns) == [1, 2, 3]
    assert curve.loc[1].isna().all()


def test_a_record_of_another_recipe_is_refused_but_for_the_effect(tmp_path):
    path = tmp_path / f"{EXPERIMENT.name}.jsonl"
    write_run(path, dataclasses.replace(EXPERIMENT, effect=False), WHOLE)
    assert (table(VIT, tmp_path)["state"] == "finished").sum() == 1
    write_run(path, dataclasses.replace(EXPERIMENT, batch_size=32), WHOLE)
    with pytest.raises(ValueError, match=r"batch_size is 32 there and 64 in the study; move it"):
        table(VIT, tmp_path)


def test_runs_of_train_py_are_rows_finished_or_not(tmp_path):
    other = dataclasses.replace(EXPERIMENT, method="autoscale")
    folders = {
        make_run(tmp_path / "a", WHOLE): EXPERIMENT,
        make_run(tmp_path / "b", WHOLE[:2], other): other,
    }
    published = tmp_path / f"{other.name}.jsonl"
    write_run(published, other, WHOLE)
    runs = table(of_runs("mine", folders), tmp_path)
    assert runs["state"].tolist() == ["finished", "unfinished"]
    assert records.read_folder(published).records == records.read_run(published).records
    make_run(tmp_path / "new", [])
    for name, message in (
        ("nowhere", "does not exist; give the folder of a run"),
        ("", "has no config.json; give one that train.py has written"),
        ("new", "has no finished epoch; wait for its first one"),
    ):
        with pytest.raises(ValueError, match=message):
            records.read_folder(tmp_path / name)
