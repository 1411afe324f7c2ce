"""What is counted of a compiled program, and that a number above its budget fails."""

import contextlib
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.accelerators import __main__ as command
from benchmarks.accelerators import budgets, compilers, counts, programs
from benchmarks.accelerators.programs import Case

FOLDER = Path(__file__).parent


def count(text: str, cost: dict[str, float] | None = None) -> dict[str, int]:
    """The counts of a text that are not 0."""
    compiled = SimpleNamespace(
        as_text=lambda: text,
        cost_analysis=lambda: cost,
        memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=7),
    )
    return {name: value for name, value in vars(counts.count(compiled)).items() if value}


def test_counts_of_a_gpus_program():
    """Two launches are in a loop's body and one in its condition; two halves of one are one."""
    convolution, copy, compare = (128 + 128, 4 + 4, 4 + 4 + 1)
    reduction = (2 * 4 * 4 + 4) + (4 * 4 + 2)  # two rows of the eight are read
    gather, part = 16 + (16 + 64), 64 + 16
    assert count((FOLDER / "h100.hlo").read_text()) == {
        "launches": 6,
        "copies": 1,
        "reductions": 1,
        "library_calls": 1,
        "all_gathers": 1,
        "bytes_accessed": convolution + copy + compare + reduction + gather + part,
        "temporary_bytes": 7,
        "largest_result": 128,
    }


def test_counts_of_a_tpus_program():
    """Layouts have parentheses and spaces in them, and fusions have fusions."""
    assert count((FOLDER / "tpu.hlo").read_text(), {"bytes accessed": 1234.0}) == {
        # copy, fusion, convolution, slice, an all-gather in two pieces, two all-reduces (shard_map
        # gives all one channel), comparison, a branch (the other does nothing), permutation
        "launches": 11,
        "copies": 1,
        "convolutions": 1,
        "all_reduces": 2,
        "all_gathers": 1,
        "other_collectives": 1,
        "conditionals": 1,
        "bytes_accessed": 1234,
        "temporary_bytes": 7,
        "largest_result": 2 * 4 * 8 * 8 * 16,
    }


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        count("module @jit_step {\n}")


def cpu_mesh(target: str = "tpu") -> jax.sharding.Mesh:
    del target
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def test_an_all_gather_of_a_real_program_exceeds_its_budget():
    """The standard deviation as one would first write it, and as the library has it."""
    mesh = cpu_mesh()
    split, everywhere = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    grads = {str(i): jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split) for i in range(3)}

    def concatenated(grads):
        return jnp.sort(jnp.concatenate([grad.ravel() for grad in grads.values()]))[:1]

    compiled = jax.jit(concatenated, out_shardings=everywhere).lower(grads).compile()
    counted = vars(counts.count(compiled))
    assert counted["all_gathers"] > 0
    name = "tpu/float32/update/vit/rows/autoscale/alone"
    limits = tomllib.loads((command.FOLDER / "budgets.toml").read_text())["budget"]
    assert any(f"{name}: all_gathers" in line for line in budgets.exceeded({name: counted}, limits))
    harmless = vars(counts.Counts(*[0] * len(counted)))
    assert list(budgets.exceeded({name: harmless}, limits)) == []


def test_a_budget_that_depends_on_another_method():
    names = [f"tpu/float32/update/vit/rows/{method}/adamw" for method in ("clip", "autoscale")]
    limit = {"method": "clip", "times": 1.5, "plus": 3}
    budget = {"why": "Because.", "programs": ["update/autoscale"], "most": {"launches": limit}}
    for launches, lines in ((18, 0), (19, 1)):
        measured = {names[0]: {"launches": 10}, names[1]: {"launches": launches}}
        assert len(list(budgets.exceeded(measured, [budget]))) == lines
    del measured[names[0]]
    assert list(budgets.exceeded(measured, [budget])) == []


def test_selections():
    cases = programs.cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.target for case in budgets.select(cases, ["h100/train"])} == {"h100"}
    both = budgets.select(cases, ["train/resnet20", "vit/eval"])
    assert {(case.kind, case.model) for case in both} == {("train", "resnet20"), ("eval", "vit")}
    with pytest.raises(ValueError, match="'tpu/h100'"):
        budgets.select(cases, ["tpu/h100"])


@pytest.fixture
def on_cpu(monkeypatch):
    """The command, compiling for this machine; its list counts what it compiles."""
    compiled = []

    def compile(lowered, target):
        compiled.append(target)
        return lowered.compile()

    monkeypatch.setattr(compilers, "alone", contextlib.nullcontext)
    monkeypatch.setattr(compilers, "mesh", cpu_mesh)
    monkeypatch.setattr(compilers, "lower", lambda traced, target: traced.lower())
    monkeypatch.setattr(compilers, "compile", compile)
    monkeypatch.setattr(compilers, "versions", lambda target: {"jax": jax.__version__})
    return compiled


def run(folder, *, budgets, **options):
    only = ("tpu/float32/update/vit/rows/autoscale/alone",)
    with pytest.raises(SystemExit) as stop:
        command.main(only, output=folder / "counts.json", budgets=budgets, **options)
    return stop.value.code


def test_the_command_fails_where_one_budget_is_broken(tmp_path, on_cpu, capsys):
    own = command.FOLDER / "budgets.toml"
    assert run(tmp_path, budgets=own) == 0
    (name, counted), *rest = json.loads((tmp_path / "counts.json").read_text())["programs"].items()
    assert not rest
    assert counted["all_reduces"] == 1
    smaller = tmp_path / "budgets.toml"
    smaller.write_text(own.read_text().replace("all_reduces = 1 }", "all_reduces = 0 }", 1))
    assert run(tmp_path, budgets=smaller) == 1
    assert f"{name}: all_reduces 1 > 0. The sums of all layers" in capsys.readouterr().out
    assert on_cpu == ["tpu"]  # once: the program has not changed
    assert run(tmp_path, budgets=own, fresh=True) == 0
    assert on_cpu == ["tpu"] * 2


def test_a_budget_for_no_program_is_refused(tmp_path, on_cpu):
    misspelt = tmp_path / "budgets.toml"
    misspelt.write_text('[[budget]]\nwhy = ""\nprograms = ["update/autoscal"]\nmost = {}\n')
    assert "'update/autoscal'" in run(tmp_path, budgets=misspelt)


@pytest.mark.parametrize(
    ("placement", "shard", "all_reduces"),
    [("replicated", (48, 192), 0), ("rows", (6, 192), 1), ("columns", (48, 24), 1)],
)
def test_updates_are_placed_as_their_names_say(placement, shard, all_reduces):
    case = Case("tpu", "bfloat16", "update", "vit", placement, "centering", "alone")
    compiled = programs.trace(case, cpu_mesh()).lower().compile()
    grads = compiled.input_shardings[0][0]
    assert grads["stem"]["kernel"].shard_shape((48, 192)) == shard
    assert counts.count(compiled).all_reduces == all_reduces
