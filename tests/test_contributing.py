"""A method and a model, added exactly as in CONTRIBUTING.md, run in a study and its report."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
# reproduce.py as it is, with a study of the two that takes seconds.
CHILD = """
import dataclasses
from reproduction.studies import STUDIES, Grid
import reproduce
study = STUDIES["vit"]
recipe = dataclasses.replace(study.grids[0].recipe, train_size=96, batch_size=16, epochs=2)
grids = (Grid(recipe, ("patchnet",), ("none", "sign"), 2),)
STUDIES["vit"] = study._replace(grids=grids)
reproduce.main()
"""


def apply(diff: str, file: Path) -> None:
    """Adds each line of a diff that starts with + after or before the line beside it."""
    lines = diff.splitlines()
    added = "".join(f"{line[1:]}\n" for line in lines if line.startswith("+"))
    (context,) = (f"{line[1:]}\n" for line in lines if line.startswith(" "))
    text = file.read_text()
    assert text.count(context) == 1
    before = lines[0].startswith("+")
    file.write_text(text.replace(context, added + context if before else context + added))


def call(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_added_method_and_model_go_through_a_study_to_its_report(tmp_path):
    for name in ("models", "training", "reproduction", "optax_autoscale"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train.py", "reproduce.py"):
        shutil.copy(ROOT / name, tmp_path)
    method, *model = re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL)
    (source,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    apply(method, tmp_path / "training" / "optimizers.py")
    (tmp_path / "models" / "patchnet.py").write_text(source)
    for diff in model:
        apply(diff, tmp_path / "models" / "__init__.py")

    listed = call(tmp_path, "train.py", "--list")
    assert "PatchNet: linear map of patches of 4x4 pixels; 1,738 parameters for digits" in listed
    assert "Sign: the sign of each entry" in listed
    call(tmp_path, "-c", CHILD, "--preset", "vit")
    report = (tmp_path / "results" / "vit" / "REPORT.md").read_text()
    assert "PatchNet on digits" in report
    assert "| Sign | " in report
    (record,) = (tmp_path / "results" / "vit").glob("digits-patchnet-sign-adamw-seed1.jsonl")
    epoch = json.loads(record.read_text().splitlines()[-1])
    assert list(epoch["layer_std"]) == ["patches/kernel", "classifier/kernel"]
    assert (tmp_path / "results" / "vit" / "figure4.png").stat().st_size > 0
