"""`python -m optax_autoscale` shows its environment, and fails if the transformation is wrong."""

import runpy
from functools import partial

import jax
import optax
import pytest

import optax_autoscale


@pytest.mark.parametrize(
    ("method", "failures"),
    [
        (optax_autoscale.autoscale, 0),
        (partial(optax_autoscale.autoscale, eps=0.1), 3),
        (optax_autoscale.scale_by_global_std, 3),
    ],
    ids=["right", "another scale", "no centering"],
)
def test_the_self_check(method, failures, capsys, monkeypatch):
    monkeypatch.setattr(optax_autoscale, "autoscale", method)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("optax_autoscale", run_name="__main__")
    out = capsys.readouterr().out
    for text in (optax_autoscale.__version__, jax.__version__, optax.__version__):
        assert text in out
    assert all(str(device) in out for device in jax.devices())
    assert f"over {jax.device_count()} device(s)" in out
    assert end.value.code == (failures > 0)
    assert out.count("\nok ") + out.count("FAIL ") == 10
    assert (out.count("FAIL ") >= failures) if failures else "FAIL" not in out
    assert f"{out.count('FAIL ')} of the checks failed" in out or "all checks passed" in out
