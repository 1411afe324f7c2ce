"""The examples train successfully."""

import re
import runpy
from pathlib import Path

import matplotlib as mpl
import matplotlib.image
import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(capsys):
    def run(name, **settings):
        runpy.run_path(str(EXAMPLES / name))["main"](**settings)
        return capsys.readouterr().out

    return run


def test_flax_classifier(run):
    out = run("flax_classifier.py", epochs=3)
    accuracies = [float(percent) for percent in re.findall(r"accuracy ([\d.]+)%", out)]
    assert len(accuracies) == 3
    assert accuracies[-1] > 65  # the largest of the four classes is less than half of the points


def test_equinox_recurrent(run):
    out = run("equinox_recurrent.py", epochs=5)
    errors = [float(error) for error in re.findall(r"error ([\d.]+)", out)]
    assert len(errors) == 5
    assert errors[-1] < 0.1  # that of the best constant is 0.225


def test_transformer_gradients(run, tmp_path, monkeypatch):
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    out = run("transformer_gradients.py", steps=20, depth=1)
    (loss,) = re.findall(r"loss ([\d.]+)", out)
    assert float(loss) < 4  # at random it is log(256) = 5.5
    picture = matplotlib.image.imread("transformer_gradients.png")
    assert picture.shape == (900, 1200, 4)
    assert picture.std() > 0.1
