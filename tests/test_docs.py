"""The guide's sources are consistent; `make docs` builds it, and checks the built site."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for kind in ("md", "ipynb") for path in (ROOT / "docs").glob(f"*.{kind}"))
SOURCES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("[!.]*/README.md")),
    *sorted(ROOT.glob("results/**/*.md")),
    *PAGES,
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def cells(path: Path, kind: str) -> list[str]:
    """The sources of a notebook's cells."""
    all_cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in all_cells if cell["cell_type"] == kind]


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    text = "\n\n".join(cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text()
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def slug(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_links_lead_somewhere(path):
    for address in re.findall(r"\]\((?!https?://)([^)]+)\)", prose(path)):
        file, _, anchor = address.partition("#")
        target = path.parent / file if file else path
        assert target.is_file(), address
        if anchor:
            titles = re.findall(r"^#+ (.+)$", prose(target), re.MULTILINE)
            assert anchor in map(slug, titles), address


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_code_compiles(path):
    blocks = r"^```(?:python|\{code-cell\} python)\n(.*?)^```"
    codes = re.findall(blocks, path.read_text(), re.DOTALL | re.MULTILINE)
    for code in cells(path, "code") if path.suffix == ".ipynb" else codes:
        code = re.sub(r"^[:%].*", "", code, flags=re.MULTILINE)  # a cell's options, its magic
        compile(code, path.name, "exec")


def test_the_notebook_is_committed_without_output():
    for cell in json.loads((ROOT / "docs/dynamics.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")


def test_the_home_page_shows_a_working_change():
    (diff,) = re.findall(
        r"^```diff\n(.*?)^```", (ROOT / "docs/index.md").read_text(), re.DOTALL | re.M
    )
    for sign in "-+":
        lines = [line[1:] for line in diff.splitlines() if line[:1] in (sign, " ")]
        namespace = {}
        exec("\n".join(lines), namespace)
        assert isinstance(namespace["tx"], optax.GradientTransformation)


def test_what_a_reading_changes_is_there():
    text = (ROOT / "docs/readings.md").read_text()
    diffs = re.findall(r"`([\w/]+\.py)`[^`]*\n\n```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(diffs) == text.count("```diff") == 2
    for file, diff in diffs:
        removed, added = (
            "".join(line[1:] + "\n" for line in diff.splitlines() if line.startswith(sign))
            for sign in "-+"
        )
        source = (ROOT / file).read_text()
        assert source.count(removed) == 1
        compile(source.replace(removed, added), file, "exec")


def test_normalizing_twice_is_one_normalization_with_the_constants_of_the_page():
    from training.data import DATASETS

    text = (ROOT / "docs/readings.md").read_text()
    (line,) = re.findall(r"^\+ +\*(\(50_000, .*\)),$", text, re.MULTILINE)
    *_, mean, std = eval(line)
    image = np.random.default_rng(0).random((4, 3))
    twice = image
    for name in ("cifar100", "cifar10"):
        twice = (twice - DATASETS[name].mean) / DATASETS[name].std
    np.testing.assert_allclose((image - mean) / std, twice, atol=0.02)


def test_every_page_is_in_the_contents():
    contents = (ROOT / "docs/index.md").read_text().partition("```{toctree}")[2]
    listed = re.findall(r"^(\w+)$", contents, re.MULTILINE)
    assert sorted(listed) == [page.stem for page in PAGES if page.stem != "index"]


def test_the_api_page_has_every_public_name():
    import optax_autoscale

    documented = re.findall(r"^\.\. auto\w+:: (\w+)$", (ROOT / "docs/api.md").read_text(), re.M)
    assert sorted(documented) == sorted(optax_autoscale.__all__)


def check(site: Path) -> tuple[int, list[str]]:
    command = [sys.executable, str(ROOT / "docs/check_site.py"), str(site)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not result.stderr
    return result.returncode, sorted(result.stdout.splitlines())


def test_a_sound_site_passes(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">A</h1> <a href="#top">1</a> <a href="sub/page.html#b%20c">2</a>'
        '<a href="https://example.org">3</a> <img src="sub/picture.svg"> <a href="#">4</a>'
    )
    (tmp_path / "sub/page.html").write_text('<p id="b c">B</p><a href="../index.html">back</a>')
    (tmp_path / "sub/picture.svg").touch()
    (tmp_path / "style.css").write_text("a { background: url(sub/picture.svg) }")
    assert check(tmp_path)[0] == 0


def test_what_is_wrong_with_a_site_is_said(tmp_path):
    (tmp_path / "index.html").write_text(
        '<a href="missing.html">1</a> <a href="#nowhere">2</a> <img src="missing.svg">'
        '<script src="https://example.org/a.js"></script> <link href="//example.org/a.css">'
    )
    (tmp_path / "style.css").write_text('@import "https://example.org/b.css";')
    assert check(tmp_path) == (
        1,
        [
            "index.html links to #nowhere, and that page has no such place",
            "index.html links to missing.html, which does not exist",
            "index.html links to missing.svg, which does not exist",
            "index.html loads //example.org/a.css",
            "index.html loads https://example.org/a.js",
            "style.css loads https://example.org/b.css",
        ],
    )
    assert check(tmp_path / "empty")[0] == 1
