"""The report: numbers worked out by hand, what is in it and what is not, reproducible bytes."""

from pathlib import Path

import numpy as np
import pytest
from synthetic import cifar100, short, write, write_tuned

from reproduction import figures, report
from reproduction.presets import PAPER_METHODS, PRESETS
from reproduction.records import table
from training import data

PLAIN = np.array([0.48, 0.49, 0.50, 0.51, 0.52])
EFFECT = {
    "update_norm_ratio": lambda epoch: 0.8 + epoch / 10,  # 0.9, 1.0, 1.1
    "update_cosine": 0.6,
    "update_norm_ratio_by_step": lambda epoch: [1.0, 0.9, 0.8] if epoch == 1 else None,
}


def written(name: str, folder: Path, outcomes: dict, **changes) -> str:
    """The report of a preset without its figures, which take seconds."""
    study = short(PRESETS[name])
    write(study, folder, outcomes, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: [])
        report.write_report(study, folder)
    return (folder / "REPORT.md").read_text()


def section(text: str, title: str) -> str:
    """The text below a heading, up to the next heading of any level."""
    (found,) = (part for part in text.split("\n#") if part.lstrip("#").startswith(f" {title}"))
    return found


def row(text: str, first: str) -> dict[str, str]:
    """The first row of a table that begins so, by column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    number = next(number for number, line in enumerate(lines) if line[0] == first)
    header = max(i for i, line in enumerate(lines[:number]) if line[0] == "---") - 1
    return dict(zip(lines[header], lines[number], strict=True))


def test_two_arms_are_compared_by_the_paired_test(tmp_path):
    """Worked out by hand, from tables of t."""
    # Differences -1, 0, 4 points: mean 1, deviation sqrt(7), standard error sqrt(7 / 3) = 1.528.
    # t(0.975, 2) = 4.303: 1 -+ 6.57. P(|t_2| > 0.6547) = 0.580.
    plain = np.array([0.80, 0.82, 0.84])
    ours = plain + np.array([-0.01, 0, 0.04])
    text = written(
        "vit", tmp_path, {("vit", "none", "adamw"): plain, ("vit", "autoscale", "adamw"): ours}
    )
    # t(0.975, 2) * 2 / sqrt(3) = 4.97; accuracies of 1/3, 2/3 and all of it by epoch.
    found = row(section(text, "Test accuracy"), "AdamW")
    assert found["accuracy"] == "82.00 ± 2.00"
    assert found["95% interval"] == "77.03 to 86.97"
    assert found["last three epochs"] == "54.67 ± 1.33"
    assert row(section(text, "Test accuracy"), "Autoscale")["$p_t$"] == "2 1 2"
    found = row(section(text, "Every method against"), "Autoscale minus AdamW")
    assert (found["difference (95% interval)"], found["p"]) == ("+1.00 (-5.57 to +7.57)", "0.580")
    assert found["TOST p"] == "0.500"  # at its edge
    assert "Autoscale against every other method" not in text  # there is no other one
    assert row(text, "2 x cpu")["commit"] == "f2f4ca1"


def test_a_run_that_diverged_is_named_and_counted(tmp_path):
    models = ("resnet20", "resnet56")
    accuracies = {(m, method, "adamw"): PLAIN for m in models for method in PAPER_METHODS}
    accuracies["resnet20", "zscore", "adamw"] = [0.5, 0.5, None, None, None]
    text = written("digits", tmp_path, accuracies)
    means = section(text, "Test accuracy")
    assert "- ResNet-20 on digits, AdamW, Z-Score Normalization, seed 3: step 7: the" in means
    found = row(means, "Z-Score Normalization")
    assert (found["n"], found["paper, CIFAR-100"]) == ("2", "59.53")
    found = row(section(text, "Every method against"), "Z-Score Normalization minus AdamW")
    assert found["difference (95% interval)"] == (
        "diverged: 3 and 0; above in 2, below in 3 of 5 seeds"
    )
    assert found["p"] == "1.000"


def test_methods_are_compared_by_test_loss_where_their_validation_loss_is_lowest(tmp_path):
    report.write_report(write_tuned(tmp_path), tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    means = section(text, "Test loss after the last epoch")
    assert "- ResNet-20 on digits, AdamW, AdamW, learning rate 0.001, seed 2: step 7: the" in means
    plain, ours = row(means, "AdamW"), row(means, "Autoscale")
    # A rate at which a run diverged is not chosen, however low the loss of the others.
    assert (plain["learning rate"], plain["validation loss"]) == ("0.002", "0.6000 ± 0.1000")
    assert ours["learning rate"] == "0.004, an end of the grid"
    # A tenth of the differences of `test_two_arms_are_compared_by_the_paired_test`.
    found = row(section(text, "Every arm against AdamW"), "Autoscale minus AdamW")
    assert found["difference (95% interval)"] == "+0.1000 (-0.5572 to +0.7572)"
    assert (found["p"], found["n"]) == ("0.580", "3")
    assert "AdamW with learning rate 0.001, 0.002, 0.004, multiplied" in text


def test_a_preset_chooses_no_learning_rate_before_all_its_runs_are_in(tmp_path):
    study = write_tuned(tmp_path)._replace(preset=True)
    assert table(study, tmp_path)["chosen"].sum() == 6  # three seeds of each method
    (tmp_path / f"{study.experiments[-1].name}.jsonl").unlink()
    assert not table(study, tmp_path)["chosen"].any()
    report.write_report(study, tmp_path)
    assert "| test loss |" not in (tmp_path / "REPORT.md").read_text()


def test_contrasts_of_several_arms_and_the_measured_effect(tmp_path):
    text = written("cifar100", tmp_path, cifar100([0.2, 0.4, 0.3, 0.1, 0.3, 0.2]), **EFFECT)
    found = row(section(text, "A, primary"), "Autoscale minus AdamW")
    assert (found["p"], found["TOST p"]) == ("**0.002**", "< 0.001")  # bold where significant
    mechanism = section(text, "C, the mechanism")
    further = row(mechanism, "Adam + L2, penalty x2.1 minus Adam + L2")
    assert further["difference (95% interval)"].startswith("+2.00")
    middle = row(mechanism, "Autoscale minus the midpoint of Adam + L2 and Adam + L2, penalty x2.1")
    assert middle["difference (95% interval)"].startswith("+1.00")
    assert "Holm" not in further
    assert row(section(text, "What each method did"), "Autoscale") == {
        "method": "Autoscale",
        **{"ratio of norms, first": "0.900", "ratio of norms, last": "1.100"},
        **{"ratio of norms, mean": "1.000"},
        **{f"cosine, {when}": "0.600" for when in ("first", "last", "mean")},
        **{f"1 - cosine², {when}": "0.640" for when in ("first", "last", "mean")},
    }
    assert "ms" not in row(section(text, "Test accuracy"), "AdamW")  # every run was metered


def test_the_primary_test_waits_for_all_of_its_runs_on_each_device(tmp_path):
    study = short(PRESETS["cifar100"])
    write(study, tmp_path / "GPU", cifar100([2.0] * 6), device="GPU")
    text = written("cifar100", tmp_path, cifar100([2.0] * 5))
    cpu, gpu = section(text, "A, primary").split(", GPU**")
    assert "planned runs that are missing: 1." in cpu
    assert "minus" not in cpu
    assert row(gpu, "Autoscale minus AdamW")["difference (95% interval)"] == "+2.00"
    assert (row(text, "2 x cpu")["runs"], row(text, "2 x GPU")["runs"]) == ("39", "40")


def test_a_folder_without_records_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no records; make them without --report"):
        report.write_report(PRESETS["digits"], tmp_path)


def test_the_numbers_of_test_images_are_those_of_the_data():
    assert report.TEST_IMAGES["digits"] == len(data.load("digits").test_labels)
