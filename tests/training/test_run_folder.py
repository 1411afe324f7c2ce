"""Which commit a record names: that of the sources, marked where they were changed."""

import shutil
import subprocess

import pytest

from training import run_folder


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_sources(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *names, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source, record = tmp_path / "training" / "run_folder.py", tmp_path / "results" / "run.jsonl"
    for file in (source, record):
        file.parent.mkdir()
        file.write_text("as committed")
    monkeypatch.setattr(run_folder, "__file__", str(source))
    assert run_folder.environment()["commit"] is None
    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    first = git("rev-parse", "HEAD")
    assert run_folder.environment()["commit"] == first
    record.write_text("another record")
    assert run_folder.environment()["commit"] == first
    source.write_text("changed")
    assert run_folder.environment()["commit"] == f"{first}-dirty"


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_folder.environment()["commit"] is None
