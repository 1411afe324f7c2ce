"""The README's snippets run, and the names in it exist."""

import re
from pathlib import Path

import optax
import pytest

import optax_autoscale

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_snippets_run(index):
    exec(compile(blocks("python")[index], f"README.md, snippet {index}", "exec"), {})


def test_the_optimizer_that_the_first_snippet_replaces_works_too():
    namespace = {}
    exec(blocks("python")[0].replace("# tx", "replaced"), namespace)
    for name in ("replaced", "tx"):
        assert isinstance(namespace[name], optax.GradientTransformation)


def test_the_equations_are_those_of_the_method_page():
    (equations,) = re.findall(r"^\$\$\n.*?^\$\$", README, re.DOTALL | re.MULTILINE)
    assert equations in (ROOT / "docs/method.md").read_text()


def test_the_library_is_mentioned_completely():
    types = {"AutoscaleState", "EffectState", "EffectSums"}
    for name in set(optax_autoscale.__all__) - types - {"default_layer_axes"}:
        assert name in README, name


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
