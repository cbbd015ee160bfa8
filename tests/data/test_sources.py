"""Reading corpora: the embedded one, local files in every format, and the hub."""

import ast
import gzip
import hashlib
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flash_stu.data import DataConfig, embedded_corpus, iter_documents
from flash_stu.data.sources import _docstrings, _embedded_documents, in_validation
from flash_stu.errors import UserError

NAMES = ["data.parquet", "data.jsonl", "data.jsonl.gz", "data.txt"]


def read(dataset, **settings) -> dict[str, list[str]]:
    splits = {"train": [], "validation": []}
    for split, text in iter_documents(DataConfig(dataset=str(dataset), **settings)):
        splits[split].append(text)
    return splits


def everything(dataset, **settings) -> list[str]:
    return [text for _, text in iter_documents(DataConfig(dataset=str(dataset), **settings))]


def refusal(dataset, **settings) -> str:
    with pytest.raises(UserError) as error:
        everything(dataset, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_embedded_corpus():
    splits = embedded_corpus()
    sizes = {split: sum(len(text.encode()) for text in texts) for split, texts in splits.items()}
    assert 1.5e6 < sum(sizes.values()) < 2.5e6
    assert 0.02 < sizes["validation"] / sum(sizes.values()) < 0.08
    assert all(in_validation(text, 0.05) for text in splits["validation"])
    documents = splits["train"] + splits["validation"]
    assert len(set(documents)) == len(documents)
    assert any(text.startswith("JSON (JavaScript Object Notation)") for text in documents)
    assert any("assert_stmt" in text for text in documents)  # the language reference
    assert everything("embedded") == documents

    again = [text for text in islice(_embedded_documents(), 200) if not in_validation(text, 0.05)]
    assert again == splits["train"][: len(again)]


def test_docstrings_come_in_source_order():
    source = '''
"""module"""
if True:
    def outer():
        """outer
        indented"""
        class Inner:
            """inner"""
        "not a docstring"
try:
    pass
except OSError:
    async def later(): """later"""
class Empty: """"""
'''
    assert [text for text in _docstrings(ast.parse(source)) if text] == [
        "module",
        "outer\nindented",
        "inner",
        "later",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_local_file(tmp_path, write_documents, documents, name):
    path = write_documents(tmp_path / name, documents)
    assert sorted(everything(path)) == sorted(documents if name != "data.txt" else with_newlines(documents))
    assert len(everything(path, max_documents=2)) == 2


def with_newlines(documents):
    """In a .txt file the line that ends a document leaves the newline before it to the document."""
    return [text + "\n" for text in documents[:-1]] + documents[-1:]


def test_hash_split(tmp_path, write_documents):
    documents = [f"document {i}" for i in range(2000)]
    path = write_documents(tmp_path / "data.jsonl", documents)
    splits = read(path, validation_fraction=0.1)
    assert splits["validation"] == [text for text in documents if in_validation(text, 0.1)]
    assert splits["train"] == [text for text in documents if not in_validation(text, 0.1)]
    assert 150 < len(splits["validation"]) < 250
    assert set(read(path, validation_fraction=0.02)["validation"]) < set(splits["validation"])


def test_hash_split_of_a_corpus_chosen_by_hash():
    """Corpora are sampled and sorted by sha256: that must say nothing about what is held out."""
    documents = [f"document {i}" for i in range(20_000)]
    chosen = [text for text in documents if hashlib.sha256(text.encode()).digest()[0] < 32]
    assert 0.06 < sum(in_validation(text, 0.1) for text in chosen) / len(chosen) < 0.14


@pytest.mark.parametrize("held_out", ["validation-00000-of-00001", "val", "validation/part"])
def test_validation_files(tmp_path, write_documents, held_out):
    for number in range(3):
        write_documents(tmp_path / f"train-{number}.parquet", [f"train {number} {i}" for i in range(3)])
    write_documents(tmp_path / f"{held_out}.parquet", ["held out"])
    write_documents(tmp_path / "test.parquet", ["test"])
    write_documents(tmp_path / ".hidden" / "train.parquet", ["hidden"])
    (tmp_path / "README.md").write_text("not data")
    expected = {
        "train": [f"train {number} {i}" for number in range(3) for i in range(3)],
        "validation": ["held out"],
    }
    assert read(tmp_path) == expected
    assert read(tmp_path / "**" / "*.parquet") == expected
    assert read(tmp_path, max_documents=1) == {"train": ["train 0 0"], "validation": ["held out"]}


def test_names_that_only_begin_like_a_split(tmp_path, write_documents):
    for name in ("valley", "testing", "trainspotting"):
        write_documents(tmp_path / f"{name}.txt", [name])
    assert sorted(everything(tmp_path)) == ["testing", "trainspotting", "valley"]


def test_null_empty_and_broken_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": ""}\n{"text": " \\n"}\n{"text": "a\\ud83d b"}\n')
    assert everything(tmp_path) == ["a\ufffd b"]
    pq.write_table(pa.table({"body": pa.array([None, "x", ""], pa.large_string())}), tmp_path / "b.parquet")
    assert everything(tmp_path / "b.parquet", text_column="body") == ["x"]


@pytest.mark.parametrize("name", NAMES[:3])
def test_missing_column_lists_the_columns(tmp_path, write_documents, documents, name):
    path = write_documents(tmp_path / name, documents)
    message = refusal(path, text_column="content")
    assert name in message and "'content'" in message and "number, text" in message
    assert "'number'" in refusal(path, text_column="number") and "not text" in refusal(path, text_column="number")


def test_missing_and_unknown_files(tmp_path):
    assert "no such file or directory" in refusal(tmp_path / "nothing.jsonl")
    assert "no such file or directory" in refusal(tmp_path / "*.jsonl")
    assert "no file in a known format; allowed: .parquet, .jsonl" in refusal(tmp_path)


def test_mixed_formats(tmp_path, write_documents, documents):
    write_documents(tmp_path / "a.jsonl", documents)
    write_documents(tmp_path / "b.txt", documents)
    assert "mixes jsonl and txt" in refusal(tmp_path)
    write_documents(tmp_path / "c.jsonl.gz", documents)
    assert sorted(everything(tmp_path / "*.jsonl*")) == sorted(documents * 2)


def test_damaged_files(tmp_path, write_documents, documents):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert "bad.jsonl, line 2: not JSON" in refusal(tmp_path / "bad.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    assert "list.jsonl, line 1: not a JSON object" in refusal(tmp_path / "list.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 100)[:-12])
    assert "cut.jsonl.gz cannot be read" in refusal(tmp_path / "cut.jsonl.gz")
    whole = write_documents(tmp_path / "cut.parquet", documents).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    assert "cut.parquet cannot be read" in refusal(tmp_path / "cut.parquet")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert "latin.txt cannot be read" in refusal(tmp_path / "latin.txt")
