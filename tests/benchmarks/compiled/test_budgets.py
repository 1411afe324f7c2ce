import json
import tomllib

import jax
import pytest
from jax.sharding import AxisType

from benchmarks.compiled import __main__ as command
from benchmarks.compiled import budgets, compilers, programs
from benchmarks.compiled.programs import Case

UPDATE = Case("tpu", "bfloat16", "update", "vit", "columns", "autoscale")


def test_no_recorded_number_is_above_its_budget():
    recorded = json.loads(command.COUNTS.read_text())["programs"]
    measured = {case: recorded.pop(case.name) for case in programs.cases()}
    assert recorded == {}
    limits = tomllib.loads(command.BUDGETS.read_text())["budget"]
    assert list(budgets.exceeded(measured, limits)) == []


def test_a_budget_that_depends_on_another_method():
    most = {"launches": {"method": "clip", "times": 1.5, "plus": 3}}
    budget = {"why": "Because.", "programs": ["update/autoscale"], "most": most}
    clip = {UPDATE._replace(method="clip"): {"launches": 10}}
    for launches, lines in ((18, 0), (19, 1)):
        measured = {UPDATE: {"launches": launches}}
        assert len(list(budgets.exceeded(clip | measured, [budget]))) == lines
        assert list(budgets.exceeded(measured, [budget])) == []


def test_the_command(monkeypatch, tmp_path, capsys):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    monkeypatch.setattr(compilers, "mesh", lambda target: mesh)
    monkeypatch.setattr(compilers, "PLATFORMS", {"tpu": "cpu"})
    monkeypatch.setattr(compilers, "PACKAGES", {"tpu": ("jax",)})
    monkeypatch.setattr(command, "COUNTS", tmp_path / "counts.json")
    monkeypatch.setattr(command, "BUDGETS", tmp_path / "budgets.toml")

    def run(only: str, selection: str = "update") -> object:
        budget = f'programs = ["{selection}"]\nmost = {{ all_reduces = 1 }}'
        command.BUDGETS.write_text(f'[[budget]]\nwhy = "Because."\n{budget}')
        with pytest.raises(SystemExit) as stop:
            command.main((only,))
        return stop.value.code

    assert run(UPDATE.name) == 0
    counted = json.loads(command.COUNTS.read_text())["programs"]
    assert {name: numbers["all_reduces"] for name, numbers in counted.items()} == {UPDATE.name: 1}
    counted[UPDATE.name]["all_reduces"] = 2  # stays, as the program has not changed
    command.COUNTS.write_text(json.dumps({"programs": counted}))
    assert run(UPDATE.name) == 1
    assert f"{UPDATE.name}: all_reduces 2 > 1. Because." in capsys.readouterr().out
    assert "'update/autoscal'" in str(run(UPDATE.name, "update/autoscal"))
    assert "'tpu/h100'" in str(run("tpu/h100"))
