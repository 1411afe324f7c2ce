"""Only complete records are read, and they name the commit of the sources that made them."""

import json
import shutil
import subprocess
from typing import Any

import pytest

from training.record import Record, RecordError, commit_of, parse_records, read_records

GOOD: Any = {"epoch": 1, "step": 10, "train_loss": 2.5, "test_loss": 2.0, "test_accuracy": 0.5}
GOOD |= {"learning_rate": 1e-3, "global_std": 0.01, "scale_factor": 0.75, "scale_factor_max": 0.875}
GOOD |= {"exponent": 2, "layer_std": {"stem": 0.1}, "update_norm_ratio": 0.9, "update_cosine": 0.99}
GOOD |= {"validation_loss": 1.5, "validation_accuracy": 0.625}
GOOD |= {"update_norm_ratio_by_step": [1.0, 0.9], "images_per_second": 640.0, "seconds": 1.0}


def test_what_was_written_is_read(tmp_path):
    nothing = {"scale_factor": None, "scale_factor_max": None, "exponent": None}
    records = [GOOD, GOOD | nothing | {"epoch": 2, "seconds": 2}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_records(tmp_path) == records
    with pytest.raises(RecordError, match=r"none/metrics.jsonl cannot be read: No such file"):
        read_records(tmp_path / "none")
    # Keys that came later read as None.
    later = {key for key in GOOD if key.startswith(("update_", "validation_"))}
    later |= {"scale_factor_max"}
    old = {key: value for key, value in GOOD.items() if key not in later}
    (record,) = parse_records([json.dumps(old)], tmp_path / "metrics.jsonl")
    assert record == old | dict.fromkeys(later)
    assert set(record) == set(Record.__annotations__)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"epoch": 3}, "the record of epoch 3 stands in its place"),
        ({"test_accuracy": 1.5}, "test_accuracy is 1.5; it should be less than or equal to 1"),
        ({"train_loss": float("nan")}, "train_loss is nan; it should be a finite number"),
        ({"train_loss": None}, "train_loss is None; it should be a valid number"),
        ({"seconds": True}, "seconds is True; it should be a valid number"),
        ({"global_std": "1"}, "global_std is '1'; it should be a valid number"),
        ({"layer_std": {"stem": float("inf")}}, "layer_std.stem is inf; it should be a finite"),
        ({"layer_std": {"head": 0.1}}, "its layers are not those of epoch 1"),
        ({"colour": 1}, "colour is unknown"),
        (json.dumps({key: GOOD[key] for key in GOOD if key != "step"}), "step is missing"),
        (json.dumps(GOOD)[:-5], "Expecting"),
        ("[]", ".*it should be a valid dictionary"),
        (b"\xff", "'utf-8' codec"),
        ("[" * 100_000, ".*recursion"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_epoch(second, message, tmp_path):
    if isinstance(second, dict):
        second = json.dumps(GOOD | {"epoch": 2} | second)
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(RecordError, match=f"^{path} is damaged: epoch 2: {message}"):
        parse_records([json.dumps(GOOD), second], path)


@pytest.fixture
def sources(tmp_path):
    """A folder of sources, not yet in a repository."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    for name in ("training/record.py", "results/run.jsonl", "README.md"):
        (tmp_path / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sources" / name).write_text("as committed")
    return tmp_path / "sources"


def git(folder, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder) -> str:
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "--allow-empty", "--message", "one")
    return git(folder, "rev-parse", "HEAD")


def test_the_commit_is_that_of_the_sources_and_says_whether_they_changed(sources, capsys):
    first = commit(sources)
    assert commit_of(sources) == first
    for name in ("results/run.jsonl", "README.md", "notes.txt"):
        (sources / name).write_text("by a study, or not part of the sources")
    assert commit_of(sources) == first
    (sources / "training" / "record.py").write_text("changed")
    assert commit_of(sources) == f"{first}-dirty"
    (sources / ".git" / "index").write_bytes(b"corrupt")
    assert capsys.readouterr().err == ""
    assert commit_of(sources) is None  # what cannot be compared is not called clean
    assert f"the commit of {sources} will not be recorded: " in capsys.readouterr().err


def test_the_commit_is_never_that_of_another_repository(sources, tmp_path, monkeypatch):
    assert commit_of(sources) is None
    commit(tmp_path)  # the sources lie inside of it
    assert commit_of(sources) is None
    git(sources, "init")
    assert commit_of(sources) is None  # a repository without commits
    first, other = commit(sources), tmp_path / "other"
    other.mkdir()
    commit(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert commit_of(sources) == first


@pytest.mark.parametrize("there", ["nothing", "a failure"])
def test_a_git_that_does_not_run_is_said_and_nothing_is_recorded(
    there, sources, tmp_path, monkeypatch, capsys
):
    commit(sources)
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    if there == "a failure":
        program.write_text("#!/bin/sh\necho dubious ownership >&2\nexit 128\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert commit_of(sources) is None
    said = capsys.readouterr().err
    assert said.startswith(f"the commit of {sources} will not be recorded: ")
    assert said.count("\n") == 1
    assert ("dubious ownership" in said) == (there == "a failure")
