"""Locks on directories: held for the life of a process, released by its death."""

import errno
import multiprocessing
import os
import signal
import socket

import pytest
from things_on_disk import fail, names

from flash_stu import files
from flash_stu.errors import UserError, WriteError
from flash_stu.files import (
    LOCK,
    write_text,
)
from flash_stu.locks import holding


def hold(path, connection):
    with holding(path, "run"):
        connection.send(os.getpid())
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a directory."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(tmp_path / "run", sender))
    process.start()
    assert receiver.poll(60)
    yield process
    process.kill()
    process.join()


def test_a_directory_is_held_until_its_holder_dies(holder, tmp_path):
    words = f"^run {tmp_path / 'run'} is in use by process {holder.pid} on host {socket.gethostname()}$"
    for _ in range(2):
        with pytest.raises(UserError, match=words), holding(tmp_path / "run", "run"):
            pass
    holder.kill()
    holder.join()
    for _ in range(2):
        with holding(tmp_path / "run", "run"):
            assert f"process {os.getpid()} " in (tmp_path / "run" / LOCK).read_text()
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} "), holding(tmp_path / "run", "run"):
                pass
    assert names(tmp_path) == ["run"]


def test_a_lock_is_not_kept_by_processes_that_were_forked(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    with holding(tmp_path / "run", "run"):
        process.start()
    with holding(tmp_path / "run", "run"):
        process.kill()
        process.join()


def test_damaged_and_unwritable_locks(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_bytes(b"\0" * 40)
    with holding(tmp_path, "run"):
        (tmp_path / LOCK).write_bytes(b"\xff\n\0")
        with pytest.raises(UserError, match="is in use by .") as caught, holding(tmp_path, "run"):
            pass
        assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/x", tmp_path / "nul\0"):
        with pytest.raises(WriteError, match="^run .* cannot be written: "), holding(path, "run"):
            pass
    with monkeypatch.context() as patch:
        fail(patch, "pwrite")
        with pytest.raises(WriteError, match="No space left"), holding(tmp_path / "new/run", "run"):
            pass
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("content", [b"mine", b"process 7", b"\xff\n", b"process 7 on host a\nmine"])
def test_a_lock_file_of_the_users_stays(content, tmp_path):
    (tmp_path / LOCK).write_bytes(content)
    with pytest.raises(UserError, match="holds .lock, which this program did not write"), holding(tmp_path, "run"):
        pass
    assert (tmp_path / LOCK).read_bytes() == content


def test_a_lock_file_that_leads_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / LOCK).symlink_to("thesis.tex")
    with pytest.raises(WriteError, match="cannot be written"), holding(tmp_path, "run"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "mine" and (tmp_path / LOCK).is_symlink()


def test_a_file_system_without_locks_holds_nobody_off(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with holding(tmp_path / "run", "run"):
        write_text(tmp_path / "run/file", "x")
    assert names(tmp_path) == ["run", "run/file"]
