"""`python -m optax_autoscale` shows its environment, and fails if the transformation is wrong."""

import runpy
from functools import partial

import jax
import optax
import pytest

import optax_autoscale


def run(capsys):
    with pytest.raises(SystemExit) as end:
        runpy.run_module("optax_autoscale", run_name="__main__")
    return end.value.code, capsys.readouterr().out


def test_passes_and_names_versions_and_devices(capsys):
    code, out = run(capsys)
    assert code == 0
    for text in (optax_autoscale.__version__, jax.__version__, optax.__version__):
        assert text in out
    assert all(str(device) in out for device in jax.devices())
    assert out.count("\nok ") == 10
    assert f"over {jax.device_count()} device(s)" in out
    assert out.endswith("\nall checks passed\n")


@pytest.mark.parametrize(
    "broken",
    [partial(optax_autoscale.autoscale, eps=0.1), optax_autoscale.scale_by_global_std],
    ids=["another scale", "no centering"],
)
def test_fails_where_the_transformation_is_wrong(broken, capsys, monkeypatch):
    monkeypatch.setattr(optax_autoscale, "autoscale", broken)
    code, out = run(capsys)
    assert code == 1
    assert out.endswith(f"\n{out.count('FAIL ')} of the checks failed\n")
    assert "\nFAIL " in out
