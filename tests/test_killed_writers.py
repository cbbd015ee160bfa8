"""Writers that are killed at any step leave the old or the new, and the next one sweeps up after them."""

import multiprocessing
import os
import signal

import pytest
from things_on_disk import KIND, names, write_thing

from flash_stu.files import (
    replacing_directory,
    replacing_file,
    verify,
    write_text,
)
from flash_stu.growing import adding_files, growing_directory


def forked(function, *args) -> int:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def write_and_die(path, step, after):
    original, calls = getattr(os, step), iter(range(after))
    setattr(os, step, lambda *args, **kw: original(*args, **kw) if next(calls, None) is not None else die())
    write_text(path / "file", "new")
    write_thing(path / "thing", "new")
    with growing_directory(path / "grow", KIND):
        for _ in range(2):
            with adding_files(path / "grow") as temporary:
                (temporary / "a").write_text("new")


@pytest.mark.parametrize("step", ["fsync", "rename", "replace", "mkdir", "unlink", "rmdir"])
def test_killed_at_any_step_leaves_old_or_new_and_the_next_writer_sweeps(step, tmp_path):
    for after in range(60):
        path = tmp_path / str(after)
        write_text(path / "file", "old")
        write_thing(path / "thing", "old")
        status = forked(write_and_die, path, step, after)
        assert (path / "file").read_text() in ("old", "new")
        write_text(path / "file", "next")
        write_thing(path / "thing", "next")
        verify(path / "thing")
        with growing_directory(path / "grow", KIND), adding_files(path / "grow") as temporary:
            (temporary / "a").write_text("next")
        assert {name for name in names(path) if ".flash_stu-" in name} == set()
        assert (path / "grow/a").read_text() == (path / "file").read_text() == "next"
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0 and after > 0


def test_a_directory_moved_aside_is_put_back(tmp_path):
    path = write_thing(tmp_path / "thing", "old")
    aside = tmp_path / ".thing.flash_stu-01234567.old"
    path.rename(aside)
    with pytest.raises(KeyError), replacing_directory(path, KIND):
        raise KeyError
    assert (path / "sub/file").read_text() == "old" and not aside.exists()


def test_what_is_not_ours_is_not_swept(tmp_path):
    foreign = tmp_path / ".thing.flash_stu-01234567.old"
    foreign.mkdir()
    (foreign / "mine").touch()
    write_thing(tmp_path / "thing")
    mixed = write_thing(tmp_path / ".thing.flash_stu-76543210.old")
    (mixed / "mine").touch()
    write_thing(tmp_path / "thing")
    assert (foreign / "mine").exists() and (mixed / "mine").exists()


def test_a_writer_at_work_is_not_swept(tmp_path):
    with replacing_file(tmp_path / "file") as first:
        write_text(tmp_path / "file", "second")
        first.write_text("first")
    assert (tmp_path / "file").read_text() == "first" and names(tmp_path) == ["file"]
