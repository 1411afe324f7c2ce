"""The pages of the guide, and the code on them."""

import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OPTIONAL = ("equinox", "flax", "haiku", "orbax")


def tokens(path: Path) -> list[Token]:
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    return MarkdownIt().parse(text)


def blocks(path: Path, language: str = "python") -> list[str]:
    fences = (token for token in tokens(path) if token.type == "fence")
    return [token.content for token in fences if token.info.strip() == language]


def run(path: Path) -> dict[str, Any]:
    """Runs a page's blocks in their order, and returns the names that they define."""
    names: dict[str, Any] = {}
    for code in blocks(path):
        for module in OPTIONAL:
            if f"import {module}" in code or f"from {module}" in code:
                pytest.importorskip(module)
        exec(compile(code, path.name, "exec"), names)
    return names
