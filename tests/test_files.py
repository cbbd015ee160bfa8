"""Files and directories on disk: whole or not at all, verified, and deleted only if they are ours."""

import errno
import json
import os

import pytest
from safetensors import SafetensorError
from things_on_disk import KIND, fail, names, write_thing

from flash_stu.errors import UserError, WriteError, writing
from flash_stu.files import (
    LOCK,
    MANIFEST,
    check_output,
    delete_directory,
    foreign_files,
    read_manifest,
    replacing_directory,
    replacing_file,
    seal,
    verify,
    write_object,
    write_text,
)
from flash_stu.growing import adding_files, check_growing, growing_directory
from flash_stu.reading import DamagedError, describe, read_object, read_records

# Files


def test_a_file_is_replaced_and_a_link_to_it_stays(tmp_path):
    write_text(tmp_path / "a/b/file", "old")
    (tmp_path / "link").symlink_to("a/b/file")
    write_text(tmp_path / "link", "é")
    assert (tmp_path / "a/b/file").read_text(encoding="utf-8") == "é" and (tmp_path / "link").is_symlink()
    long = tmp_path / ("é" * 127)
    write_text(long, "x")
    write_text(tmp_path / ("é" * 126 + "e"), "y")
    assert long.read_text() == "x" and len(names(tmp_path)) == 6


@pytest.mark.parametrize("step", ["replace", "fsync", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(step, number, tmp_path, monkeypatch):
    (tmp_path / "old").write_text("old")
    fail(monkeypatch, step, number)
    for path in (tmp_path / "old", tmp_path / "new/deep/file"):
        with pytest.raises(WriteError, match=f"^{path} cannot be written: {os.strerror(number)}$"):
            write_text(path, "new")
    assert names(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_an_error_in_the_block_goes_through_and_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), replacing_file(tmp_path / "a/file") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(type(error)), replacing_directory(tmp_path / "b/thing", KIND) as temporary:
        (temporary / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_what_cannot_be_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    before = names(tmp_path)
    refused = [tmp_path, tmp_path / "fifo", tmp_path / "loop", tmp_path / "file/x", tmp_path / "file/x/y"]
    refused += [tmp_path / ("n" * 256), tmp_path / "nul\0", "/"]
    for path in refused:
        with pytest.raises(WriteError, match="cannot be written"):
            write_text(path, "x")
    for path in refused:
        with pytest.raises(UserError):
            check_output(path, KIND)
        with pytest.raises(UserError):
            write_thing(path)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "X cannot be written: No space left on device"),
        (OSError("two\nlines"), "X cannot be written: two"),
        (SafetensorError("I/O error: File too large (os error 27)"), "X cannot be written: File too large"),
        (Exception("Is a directory (os error 21)"), "X cannot be written: Is a directory"),  # of tokenizers
        (WriteError("inner", "Input/output error"), "X cannot be written: Input/output error"),
    ],
)
def test_failures_of_libraries_are_one_line_that_names_the_outermost_target(error, line):
    with pytest.raises(WriteError) as caught, writing("X"):
        raise error
    assert str(caught.value) == line


@pytest.mark.parametrize("error", [UserError("x"), ValueError("x"), Exception("x"), KeyboardInterrupt()])
def test_other_errors_are_not_failures_to_write(error):
    with pytest.raises(type(error)) as caught, writing("X"):
        raise error
    assert caught.value is error


# Directories


def test_a_directory_is_replaced_by_one_of_its_kind_only(tmp_path):
    path = write_thing(tmp_path / "a/thing")
    write_thing(path, "2")
    assert (path / "sub/file").read_text() == "2"
    verify(path)
    assert names(tmp_path) == ["a", "a/thing", f"a/thing/{MANIFEST}", "a/thing/sub", "a/thing/sub/file"]
    with pytest.raises(UserError, match="output .* holds a thing, not a model; choose another, or remove it"):
        check_output(path, "model")
    (tmp_path / "empty").mkdir()
    write_thing(tmp_path / "empty")
    link = tmp_path / "link"
    link.symlink_to("a/thing")
    write_thing(link, "3")
    assert link.is_symlink() and (path / "sub/file").read_text() == "3"


def changes():
    yield "added", lambda path: (path / "notes").touch()
    yield "added below", lambda path: (path / "sub/notes").touch()
    yield "changed", lambda path: (path / "sub/file").write_text("X")
    yield "longer", lambda path: (path / "sub/file").write_text("11")
    yield "a link instead", lambda path: ((path / "sub/file").unlink(), (path / "sub/file").symlink_to("/etc/hostname"))
    yield "a link added", lambda path: (path / "sub/away").symlink_to("/etc")
    yield "a fifo instead", lambda path: ((path / "sub/file").unlink(), os.mkfifo(path / "sub/file"))


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in changes()])
def test_a_directory_that_holds_anything_else_is_never_replaced_or_deleted(change, tmp_path):
    path = write_thing(tmp_path / "thing")
    change(path)
    before = names(tmp_path)
    with pytest.raises(UserError, match=r"output .*thing holds (notes|sub/\w+), which this program did not write"):
        write_thing(path)
    assert not delete_directory(path, KIND)
    assert names(tmp_path) == before
    with pytest.raises(UserError):  # also if it is changed while the new one is being written
        write_while(tmp_path / "other", change)
    assert (tmp_path / "other/sub").is_dir()


def write_while(path, change):
    write_thing(path)
    with replacing_directory(path, KIND):
        change(path)


def test_a_directory_that_only_looks_like_ours_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="exists and was not written by this program; choose another"):
        write_thing(tmp_path)
    assert not delete_directory(tmp_path, KIND) and names(tmp_path) == ["config.json"]


def damages():
    yield "gone", lambda path: path.unlink()
    yield "empty", lambda path: path.write_bytes(b"")
    yield "cut", lambda path: path.write_bytes(path.read_bytes()[:-10])
    yield "not UTF-8", lambda path: path.write_bytes(b"\xff" + path.read_bytes())
    yield "nested", lambda path: path.write_text("[" * 20000)
    yield "digits", lambda path: path.write_text('{"crc32": ' + "9" * 5000 + "}")
    for content in ("7", "[]", "null", "{}", '"x"', '{"crc32": 0}', '{"files": {}, "kind": "thing", "format": 1}'):
        yield content, lambda path, content=content: path.write_text(content)
    for key, value in (("files", {}), ("kind", "model"), ("format", 2), ("crc32", "x"), ("extra", 1)):
        yield key, lambda path, change={key: value}: path.write_text(json.dumps(json.loads(path.read_text()) | change))
    yield "a directory", lambda path: (path.unlink(), path.mkdir())


@pytest.mark.parametrize("damage", [pytest.param(damage, id=name) for name, damage in damages()])
def test_a_damaged_manifest(damage, tmp_path):
    path = write_thing(tmp_path / "thing")
    damage(path / MANIFEST)
    for read in (read_manifest, verify, foreign_files):
        with pytest.raises((OSError, DamagedError)):
            read(path)
    with pytest.raises(UserError, match="exists and was not written by this program"):
        check_output(path, KIND)
    with pytest.raises(UserError, match="exists and was not written by this program"):
        check_growing(path, KIND)
    assert not delete_directory(path, KIND) and (path / "sub/file").exists()


def test_a_manifest_with_a_checksum_but_without_its_entries_is_damaged(tmp_path):
    for content in ({}, {"format": 1, "kind": KIND}, {"format": 1, "kind": KIND, "files": []}, {"format": "1"}):
        write_object(tmp_path / MANIFEST, content)
        with pytest.raises(DamagedError):
            read_manifest(tmp_path)


def test_every_flipped_bit_of_a_file_or_its_manifest_is_noticed(tmp_path):
    path = write_thing(tmp_path / "thing", "some text")
    for file in (path / "sub/file", path / MANIFEST):
        content = file.read_bytes()
        for place in range(len(content)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            with pytest.raises((DamagedError, OSError)):
                verify(path)
                assert json.loads(file.read_bytes()) != json.loads(content)  # it was white space
                pytest.fail(f"byte {place} of {file.name}")
            file.write_bytes(content)
    verify(path)


def test_seal_and_verify_name_the_file(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(OSError, match="a is not as it was written"):
        seal(tmp_path, KIND, {"a": {"bytes": 2, "crc32": 0}})
    with pytest.raises(FileNotFoundError):
        seal(tmp_path, KIND, {"c": {"bytes": 2, "crc32": 0}})
    seal(tmp_path, KIND, {name: describe(tmp_path / name) for name in "ab"})
    (tmp_path / "a").write_text("A")
    (tmp_path / "b").write_text("bb")
    verify(tmp_path, [])
    with pytest.raises(DamagedError, match="a was altered: its checksum differs"):
        verify(tmp_path, ["a"])
    with pytest.raises(DamagedError, match="b has 2 bytes instead of 1"):
        verify(tmp_path, ["b"])
    (tmp_path / "a").unlink()
    with pytest.raises(DamagedError, match="a cannot be read: No such file"):
        verify(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("step", ["rename", "rename of the new", "fsync", "mkdir"])
def test_the_old_directory_stays_if_the_new_one_fails(step, number, tmp_path, monkeypatch):
    write_thing(tmp_path / "thing", "old")
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        if step == "rename of the new":
            fail(patch, "rename", number, lambda source, _: str(source).endswith(".tmp"))
        else:
            fail(patch, step, number)
        with pytest.raises(WriteError, match=f"^output .*thing cannot be written: {os.strerror(number)}$"):
            write_thing(tmp_path / "thing", "new")
    assert names(tmp_path) == before and (tmp_path / "thing/sub/file").read_text() == "old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_in_a_growing_directory_loses_nothing(step, tmp_path, monkeypatch):
    path, failed = tmp_path / "grow", 0
    with growing_directory(path, KIND):
        with adding_files(path) as temporary:
            (temporary / "a").write_text("old")
        for after in range(20):
            calls = iter(range(after))
            with monkeypatch.context() as patch:
                fail(patch, step, when=lambda *_, calls=calls: next(calls, None) is None)
                try:
                    with adding_files(path) as temporary:
                        (temporary / "a").write_text(f"new {after}")
                        (temporary / "b").write_text("new")
                except WriteError as error:
                    failed += 1
                    assert str(error) == f"output {path} cannot be written: No space left on device"
            check_growing(path, KIND)  # the old and the new content are both ours
            assert set(names(path)) <= {"a", "b", MANIFEST, LOCK}
    assert 2 < failed < 20 and (path / "a").read_text() == "new 19"


# Growing directories


def test_files_are_added_and_others_stay(tmp_path):
    path = tmp_path / "x/grow"
    with growing_directory(path, KIND, names=["a"]):
        for text in ("1", "2"):
            with adding_files(path) as temporary:
                (temporary / "deep").mkdir()
                (temporary / "deep/a").write_text(text)
    (path / "notes").write_text("mine")
    with growing_directory(path, KIND, names=["deep/a"]), adding_files(path) as temporary:
        (temporary / "b").write_text("3")
    assert names(path) == [MANIFEST, "b", "deep", "deep/a", "notes"]
    assert (path / "deep/a").read_text() == "2" and foreign_files(path) == ["notes"]

    with pytest.raises(UserError, match="--output .*grow holds notes, which this program did not write"):
        check_growing(path, KIND, "--output", ["notes"])
    with growing_directory(path, KIND), pytest.raises(UserError, match="holds notes"), adding_files(path) as temporary:
        (temporary / "notes").write_text("ours")
    assert (path / "notes").read_text() == "mine"
    with pytest.raises(UserError, match="holds a thing, not a model"):
        check_growing(path, "model")

    (path / "b").write_text("edited")
    with pytest.raises(UserError, match="holds b, which"), growing_directory(path, KIND):
        pass
    (path / "b").unlink()
    check_growing(path, KIND)


def test_a_growing_directory_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(KeyError), growing_directory(tmp_path / "a/b", KIND):
        assert names(tmp_path) == ["a", "a/b", f"a/b/{MANIFEST}", f"a/b/{LOCK}"]
        raise KeyError
    assert names(tmp_path) == []
    with growing_directory(tmp_path / "a", KIND):
        pass
    assert names(tmp_path) == ["a"]
    (tmp_path / "a/notes").touch()
    with pytest.raises(UserError, match="a exists and was not written by this program"):
        check_growing(tmp_path / "a", KIND)


# JSON


def test_objects_with_a_checksum(tmp_path):
    content = {"a": [1, 2.5, None, "é\ud800"], 7: {"10": float("inf"), "9": True}}
    write_object(tmp_path / "x", content)
    assert read_object(tmp_path / "x") == json.loads(json.dumps(content))
    (tmp_path / "x").write_text((tmp_path / "x").read_text().replace("2.5", "2.4"))
    with pytest.raises(DamagedError, match="x is damaged"):
        read_object(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "y")


def test_records_are_read_whatever_is_between_them(tmp_path):
    lines = [b'{"a": 1}', b"7", b"", b"\xff", b'{"a": ', b"[" * 20000, b'{"a": "\xe2\x80\xa8"}', b"[]", b'{"b": 2}']
    (tmp_path / "x").write_bytes(b"\n".join(lines))
    assert read_records(tmp_path / "x") == ([{"a": 1}, {"a": "\u2028"}, {"b": 2}], [2, 4, 5, 6, 8])
    assert read_records(tmp_path / "missing") == ([], [])
