"""The commit in a record is that of the sources, marked if they were changed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training import provenance

ROOT = Path(provenance.__file__).parents[1]


@pytest.fixture
def git(tmp_path):
    """Calls git in a new repository."""
    if shutil.which("git") is None:
        pytest.skip("needs git")

    def call(*arguments: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return call


def test_the_commit_is_that_of_the_sources(tmp_path, git):
    source, record = tmp_path / "training" / "record.py", tmp_path / "results" / "run.jsonl"
    readme = tmp_path / "README.md"
    for file in (source, record, readme):
        file.parent.mkdir(exist_ok=True)
        file.write_text("as committed")
    assert provenance.commit_of(tmp_path) is None
    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    first = git("rev-parse", "HEAD")
    assert provenance.commit_of(tmp_path) == first
    for written in (record, readme):
        written.write_text("by a study")
    assert provenance.commit_of(tmp_path) == first
    source.write_text("changed")
    assert provenance.commit_of(tmp_path) == f"{first}-dirty"


def test_the_commit_is_the_one_whose_code_runs(tmp_path, git):
    """A commit after the import is not the one that the running program comes from."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").touch()
    shutil.copy(provenance.__file__, tmp_path / "training")
    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    first = git("rev-parse", "HEAD")
    code = (
        "from training import provenance; input('imported');"
        "print(provenance.__file__); print(provenance.environment()['commit'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.read(8) == "imported"
    (tmp_path / "training" / "other.py").write_text("later")
    git("add", ".")
    git("commit", "--message", "second")
    file, commit = process.communicate("\n", timeout=60)[0].split()
    assert Path(file).parent == tmp_path / "training"
    assert commit == first != git("rev-parse", "HEAD")


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit_of(ROOT) is None
