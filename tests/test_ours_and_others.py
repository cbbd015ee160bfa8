"""Whose a file or directory is: what may be replaced or deleted, and what killed writers leave."""

import os

import pytest

from flash_stu import files
from flash_stu.errors import UserError

KIND = "model"


@pytest.fixture
def ours(tmp_path):
    """A directory that this program wrote."""
    with files.replacing_directory(tmp_path / "ours", "model") as folder:
        (folder / "sub").mkdir()
        (folder / "a").write_text("one")
        (folder / "sub" / "b").write_text("two")
    return tmp_path / "ours"


def test_what_nobody_changed_is_deleted(ours, tmp_path):
    assert files.foreign_files(ours) == []
    assert files.delete_directory(ours, KIND)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda folder: (folder / "mine").write_text(""), "mine"),
        (lambda folder: (folder / "sub" / ".hidden").write_text(""), "sub/.hidden"),
        (lambda folder: (folder / "a").write_text("longer"), "a"),
        (lambda folder: (folder / "link").symlink_to("/"), "link"),
        (lambda folder: ((folder / "a").unlink(), (folder / "a").symlink_to("sub/b")), "a"),
        (lambda folder: ((folder / "a").unlink(), os.mkfifo(folder / "a")), "a"),
    ],
)
def test_a_directory_with_anything_else_in_it_stays(ours, change, name):
    change(ours)
    assert files.foreign_files(ours) == [name]
    assert not files.delete_directory(ours, KIND)
    with pytest.raises(UserError, match=f"holds {name}, which"), files.replacing_directory(ours, "model"):
        pass
    assert os.path.lexists(ours / name)


def test_a_directory_without_a_manifest_or_behind_a_link_stays(ours, tmp_path):
    (tmp_path / "link").symlink_to(ours)
    assert not files.delete_directory(tmp_path / "link", KIND)
    (ours / files.MANIFEST).unlink()
    assert not files.delete_directory(ours, KIND)
    assert sorted(os.listdir(ours)) == ["a", "sub"]


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null"):
        with pytest.raises(UserError, match=f"{name} cannot be written: it exists and is not a regular file"):
            files.write_text(tmp_path / name, "text")
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"] and not os.path.isfile(os.devnull)


def test_what_killed_writers_left_is_swept_and_what_they_moved_put_back(tmp_path):
    for name in (".new.flash_stu-00000000.tmp", ".gone.flash_stu-00000000.deleted", ".old.flash_stu-00000000.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        if not name.endswith(".tmp"):
            files.seal(tmp_path / name, "model")
    assert files.is_empty(tmp_path)
    files.sweep_directory(tmp_path)
    assert os.listdir(tmp_path) == ["old"] and not files.is_empty(tmp_path)
    (tmp_path / ".old.flash_stu-00000001.old").mkdir()
    files.sweep_directory(tmp_path)
    files.sweep_directory(tmp_path / "missing")
    assert os.listdir(tmp_path) == ["old"]


def test_what_is_damaged_gets_a_name_that_is_free(tmp_path):
    (tmp_path / "x.damaged").symlink_to("nowhere")
    (tmp_path / "x").touch()
    assert files.set_aside(tmp_path / "x") == tmp_path / "x.damaged-2"
    assert files.damaged_name(tmp_path / "x") == tmp_path / "x.damaged-3"
