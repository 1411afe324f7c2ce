"""Every Python block of the documentation's pages runs."""

import re
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("quickstart.md", "recipes.md", "behaviour.md", "effect.md", "readings.md")
OPTIONAL = ("equinox", "flax", "haiku", "orbax")


def blocks():
    for page in PAGES:
        sections = re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)
        for section in sections:
            title = section.partition("\n")[0]
            for code in re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE):
                yield pytest.param(page, code, id=f"{page}: {title}")


@pytest.fixture(autouse=True)
def _compile_faster():
    """Nearly all the time goes into compiling programs that run for microseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(("page", "code"), [*blocks()])
def test_block_runs(page, code):
    for module in OPTIONAL:
        if re.search(rf"^(?:import|from) {module}\b", code, re.MULTILINE):
            pytest.importorskip(module)
    exec(compile(code, page, "exec"), {})
