"""The distributions contain the library and nothing else, and their metadata are correct."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import hatchling.build
import pytest
from markdown_it import MarkdownIt

import optax_autoscale

ROOT = Path(__file__).parents[1]
VERSION = optax_autoscale.__version__
NAME = f"optax_autoscale-{VERSION}"

LIBRARY = {f"optax_autoscale/{path.name}" for path in ROOT.glob("optax_autoscale/*.*")}
METADATA = {
    f"{NAME}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
}
SOURCE = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "docs/pypi.md", "pyproject.toml"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        hatchling.build.build_wheel(str(folder))
        hatchling.build.build_sdist(str(folder))
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    return dist / f"{NAME}-py3-none-any.whl"


def test_wheel_has_the_library_alone(wheel):
    assert "optax_autoscale/py.typed" in LIBRARY
    assert set(zipfile.ZipFile(wheel).namelist()) == LIBRARY | METADATA


def test_sdist_has_what_the_wheel_is_built_from(dist, wheel, tmp_path, monkeypatch):
    with tarfile.open(dist / f"{NAME}.tar.gz") as sdist:
        assert set(sdist.getnames()) == {f"{NAME}/{name}" for name in LIBRARY | SOURCE}
        sdist.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / NAME)
    again = tmp_path / hatchling.build.build_wheel(str(tmp_path))
    assert again.read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_it_needs_jax_and_optax_alone(wheel, tmp_path):
    """By its metadata, and by what its import adds to theirs; and it imports public names only."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    required = Distribution.at(tmp_path / f"{NAME}.dist-info").requires or []
    assert [re.split(r"\W", line)[0] for line in required] == ["jax", "optax"]
    for path in tmp_path.glob("optax_autoscale/*.py"):
        imports = re.findall(r"^ *(?:from|import) .*", path.read_text(), re.MULTILINE)
        private = [line for line in imports if re.search(r"[ .]_", line)]
        assert all("optax_autoscale" in line or "as _" in line for line in private), private
    code = """if True:
        import sys
        import jax, optax
        before = set(sys.modules)
        import optax_autoscale
        print(optax_autoscale.__file__)
        print({name.partition(".")[0] for name in set(sys.modules) - before})
    """
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    file, modules = process.stdout.splitlines()
    assert Path(file).parent == tmp_path / "optax_autoscale"
    assert eval(modules) - sys.stdlib_module_names == {"optax_autoscale"}


def test_the_description_on_pypi_has_no_relative_link(wheel):
    text = zipfile.ZipFile(wheel).read(f"{NAME}.dist-info/METADATA").decode()
    description = text.partition("\n\n")[2]
    assert "autoscale(), optax.adamw" in description
    for token in MarkdownIt().parse(description):
        for part in token.children or ():
            address = part.attrs.get("href") or part.attrs.get("src") or "https://"
            assert str(address).startswith("https://"), address


def test_version_is_the_same_everywhere():
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    latest, *_ = re.findall(r"^## (\S+) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest == VERSION


def test_readme_states_the_lowest_versions():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    required = project["dependencies"] + pyproject["dependency-groups"]["train"]
    bounds = dict(line.split(">=") for line in ["python" + project["requires-python"], *required])
    (row,) = re.findall(r"^\| lowest .*", (ROOT / "docs/quickstart.md").read_text(), re.MULTILINE)
    stated = re.findall(r" ([\d.]+) ", row)
    for package, version in zip(("python", "jax", "optax", "flax"), stated, strict=True):
        assert f"{version}.".startswith(f"{bounds[package]}."), package


def test_pre_commit_runs_the_ruff_of_make_lint():
    pins = re.findall(r'"(ruff==.*?)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert pins
    for pin in pins:
        assert f'"{pin}"' in (ROOT / "pyproject.toml").read_text()


def test_workflows_pin_their_actions():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for action in re.findall(r"uses: (.*)", path.read_text()):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action), (path.name, action)
