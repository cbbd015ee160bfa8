"""From a config to tokens: once, completely, and never half."""

import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from flash_stu.data import DataConfig, load_tokenizer, preparation, prepare, prepare_part, tokenize
from flash_stu.data.sources import in_validation
from flash_stu.errors import UserError


@pytest.fixture
def config(tmp_path, write_documents):
    """A dataset of 300 documents, about a fifth of them held out, cached beside it."""
    write_documents(tmp_path / "data.jsonl", [f"document {i}, naïve 🙂" for i in range(300)])
    return DataConfig(dataset=str(tmp_path / "data.jsonl"), validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def tokenized(monkeypatch):
    """Counts how often a dataset is tokenized."""
    calls = []
    original = tokenize.Part.tokenize
    monkeypatch.setattr(tokenize.Part, "tokenize", lambda *args: calls.append(1) or original(*args))
    return calls


def entries(config) -> list[str]:
    return [name for name in os.listdir(config.cache_dir) if not name.endswith(".lock")]


def test_tokens_are_those_of_the_documents(config):
    data = prepare(config, progress=False)
    documents = [f"document {i}, naïve 🙂" for i in range(300)]
    for split, held_out in [(data.train, False), (data.validation, True)]:
        texts = [text for text in documents if in_validation(text, 0.2) == held_out]
        expected = b"\xff".join(text.encode() for text in texts) + b"\xff"  # 0xff is in no UTF-8 text
        tokens = split.window(0, len(split))
        assert np.where(tokens == 256, 255, tokens).astype(np.uint8).tobytes() == expected
        assert split.num_documents == len(texts) == (tokens == 256).sum()
        assert split.num_bytes == len("".join(texts).encode())
        assert split.window(0, 1).dtype == np.uint16
    assert data.train.manifest.tokenizer == "bytes"


def test_cached(config, tokenized):
    first, second = prepare(config, progress=False), prepare(config, progress=False)
    assert tokenized == [1]
    assert first.directory == second.directory
    assert np.array_equal(second.train.window(0, 99), first.train.window(0, 99))


def test_whatever_changes_the_tokens_changes_the_key(config, write_documents, tmp_path):
    directories = {prepare(config, progress=False).directory}
    for change in ({"validation_fraction": 0.3}, {"max_documents": 100}):
        directories.add(prepare(config.model_copy(update=change), progress=False).directory)
    path = tmp_path / "data.jsonl"
    path.write_text(path.read_text().replace("naïve", "naivé"))  # as many bytes as before
    os.utime(path, ns=(10**18, 10**18))
    directories.add(prepare(config, progress=False).directory)
    assert len(directories) == 4


def test_validation_fraction_is_no_matter_with_a_validation_file(config, write_documents, tmp_path):
    write_documents(tmp_path / "files" / "train.txt", ["some text"])
    write_documents(tmp_path / "files" / "val.txt", ["other text"])
    config = config.model_copy(update={"dataset": str(tmp_path / "files")})
    first = prepare(config, progress=False)
    assert prepare(config.model_copy(update={"validation_fraction": 0.5}), False).directory == first.directory
    assert load_tokenizer("bytes").decode(first.validation.window(0, 10)) == "other text"


def test_threads_at_once(config, tokenized):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: prepare(config, progress=False), range(8)))
    assert tokenized == [1]
    assert len(entries(config)) == 1
    reference = results[0].train.window(0, len(results[0].train))
    assert all(np.array_equal(result.train.window(0, len(reference)), reference) for result in results)


def test_another_process_waits(config, monkeypatch, fork):
    """A second process asks for the same tokens while this one is making them."""
    receiver, sender = fork.Pipe(duplex=False)
    original = tokenize.Part.tokenize

    def ask():
        sys.stderr = Report(sender)
        data = prepare(config)
        sender.send((len(data.train), data.directory))

    def begin(*args):
        fork.Process(target=ask, daemon=True).start()
        assert receiver.poll(60) and "waiting for another process" in receiver.recv()
        assert not receiver.poll(0.2)
        return original(*args)

    monkeypatch.setattr(tokenize.Part, "tokenize", begin)
    data = prepare(config, progress=False)
    assert receiver.poll(60) and receiver.recv() == (len(data.train), data.directory)
    assert len(entries(config)) == 1


class Report(io.StringIO):
    """Sends what is printed, line by line."""

    def __init__(self, sender):
        super().__init__()
        self._sender = sender

    def write(self, text):
        if text.strip():
            self._sender.send(text)


def test_the_first_of_two_hosts_wins(config, monkeypatch):
    """A host that our lock does not reach finishes the same entry while we work on it."""
    other = prepare(config, progress=False)
    stamp = (other.directory / "train" / "manifest.json").stat().st_mtime_ns
    hidden = other.directory.with_name("hidden")
    other.directory.rename(hidden)
    original = preparation.write_manifest

    def write_manifest(*args):
        if hidden.exists():
            hidden.rename(other.directory)
        return original(*args)

    monkeypatch.setattr(preparation, "write_manifest", write_manifest)
    data = prepare(config, progress=False)
    assert entries(config) == [other.directory.name]
    assert (data.directory / "train" / "manifest.json").stat().st_mtime_ns == stamp


def test_a_failure_leaves_nothing(config, tmp_path):
    path = tmp_path / "data.jsonl"
    with open(path, "a") as file:
        file.write("not json\n")
    with pytest.raises(UserError, match="line 301: not JSON"):
        prepare(config, progress=False)
    assert not os.path.exists(config.cache_dir)


def test_damaged_cache_is_refused_by_name(config):
    shard = prepare(config, progress=False).directory / "train" / "shard-0000-00000.bin"
    data = bytearray(shard.read_bytes())
    data[5] ^= 255
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"{shard} is damaged .*delete {shard.parent} to tokenise again"):
        prepare(config, progress=False)
    for file in shard.parent.iterdir():
        file.unlink()
    shard.parent.rmdir()
    prepare(config, progress=False)


def test_a_directory_of_shards_is_a_dataset(config, tmp_path):
    made = prepare(config, progress=False)
    shards = config.model_copy(update={"dataset": str(made.directory), "cache_dir": str(tmp_path / "unused")})
    opened = prepare(shards, progress=False)
    assert opened.directory == made.directory
    assert not (tmp_path / "unused").exists()
    manifest = json.loads((made.directory / "validation" / "manifest.json").read_text())
    manifest["tokenizer_fingerprint"] = "0" * 64
    (made.directory / "validation" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="made by tokenizer 'bytes' \\(fingerprint 000000000000\\)"):
        prepare(shards, progress=False)


def test_order_does_not_depend_on_threads(config, monkeypatch):
    monkeypatch.setattr(tokenize, "_BATCH", 100)
    tokens = []
    for threads in (1, 3):
        monkeypatch.setattr(tokenize, "_num_threads", lambda threads=threads: threads)
        data = prepare(config.model_copy(update={"cache_dir": f"{config.cache_dir}-{threads}"}), progress=False)
        tokens.append([split.window(0, len(split)).tolist() for split in (data.train, data.validation)])
    assert tokens[0] == tokens[1]


def test_empty_corpus(tmp_path, config):
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    with pytest.raises(UserError, match="empty.jsonl' is empty"):
        prepare(config.model_copy(update={"dataset": str(tmp_path / "empty.jsonl")}), progress=False)
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(UserError, match="1 document\\(s\\) leave the validation split empty"):
        prepare(config.model_copy(update={"dataset": str(tmp_path / "one.txt")}), progress=False)
    assert not os.path.exists(config.cache_dir)


def test_cache_that_cannot_be_written(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="token shards in .*file.* cannot be written"):
        prepare(config.model_copy(update={"cache_dir": str(tmp_path / "file")}), progress=False)


def test_what_it_prints(config, capfd):
    data = prepare(config)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "300 documents" in lines[1] and "MB/s" in lines[1] and "tokens/s" in lines[1]
    assert lines[2] == f"tokens are in {data.directory}"
    prepare(config.model_copy(update={"max_documents": 50}), progress=False)
    assert capfd.readouterr() == ("", "")


def test_config_is_typed():
    for wrong in ({"datset": "x"}, {"validation_fraction": 1.0}, {"max_documents": 0}, {"text_column": 3}):
        with pytest.raises(ValidationError):
            DataConfig(**wrong)


def test_embedded(tmp_path):
    data = prepare(DataConfig(cache_dir=str(tmp_path)), progress=False)
    assert 1.5e6 < data.train.num_bytes < 2.5e6
    assert len(data.train) == data.train.num_bytes + data.train.num_documents
    assert 0.02 < len(data.validation) / len(data.train) < 0.08


def test_real_corpus(extra_data, tmp_path, monkeypatch):
    """Token counts against the corpus's own token_count column, counted with o200k_base by its makers."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(extra_data / "tiktoken"))
    data = prepare(
        DataConfig(
            dataset=str(extra_data / "text"),
            tokenizer="tiktoken:o200k_base",
            max_documents=200,
            cache_dir=str(tmp_path),
        ),
        progress=False,
    )
    for split, name in [(data.train, "train-00000-of-00004"), (data.validation, "validation-00000-of-00001")]:
        columns = pq.read_table(extra_data / "text" / f"{name}.parquet", columns=["text", "token_count"]).slice(0, 200)
        assert len(split) == sum(columns["token_count"].to_pylist()) + 200
        assert split.num_bytes == sum(len(text.encode()) for text in columns["text"].to_pylist())
        first = columns["text"][0].as_py()
        assert load_tokenizer("tiktoken:o200k_base").decode(split.window(0, columns["token_count"][0].as_py())) == first
        assert split.window(0, 1).dtype == np.uint32


def test_real_text_in_parts(extra_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(extra_data / "tiktoken"))
    text = pq.read_table(extra_data / "text" / "train-00001-of-00004.parquet", columns=["text"]).slice(500, 100)
    pq.write_table(text, tmp_path / "text.parquet", row_group_size=15)
    datasets = []
    for parts in (1, 3):
        config = DataConfig(
            dataset=str(tmp_path / "text.parquet"),
            tokenizer="tiktoken:o200k_base",
            validation_fraction=0.1,
            cache_dir=str(tmp_path / f"{parts}"),
        )
        for index in range(parts):
            prepare_part(config, index, parts, progress=False)
        datasets.append(prepare(config, progress=False))
    whole, joined = datasets
    assert whole.train.num_documents + whole.validation.num_documents == 100
    for one, three in [(whole.train, joined.train), (whole.validation, joined.validation)]:
        assert np.array_equal(one.window(0, len(one)), three.window(0, len(three)))
    assert len(whole.train.manifest.shards) == 1 and len(joined.train.manifest.shards) == 3
