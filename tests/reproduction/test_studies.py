"""Studies of one's own: their runs, what their folder keeps, and what extends them."""

import dataclasses
from pathlib import Path

import pytest

from reproduction import studies
from reproduction.studies import Axes, Begun, cost, grid, of_grid, of_runs
from training.options import Experiment, recipe

DIGITS = dataclasses.replace(recipe("digits"), epochs=2)


def test_a_grid_has_every_combination_once_and_the_cheapest_first():
    axes = Axes(("none", "zscore"), ("resnet56", "resnet20"), (), (1e-3, 4e-3), (), 2)
    runs = grid(dataclasses.replace(DIGITS, seed=7, tag="x"), axes)
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * 2 * 2
    assert [cost(run) for run in runs] == sorted(map(cost, runs))
    assert {run.model for run in runs[:8]} == {"resnet20"}
    assert [run.seed for run in runs[:8]] == [7] * 4 + [8] * 4
    assert {(run.learning_rate, run.tag) for run in runs} == {(1e-3, "x"), (4e-3, "x-lr0.004")}
    assert {run.epochs for run in runs} == {2}


def test_a_value_that_is_given_twice_counts_once():
    twice = Axes(("none", "none"), learning_rates=(1e-3, 1e-3), seeds=1)
    assert grid(DIGITS, twice) == grid(DIGITS, Axes(("none",), seeds=1))


def test_by_default_a_method_is_compared_with_none_over_five_seeds():
    runs = grid(dataclasses.replace(DIGITS, method="clip"), Axes())
    assert {(run.method, run.seed) for run in runs} == {
        (method, seed) for method in ("none", "clip") for seed in range(5)
    }


def test_each_of_several_optimizers_has_its_default_learning_rate_or_all_of_those_given():
    both = ("adamw", "sgd")
    runs = grid(DIGITS, Axes(optimizers=both, seeds=1))
    assert {(run.optimizer, run.learning_rate, run.tag) for run in runs} == {
        ("adamw", 1e-3, ""),
        ("sgd", 0.1, ""),
    }
    runs = grid(DIGITS, Axes(optimizers=both, learning_rates=(0.1,), seeds=1))
    assert {(run.optimizer, run.learning_rate, run.tag) for run in runs} == {
        ("adamw", 0.1, "lr0.1"),
        ("sgd", 0.1, ""),
    }


@pytest.mark.parametrize("axes", [Axes(learning_rates=(-1.0,)), Axes(weight_decays=(-1.0,))])
def test_an_impossible_value_is_named_with_the_remedy(axes):
    message = r"(learning_rate|weight_decay) is -1\.0; it should be greater than or equal to"
    with pytest.raises(ValueError, match=message):
        grid(DIGITS, axes)


def test_learning_rates_are_groups_and_methods_are_arms():
    study = of_grid("mine", DIGITS, Axes(learning_rates=(1e-3, 4e-3), seeds=1))
    run = study.experiments[-1]
    assert study.group(run) == "ResNet-20 on digits, AdamW, learning rate 0.004"
    assert study.arm(run) == "Autoscale"
    arms = {study.arm(each): each for each in study.experiments}
    (family,) = study.families(arms)
    assert family.contrasts == [{"Autoscale": 1, "AdamW": -1}]
    (family,) = study.families({"A": run, "B": run})  # without none: against the first
    assert family.contrasts == [{"B": 1, "A": -1}]


def named(*experiments: Experiment) -> list[str]:
    folders = {Path("runs", str(number)): each for number, each in enumerate(experiments)}
    study = of_runs("mine", folders)
    return [study.arm(each) for each in study.experiments]


def test_runs_of_train_py_are_told_apart_by_what_differs():
    def like(**options) -> Experiment:
        return dataclasses.replace(DIGITS, **options)

    assert named(like(method="none"), like()) == ["AdamW", "Autoscale"]
    assert named(like(), like(seed=1)) == ["Autoscale"] * 2
    assert named(like(), like(batch_size=32)) == [
        "Autoscale, batch size 64",
        "Autoscale, batch size 32",
    ]
    sgd = like(optimizer="sgd", learning_rate=0.1)  # a default, which the optimizer implies
    assert named(like(method="none"), like(method="none", tag="b"), like()) == [
        *("AdamW", "AdamW, b", "Autoscale")
    ]
    assert named(like(), sgd) == ["Autoscale, AdamW", "Autoscale, SGD"]
    assert named(like(), like()) == ["Autoscale, runs/0", "Autoscale, runs/1"]


def test_the_options_of_a_study_are_kept_in_its_folder(tmp_path):
    assert studies.load(tmp_path) is None
    begun = Begun(DIGITS, Axes(("none", "clip"), seeds=3).resolve(DIGITS), (Path("runs/a"),))
    studies.save(tmp_path / "mine", begun)
    assert studies.load(tmp_path / "mine") == begun
    for text in ("", "[]", '{"axes": {}}', '{"axes": {"colours": []}, "runs": []}'):
        (tmp_path / "mine" / "study.json").write_text(text)
        with pytest.raises(ValueError, match=r"study\.json is damaged: .*another --name"):
            studies.load(tmp_path / "mine")


def test_further_values_extend_a_study_and_other_options_are_refused():
    begun = Begun(DIGITS, Axes(("none", "clip"), seeds=3).resolve(DIGITS), ())
    more = Axes(("none", "zscore"), learning_rates=(4e-3,), seeds=2)
    assert studies.extend("mine", begun, DIGITS, more) == Axes(
        *(("none", "clip", "zscore"), ("resnet20",), ("adamw",), (1e-3, 4e-3), (5e-5,), 3)
    )
    old = {run.name for run in grid(DIGITS, begun.axes)}
    extended = studies.extend("mine", begun, DIGITS, more)
    assert old < {run.name for run in grid(DIGITS, extended)}
    longer = dataclasses.replace(DIGITS, epochs=3)
    with pytest.raises(ValueError, match=r"--epochs is 3, and the study mine .* 2; give the new"):
        studies.extend("mine", begun, longer, Axes())
    with pytest.raises(ValueError, match="cannot have both --learning-rates and the default"):
        studies.extend("mine", begun, DIGITS, Axes(optimizers=("adamw", "sgd")))
