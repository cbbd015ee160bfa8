"""Which files of a dataset are read, which are left out, and that the user hears of it."""

import bz2
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from flash_stu.data import DataConfig, iter_documents, load_tokenizer, prepare
from flash_stu.data.local import find_files
from flash_stu.errors import UserError


def jsonl(*texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path: Path, *texts) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(*texts))
    return path


def texts(dataset) -> list[str]:
    return sorted(text for _, text in iter_documents(DataConfig(dataset=str(dataset))))


def refusal(dataset) -> str:
    with pytest.raises(UserError) as caught:
        texts(dataset)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def linked(tmp_path) -> Path:
    """A dataset half of which is behind links, with every kind of loop."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write(data / "a.jsonl", "a")
    write(data / "sub" / "b.jsonl", "b")
    write(elsewhere / "c.jsonl", "c")
    write(elsewhere / "deep" / "d.jsonl", "d")
    write(tmp_path / "single.jsonl", "e")
    (data / "linked").symlink_to(elsewhere)
    (data / "again").symlink_to(data / "sub")
    (data / "0loop").symlink_to(data)
    (data / "sub" / "up").symlink_to("..")
    (elsewhere / "back").symlink_to(data)
    (elsewhere / "self").symlink_to(".")
    (data / "file-link.jsonl").symlink_to(tmp_path / "single.jsonl")
    (data / "copy.jsonl").symlink_to(data / "a.jsonl")
    return data


@pytest.mark.parametrize("pattern", ["", "*", "**", "**/*.jsonl", "*/../**/*.jsonl"])
def test_links_are_followed_once(linked, pattern):
    assert texts(linked / pattern) == ["a", "b", "c", "d", "e"]


def test_a_file_keeps_the_name_that_needs_no_link(linked):
    names = [name for name, _ in find_files(str(linked)).train]
    assert names == ["a.jsonl", "file-link.jsonl", "linked/c.jsonl", "linked/deep/d.jsonl", "sub/b.jsonl"]


def test_a_dataset_that_is_a_link(linked, tmp_path):
    (tmp_path / "link").symlink_to(linked)
    assert texts(tmp_path / "link") == texts(linked)
    (tmp_path / "link.jsonl").symlink_to(linked / "a.jsonl")
    write(tmp_path / "other.jsonl", "x")
    assert texts(tmp_path / "link.jsonl") == ["a"]


def test_many_links_to_each_other_take_no_time(tmp_path):
    for name in "abcdefgh":
        write(tmp_path / name / "x.jsonl", name)
        for other in "abcdefgh":
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    assert texts(tmp_path) == texts(tmp_path / "**" / "*.jsonl") == list("abcdefgh")


def test_what_is_left_out_is_named_with_the_reason(tmp_path):
    write(tmp_path / "train-0.jsonl", "a")
    write(tmp_path / "train-1.JSONL.GZ").write_bytes(gzip.compress(jsonl("b")))
    write(tmp_path / "test.jsonl", "c")
    write(tmp_path / "extra.jsonl", "d")
    write(tmp_path / ".hidden.jsonl", "e")
    write(tmp_path / ".git" / "f.jsonl", "f")
    write(tmp_path / "sub" / "README.md", "g")
    write(tmp_path / "LICENSE", "h")
    (tmp_path / "train-empty.jsonl").touch()
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "circle.jsonl").symlink_to("circle.jsonl")
    (tmp_path / "twice.jsonl").symlink_to("train-0.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert texts(tmp_path) == ["a", "b"]
    assert find_files(str(tmp_path)).summary() == (
        "2 files read, 11 left out: 2 broken links (circle.jsonl), 2 hidden (.git), 2 of unknown ending (LICENSE), "
        "1 empty (train-empty.jsonl), 1 named test (test.jsonl), 1 not named train as others are (extra.jsonl), "
        "1 not regular files (pipe.jsonl), 1 reached twice (twice.jsonl)"
    )
    for pattern in ("*", "**"):
        assert find_files(str(tmp_path / pattern)).summary() == find_files(str(tmp_path)).summary()


def test_the_preparation_says_it_once(tmp_path, capfd):
    write(tmp_path / "data" / "a.jsonl", *(f"document {number}" for number in range(300)))
    (tmp_path / "data" / "b.csv").write_text("x")
    config = DataConfig(dataset=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
    prepare(config)
    assert capfd.readouterr().err.count("1 file read, 1 left out: 1 of unknown ending (b.csv)") == 1


def test_nothing_to_read_says_what_there_is(tmp_path):
    (tmp_path / "b.csv").write_text("x")
    (tmp_path / "a.jsonl").touch()
    assert "no file in a known format (0 files read, 2 left out: 1 empty (a.jsonl), 1 of unknown ending (b.csv))" in (
        message := refusal(tmp_path)
    )
    assert "allowed: .parquet, .jsonl" in message
    assert "1 empty (a.jsonl)" in refusal(tmp_path / "a.jsonl")
    assert "no such file" in refusal(tmp_path / "c.jsonl") and "no such file" in refusal(tmp_path / "c*")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    assert "no such file" in refusal(tmp_path / "gone.jsonl")


def test_a_folder_that_cannot_be_read_is_no_silent_loss(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "sub" / "b.jsonl", "b")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{tmp_path / 'sub'}: Permission denied" in refusal(tmp_path)


ENCODERS = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),  # two members
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("compression", ENCODERS)
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".txt", ".Json"])
def test_endings(tmp_path, ending, compression):
    rows = ["one", "zwei ü", "three\r\nlines\u2028"]
    if ending == ".txt":
        plain = "\n<|endoftext|>\r\n".join(rows).encode()
        rows = ["one\n", "zwei ü\n", "three\r\nlines\u2028"]
    else:
        plain = jsonl(*rows).replace(b"\n", b"\r\n")
    for mark in (b"", b"\xef\xbb\xbf"):
        path = tmp_path / f"data{ending}{compression.upper()}"
        path.write_bytes(ENCODERS[compression](mark + plain))
        assert texts(path) == texts(tmp_path) == texts(tmp_path / "*") == sorted(rows)


def test_arrays(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": "b", "n": 1}]
    (tmp_path / "a.json").write_text("\ufeff\n " + json.dumps(rows, indent=2))
    assert texts(tmp_path) == ["a", "b"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, 3]))
    assert "a.json, document 2: not a JSON object" in refusal(tmp_path)
    (tmp_path / "a.json").write_text('[{"text": "a"}')
    assert "a.json: not JSON" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"text": 3}', "'text' is not text"),
        (b'{"text": ["a"]}', "'text' is not text"),
        (b'{"other": "a"}', "no column 'text'; there are: other"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "a"} {}', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 text"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        (b'{"text": ' + b"[" * 200_000 + b"}", "not JSON"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.zst"])
def test_bad_lines_are_named_by_number(tmp_path, line, message, name):
    data = b'{"text": "fine"}\r\n\n' + line + b"\n"
    (tmp_path / name).write_bytes(ENCODERS[".zst"](data) if name.endswith("zst") else data)
    assert f"{name}, line 3: {message}" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    (tmp_path / name).write_bytes('{"text": "ab"}\n'.encode(encoding))
    assert f"{name}: the text is {encoding[:6].upper()}; allowed: UTF-8" in refusal(tmp_path)


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
def test_damaged_compression(tmp_path, ending):
    data = ENCODERS[ending](jsonl(*"abcdefgh" * 9))
    for damaged in (data[:-5], b"plain text"):
        (tmp_path / f"a.jsonl{ending}").write_bytes(damaged)
        assert f"a.jsonl{ending} cannot be read" in refusal(tmp_path)


def test_home_directory(tmp_path, monkeypatch):
    write(tmp_path / "data" / "a.jsonl", "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/data") == texts("~/data/*.jsonl") == texts("~/data/a.jsonl") == ["a"]
    config = DataConfig(dataset="~/data", cache_dir="~/cache", tokenizer="~/tokenizer")
    assert (config.cache_dir, config.tokenizer) == (f"{tmp_path}/cache", f"{tmp_path}/tokenizer")
    with pytest.raises(ValueError, match="no home directory ~nobody-here"):
        DataConfig(dataset="~nobody-here/data")


@pytest.mark.parametrize("name", ["one.txt", "one.jsonl"])
def test_a_single_document_is_cut_for_validation(tmp_path, name):
    text = "".join(f"line {number} of the only document\n" for number in range(1000))
    (tmp_path / name).write_bytes(text.encode() if name == "one.txt" else jsonl("", text))
    documents = dict(iter_documents(DataConfig(dataset=str(tmp_path / name), validation_fraction=0.05)))
    assert documents["train"] + documents["validation"] == text
    assert documents["train"].endswith("\n") and 0.04 < len(documents["validation"]) / len(text) < 0.06
    config = DataConfig(dataset=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
    data = prepare(config, progress=False)
    assert load_tokenizer("bytes").decode(data.validation.window(0, 20)).startswith("line ")
    assert data.train.num_bytes + data.validation.num_bytes == len(text)


def test_a_single_document_without_lines(tmp_path):
    (tmp_path / "one.txt").write_text("中" * 50_000)
    sizes = {split: len(text) for split, text in iter_documents(DataConfig(dataset=str(tmp_path)))}
    assert sizes == {"train": 49_500, "validation": 500}
