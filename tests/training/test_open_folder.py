"""A folder that is moved, removed or replaced while it is in use."""

import pytest
from training.open_folder import OpenFolder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    opened = OpenFolder(tmp_path / "run")
    yield opened
    opened.close()


def test_one_that_stays(folder):
    (folder.path / "file").touch()
    folder.check()
    assert folder.is_there()


@pytest.mark.parametrize("replaced", [False, True])
def test_one_that_is_moved(folder, replaced, tmp_path):
    now = folder.path.rename(tmp_path / "it's here")
    if replaced:
        folder.path.mkdir()
    assert not folder.is_there()
    quoted = str(now).replace("'", "'\"'\"'")
    with pytest.raises(FileNotFoundError) as caught:
        folder.check()
    assert str(caught.value) == (
        f"{folder.path} was moved to {now} while the run was in progress; the finished part is "
        f"there: resume with: python train.py --resume --out '{quoted}'"
    )
    if replaced:
        folder.path.rmdir()
    now.rename(folder.path)
    folder.check()


def test_one_whose_parent_is_moved(tmp_path, monkeypatch):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    folder = OpenFolder((tmp_path / "runs" / "run").relative_to(tmp_path / "runs"))
    folder.check()
    (tmp_path / "runs").rename(tmp_path / "others")
    # The relative path still leads there, but no longer the absolute one, that Orbax keeps.
    assert folder.path.exists()
    with pytest.raises(FileNotFoundError, match=f"moved to {tmp_path / 'others' / 'run'} "):
        folder.check()
    folder.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_one_that_is_removed(folder, replaced):
    folder.path.rmdir()
    if replaced:
        folder.path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"was removed while .*; start the run again"):
        folder.check()
