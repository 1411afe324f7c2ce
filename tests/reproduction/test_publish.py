"""Only complete runs become records of a study, and only complete records count."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import pytest
from training.config import Launch
from training.lock import lock

import reproduce
from reproduction import studies
from reproduction.files import replacing
from reproduction.studies import STUDIES, Grid
from training import config
from training.record import SCHEMA, RecordError, read_records

EXPERIMENT = dataclasses.replace(STUDIES["vit"].experiments()[0], epochs=3)
ABOUT = {
    "schema": SCHEMA,
    "command": "python train.py",
    "num_classes": 10,
    "channels": 1,
    "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"},
    "device": "cpu",
    "device_count": jax.device_count(),
    "commit": None,
}


def record(epoch: int, **changes: object) -> dict[str, object]:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train_loss": 2.5,
        "test_loss": 2.0,
        "test_accuracy": 0.25 * epoch,
        "learning_rate": 1e-3,
        "global_std": 0.01,
        "scale_factor": None,
        "exponent": None,
        "layer_std": {"stem": 0.1, "classifier": 0.2},
        "images_per_second": 640.0,
        "seconds": 1.0,
    } | changes


def make_run(
    folder: Path, records: list[dict[str, object]], about: dict[str, object] = ABOUT
) -> None:
    """The output of a run."""
    folder.mkdir(parents=True)
    config.save(folder, EXPERIMENT, Launch(), **about)
    lines = [json.dumps(line) + "\n" for line in records]
    (folder / "metrics.jsonl").write_text("".join(lines))


def write_record(path: Path, records: list[dict[str, object]], **changes: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = ABOUT | {"config": dataclasses.asdict(EXPERIMENT), "diverged": None} | changes
    path.write_text("".join(json.dumps(line) + "\n" for line in (about, *records)))


WHOLE = [record(1), record(2), record(3)]
BROKEN = [
    (WHOLE[:2], "2 of 3 epochs"),
    ([*WHOLE, record(4)], "4 of 3 epochs"),
    ([record(1), record(2), record(2)], "epoch 3: the record of epoch 2 stands in its place"),
    ([record(1), record(3), record(2)], "epoch 2: the record of epoch 3 stands in its place"),
    ([*WHOLE[:2], record(3, test_accuracy=1.01)], "epoch 3: test_accuracy is 1.01"),
    ([record(1, train_loss=float("inf")), *WHOLE[1:]], "epoch 1: train_loss is inf"),
    ([record(1, train_loss=10**400), *WHOLE[1:]], "epoch 1: int too large"),
    ([record(1, train_loss=[]), *WHOLE[1:]], "epoch 1: train_loss is [], not a finite number"),
    ([record(1, test_accuracy={}), *WHOLE[1:]], "epoch 1: test_accuracy is {}, not a finite"),
    ([record(1, step=10.0), *WHOLE[1:]], "epoch 1: step is 10.0, not an integer"),
    ([record(1, layer_std=0.1), *WHOLE[1:]], "epoch 1: layer_std is 0.1, not a number for each"),
    ([*WHOLE[:2], record(3, layer_std={"stem": 1})], "epoch 3: its layers are not those of epoch"),
]


@pytest.mark.parametrize(("records", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_broken_run_is_neither_published_nor_read(records, message, tmp_path):
    path = tmp_path / "results" / f"{EXPERIMENT.name}.jsonl"
    make_run(tmp_path / "run", records)
    with pytest.raises(RecordError) as refused:
        studies.publish(EXPERIMENT, tmp_path / "run", path, None)
    assert message in str(refused.value)
    assert str(tmp_path / "run" / "metrics.jsonl") in str(refused.value)
    assert not path.parent.exists()  # nothing is written, under no name

    write_record(path, records)
    with pytest.raises(RecordError) as refused:
        studies.read(path.parent)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert str(refused.value).endswith("; delete it to rerun")


@pytest.mark.parametrize("key", [key for key in ABOUT if key != "schema"] + ["diverged"])
def test_a_record_says_what_was_run_and_on_what(key, tmp_path):
    path = tmp_path / f"{EXPERIMENT.name}.jsonl"
    write_record(path, WHOLE)
    first, rest = path.read_text().split("\n", 1)
    about = json.loads(first)
    del about[key]
    path.write_text(f"{json.dumps(about)}\n{rest}")
    with pytest.raises(
        RecordError, match=f"{path.name} is not the record of a run: missing: {key}"
    ):
        studies.read(tmp_path)


def test_a_copy_of_a_record_does_not_count_twice(tmp_path):
    write_record(tmp_path / f"{EXPERIMENT.name}.jsonl", WHOLE)
    assert list(studies.read(tmp_path)) == [EXPERIMENT.name]
    write_record(tmp_path / "copy.jsonl", WHOLE)
    with pytest.raises(RecordError, match=f"copy.jsonl is the record of {EXPERIMENT.name}; move"):
        studies.read(tmp_path)


def test_a_run_that_diverged_may_have_fewer_epochs_and_not_more(tmp_path):
    path = tmp_path / f"{EXPERIMENT.name}.jsonl"
    for count in (0, 2):
        write_record(path, WHOLE[:count], diverged="step 25: the training loss is nan")
        assert len(studies.read_run(path).records) == count
    write_record(path, [*WHOLE, record(4)], diverged="step 45: the training loss is nan")
    with pytest.raises(RecordError, match="4 of 3 epochs"):
        studies.read_run(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"metrics\.jsonl cannot be read: No such file"):
        read_records(tmp_path)
    (tmp_path / f"{EXPERIMENT.name}.jsonl").mkdir()
    with pytest.raises(RecordError, match=rf"{EXPERIMENT.name}\.jsonl cannot be read: Is a dir"):
        studies.read(tmp_path)


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


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two runs of 3 epochs, and `reproduce.py` on them."""
    grid = Grid(EXPERIMENT, ("vit",), ("none", "autoscale"), 1)
    monkeypatch.setitem(STUDIES, "vit", STUDIES["vit"]._replace(grids=(grid,)))
    monkeypatch.chdir(tmp_path)

    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--preset", "vit", *arguments])
        reproduce.main()

    return main


NAMES = ("digits-vit-none-adamw-seed0", "digits-vit-autoscale-adamw-seed0")


def test_a_dry_run_counts_valid_records_and_names_the_others(study, capsys):
    results, runs = Path("results", "vit"), Path("runs", "vit")
    write_record(results / f"{NAMES[0]}.jsonl", WHOLE)
    make_run(runs / NAMES[1], WHOLE[:2])
    study("--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["done", NAMES[0]],
        ["2/3", "epochs", NAMES[1]],
    ]
    assert lines[2].startswith("1 of 2 done, about ")

    write_record(results / f"{NAMES[0]}.jsonl", WHOLE[:2])
    with open(runs / NAMES[1] / "metrics.jsonl", "a") as file:
        file.write('{"epoch"')
    study("--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [["invalid", name] for name in NAMES]
    assert f"{NAMES[0]}.jsonl is not the record of a run: it has 2 of 3 epochs" in lines[2]
    assert "metrics.jsonl is damaged: epoch 3: " in lines[3]
    assert lines[4:] == ["0 of 2 done, time left unknown while records are invalid"]

    with pytest.raises(SystemExit, match=f"{NAMES[0]}.jsonl is not the record of a run"):
        study()


def test_a_run_that_another_process_finished_in_between_is_not_made_again(study, monkeypatch):
    """Between the reading of the records and the lock."""
    made = []

    def lock_late(folder: Path):
        if not made:
            write_record(Path("results", "vit", f"{NAMES[0]}.jsonl"), WHOLE)
        return lock(folder)

    def run(experiment, options) -> None:
        made.append(experiment.name)
        changed = {"config": dataclasses.asdict(experiment)}
        write_record(reproduce.path_of(experiment, options), WHOLE, **changed)

    monkeypatch.setattr(reproduce, "lock", lock_late)
    monkeypatch.setattr(reproduce, "run", run)
    study()
    assert made == [NAMES[1]]
    assert "AdamW" in Path("results", "vit", "REPORT.md").read_text()


def test_the_last_report_of_several_processes_tells_of_all_runs(study, monkeypatch, capsys):
    """Another process publishes a record while the report is written."""
    results, write_report = Path("results", "vit"), reproduce.write_report
    write_record(results / f"{NAMES[0]}.jsonl", WHOLE)

    def write_slowly(*arguments) -> None:
        write_report(*arguments)
        other = dataclasses.asdict(dataclasses.replace(EXPERIMENT, method="autoscale"))
        write_record(results / f"{NAMES[1]}.jsonl", WHOLE, config=other)

    monkeypatch.setattr(reproduce, "write_report", write_slowly)
    study("--report")
    assert "holds the report of 2 runs" in capsys.readouterr().out
    assert "All 2 planned runs" in (results / "REPORT.md").read_text()


def test_an_invalid_record_of_another_study_is_named_before_anything_is_trained(
    tmp_path, monkeypatch
):
    other = tmp_path / "results" / "cpu" / "other.jsonl"
    other.parent.mkdir(parents=True)
    other.write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "train", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--preset", "vit"])
    with pytest.raises(SystemExit, match=r"other\.jsonl is not the record of a run"):
        reproduce.main()
