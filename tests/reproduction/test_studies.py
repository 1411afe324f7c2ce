import dataclasses
import json
from collections import Counter
from itertools import groupby

import pytest

from reproduction import studies
from reproduction.studies import STUDIES, compressed, cost, name
from training.config import Config, recipe
from training.optimizers import learning_rate_schedule


def test_the_papers_study_is_section_5_of_the_paper():
    cells = STUDIES["paper"].cells(seeds=1)
    assert Counter((cell.dataset, cell.epochs) for cell in cells) == {
        ("cifar100", 200): 3 * 5,
        ("cifar10", 300): 3,
    }
    for cell in cells:
        changed = {"model": cell.model, "method": cell.method}
        assert cell == dataclasses.replace(recipe(cell.dataset), **changed)


def test_the_same_study_at_any_scale_ends_at_the_same_learning_rate():
    full = recipe("cifar100")
    ends = []
    for config in (full, compressed(full, 5), compressed(full, 20)):
        schedule = learning_rate_schedule(config, steps_per_epoch=195)
        ends.append(float(schedule(config.epochs * 195 - 1)))
    assert ends == pytest.approx([1e-3 * 0.75**6] * 3)


@pytest.mark.parametrize("study", STUDIES)
def test_runs_go_by_cost_and_then_by_seed_with_all_methods_of_each(study):
    cells = STUDIES[study].cells()
    assert len({name(cell) for cell in cells}) == len(cells)
    assert [cost(cell) for cell in cells] == sorted(map(cost, cells))
    for _, equal in groupby(cells, key=cost):
        seeds = [(seed, len(list(runs))) for seed, runs in groupby(equal, key=lambda c: c.seed)]
        assert [seed for seed, _ in seeds] == list(range(len(seeds)))
        assert len({count for _, count in seeds}) == 1


def test_what_is_published_reads_back_and_names_no_folder(tmp_path):
    cell = STUDIES["cpu"].cells()[0]
    config = dataclasses.replace(cell, out=tmp_path / "run", data_dir=tmp_path / "data")
    config.folder.mkdir()
    config.save(device="cpu", command=f"python reproduce.py --data-dir {tmp_path}")
    records = [{"epoch": 1, "test_accuracy": 0.125}, {"epoch": 2, "test_accuracy": 0.5}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (config.folder / "metrics.jsonl").write_text(lines)

    path = tmp_path / "results" / "run.jsonl"
    run = studies.publish(config, path, diverged=None)
    assert (run.cell, run.records) == (cell, records)
    assert studies.read(path.parent) == [run]
    assert str(tmp_path) not in path.read_text()


def test_the_published_command_makes_the_same_run(tmp_path, monkeypatch):
    from training.config import parse

    cells = [study.cells()[-1] for study in STUDIES.values()]
    cells.append(compressed(recipe("cifar100"), 20))  # as many epochs as digits have by default
    cells.append(dataclasses.replace(recipe("cifar10", "sgd"), batch_size=64))
    for number, cell in enumerate(cells):
        config = dataclasses.replace(cell, out=tmp_path / str(number))
        config.folder.mkdir()
        config.save()
        run = studies.publish(config, tmp_path / "run.jsonl", diverged="step 3")
        python, script, *arguments = run.description["command"].split()
        assert (python, script) == ("python", "train.py")
        assert parse(arguments) == cell


def test_a_file_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "digits-resnet20-adamw-seed0.jsonl"
    for text in ("", "{", '{"config": {"model": "resnet20", "colour": "red"}}\n', "[]\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"seed0\.jsonl is not the record of a run"):
            studies.read(tmp_path)


def test_every_configuration_of_a_study_is_valid():
    for study in STUDIES.values():
        for cell in study.cells():
            assert isinstance(cell, Config)
            cell.validate()
