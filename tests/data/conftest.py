"""Fixtures of the data tests."""

import gzip
import json
import multiprocessing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flash_stu.data import ShardWriter, TokenDataset, load_tokenizer, write_manifest

DOCUMENTS = ["one\n", "naïve café", "日本語 text", "tail " * 50, "🙂", "the sixth document"]


@pytest.fixture
def documents() -> list[str]:
    return list(DOCUMENTS)


@pytest.fixture
def write_documents():
    """Write documents to a file in the format of its name, as column "text" beside one of numbers."""

    def write(path, documents):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"number": i, "text": text}) for i, text in enumerate(documents)]
        if path.name.endswith(".parquet"):
            table = pa.table({"number": list(range(len(documents))), "text": pa.array(documents, pa.string())})
            pq.write_table(table, path, row_group_size=2)
        elif path.name.endswith(".jsonl"):
            path.write_text("\n".join(lines) + "\n")
        elif path.name.endswith(".gz"):
            path.write_bytes(gzip.compress("\n".join(lines).encode()))
        else:
            path.write_text("\n<|endoftext|>\n".join(documents))
        return path

    return write


@pytest.fixture
def fork():
    """Processes that start as copies of this one, patches included, without importing anything again."""
    return multiprocessing.get_context("fork")


@pytest.fixture
def make_dataset(tmp_path):
    """Make a dataset of given tokens with given document lengths, a few tokens a shard."""

    def make(num_tokens: int, shard_tokens: int = 10**6, name: str = "shards") -> TokenDataset:
        directory = tmp_path / name
        directory.mkdir()
        tokenizer = load_tokenizer("bytes")
        writer = ShardWriter(directory, tokenizer, shard_tokens=shard_tokens)
        tokens = np.random.default_rng(0).integers(0, 257, num_tokens).astype(np.uint32)
        for document in np.array_split(tokens, max(num_tokens // 7, 1)):
            writer.add(document, num_documents=1, num_bytes=len(document) - 1)
        write_manifest(directory, tokenizer, writer.finish())
        return TokenDataset(directory, tokenizer)

    return make
