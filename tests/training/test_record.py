"""Only complete records are read: epochs 1 to n, once each, with finite numbers."""

import json

import pytest

from training.record import Record, RecordError, parse_records, read_records

GOOD: Record = {
    "epoch": 1,
    "step": 10,
    "train_loss": 2.5,
    "test_loss": 2.0,
    "test_accuracy": 0.5,
    "learning_rate": 1e-3,
    "global_std": 0.01,
    "scale_factor": 0.75,
    "exponent": 2,
    "layer_std": {"stem": 0.1},
    "update_norm_ratio": 0.9,
    "update_cosine": 0.99,
    "update_norm_ratio_by_step": [1.0, 0.9],
    "images_per_second": 640.0,
    "seconds": 1.0,
}


def test_what_was_written_is_read(tmp_path):
    records = [GOOD | {"epoch": epoch, "scale_factor": None} for epoch in (1, 2)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_records(tmp_path) == records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "the record of epoch 3 stands in its place"),
        ({"test_accuracy": 1.5}, "test_accuracy is 1.5, not between 0 and 1"),
        ({"test_accuracy": -0.1}, "test_accuracy is -0.1, not between 0 and 1"),
        ({"train_loss": float("nan")}, "train_loss is nan, not a finite number"),
        ({"train_loss": None}, "train_loss is None, not a finite number"),
        ({"seconds": True}, "seconds is True, not a finite number"),
        ({"global_std": "1"}, "global_std is '1', not a finite number"),
        ({"layer_std": {"stem": float("inf")}}, "layer_std of stem is inf, not a finite number"),
        ({"colour": 1}, "unknown: colour"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_epoch(change, message, tmp_path):
    lines = [json.dumps(GOOD), json.dumps(GOOD | {"epoch": 2} | change)]
    with pytest.raises(RecordError) as caught:
        parse_records(lines, tmp_path / "metrics.jsonl")
    assert str(caught.value) == f"{tmp_path / 'metrics.jsonl'} is damaged: epoch 2: {message}"


def test_keys_that_came_later_read_as_none(tmp_path):
    old = {key: value for key, value in GOOD.items() if not key.startswith("update_")}
    (record,) = parse_records([json.dumps(old)], tmp_path / "metrics.jsonl")
    later = ("update_norm_ratio", "update_cosine", "update_norm_ratio_by_step")
    assert record == old | dict.fromkeys(later)
    assert list(record) == list(Record.__annotations__)


def test_missing_keys_and_torn_lines_are_named(tmp_path):
    missing = {key: value for key, value in GOOD.items() if key not in ("step", "seconds")}
    for line, message in [
        (json.dumps(missing), "missing: seconds, step"),
        (json.dumps(GOOD)[:-5], "Expecting"),
        ("[]", "not a record"),
        ("", "Expecting value"),
    ]:
        with pytest.raises(RecordError, match=f"m.jsonl is damaged: epoch 1: {message}"):
            parse_records([line], tmp_path / "m.jsonl")
