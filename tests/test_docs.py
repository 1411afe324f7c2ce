"""The code on the pages runs, and their links lead somewhere; `make docs` builds them."""

import json
import re
import tomllib
from pathlib import Path

import optax
import pytest

import optax_autoscale
from tests.pages import DOCS, ROOT, blocks, run, tokens

PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("recipes/*.md"), *DOCS.glob("*.ipynb")])
SOURCES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("[!.]*/README.md")),
    *sorted(ROOT.glob("results/**/*.md")),
    *PAGES,
]
WITH_CODE = [
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
    if blocks(page) and page != DOCS / "training.md"  # tests/test_train.py has the run it needs
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.usefixtures("compile_faster")
@pytest.mark.parametrize("path", WITH_CODE, ids=name)
def test_code_runs(path):
    run(path)


@pytest.mark.usefixtures("compile_faster")
def test_the_readme_says_what_the_meter_measures():
    state = run(ROOT / "README.md")["state"]
    ratio, cosine = (optax.tree.get(state, it) for it in ("norm_ratio", "cosine"))
    assert f'{ratio:.2f}; the "cosine" is {cosine:.2f}' in (ROOT / "README.md").read_text()


def anchors(path: Path) -> set[str]:
    """The addresses of a page's titles, as GitHub and the site make them."""
    parsed = tokens(path)
    headings = (i for i, token in enumerate(parsed) if token.type == "heading_open")
    titles = [parsed[i + 1].content for i in headings]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_links_lead_somewhere(path):
    for token in tokens(path):
        for part in token.children or ():
            address = str(part.attrs.get("href") or part.attrs.get("src") or "https:")
            if not address.startswith(("http:", "https:")):
                file, _, anchor = address.partition("#")
                target = path.parent / file if file else path
                assert target.is_file(), address
                assert not anchor or anchor in anchors(target), address


def test_the_notebook_is_committed_without_output():
    for cell in json.loads((DOCS / "dynamics.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")


def test_the_home_page_shows_a_working_change():
    (diff,) = blocks(DOCS / "index.md", "diff")
    for sign in "-+":
        lines = [line[1:] for line in diff.splitlines() if line[:1] in (sign, " ")]
        names = {}
        exec("\n".join(lines), names)
        assert isinstance(names["tx"], optax.GradientTransformation)


def test_the_commands_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    for path in ROOT / "README.md", ROOT / "CONTRIBUTING.md":
        for target in re.findall(r"^make ([\w-]+)", "\n".join(blocks(path, "sh")), re.MULTILINE):
            assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("path", [page for page in SOURCES if page.name != "pypi.md"], ids=name)
def test_what_is_installed_is_the_clone_and_groups_that_exist(path):
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    for command in re.findall(r"pip install ([^`\n]*)", path.read_text()):
        assert "autoscale" not in command
        assert set(re.findall(r"--group (\S+)", command)) <= set(groups), command
        assert ".[" not in command
    for block in blocks(path, "sh"):  # into an environment of its own, whose pip knows groups
        before, installed, _ = block.partition("pip install -e")
        assert not installed or before.startswith("python -m venv --upgrade-deps .venv && . ")


def test_the_api_page_has_every_public_name():
    documented = re.findall(r"^\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert set(documented) >= set(optax_autoscale.__all__)
