"""Token shards: what is written is what is read, and nothing damaged is read."""

import json
import mmap
import os

import numpy as np
import pytest

from flash_stu.data import ShardWriter, TokenDataset, load_tokenizer, write_manifest
from flash_stu.data.shards import token_type
from flash_stu.errors import UserError


class WideTokenizer(type(load_tokenizer("bytes"))):
    """Bytes, with a vocabulary too large for 16 bits."""

    vocab_size = 2**16 + 1
    fingerprint = "wide"


@pytest.mark.parametrize("tokenizer", [load_tokenizer("bytes"), WideTokenizer()], ids=["uint16", "uint32"])
@pytest.mark.parametrize("shard_tokens", [1, 11, 1000])
def test_windows_equal_slices_of_what_was_written(tmp_path, tokenizer, shard_tokens):
    generator = np.random.default_rng(1)
    lengths = [5, 1, 13, 2, 8, 30, 1]
    documents = [generator.integers(0, tokenizer.vocab_size, length).astype(np.uint32) for length in lengths]
    writer = ShardWriter(tmp_path, tokenizer, shard_tokens=shard_tokens)
    for document in documents:
        writer.add(document, num_documents=1, num_bytes=3 * len(document))
    write_manifest(tmp_path, tokenizer, writer.finish())

    dataset = TokenDataset(tmp_path, tokenizer)
    tokens = np.concatenate(documents)
    assert len(dataset) == len(tokens) == 60
    assert (dataset.num_documents, dataset.num_bytes) == (7, 180)
    for start in range(61):
        for length in range(61 - start):
            assert np.array_equal(dataset.window(start, length), tokens[start : start + length])
    for start, length in [(0, 61), (60, 1), (-1, 2)]:
        with pytest.raises(IndexError):
            dataset.window(start, length)

    itemsize = 2 if tokenizer.vocab_size == 257 else 4
    raw = b"".join(path.read_bytes() for path in sorted(tmp_path.glob("*.bin")))
    assert raw == b"".join(int(token).to_bytes(itemsize, "little") for token in tokens)
    shard_sizes = [shard.num_tokens for shard in dataset.manifest.shards]
    assert shard_sizes == {1: lengths, 11: [19, 40, 1], 1000: [60]}[shard_tokens]


def test_reading_ahead_asks_for_the_bytes_of_the_tokens(make_dataset, monkeypatch):
    """Whole pages, from the first token's to the last token's, of every shard; the tokens stay what they are."""
    asked = []

    class Map(mmap.mmap):
        def madvise(self, option, start, length):
            super().madvise(option, start, length)
            asked.append((option, start, length))

    monkeypatch.setattr(mmap, "mmap", Map)
    page = mmap.PAGESIZE
    dataset = make_dataset(3 * page, shard_tokens=page)  # two bytes a token, so two pages a shard
    first, second = (shard.num_tokens for shard in dataset.manifest.shards[:2])
    dataset.read_ahead(first - 3, second + 5)
    start = 2 * (first - 3) // page * page
    assert asked == [
        (mmap.MADV_WILLNEED, start, 2 * first - start),
        (mmap.MADV_WILLNEED, 0, 2 * second),
        (mmap.MADV_WILLNEED, 0, 4),
    ]
    asked.clear()
    dataset.read_ahead(len(dataset), 0)
    assert asked == []


def test_dtype_at_the_border():
    assert token_type(2**16) == "uint16"
    assert token_type(2**16 + 1) == "uint32"


def test_several_writers_share_a_directory(tmp_path):
    tokenizer = load_tokenizer("bytes")
    shards = []
    for prefix in ("b", "a"):
        writer = ShardWriter(tmp_path, tokenizer, prefix=prefix)
        writer.add(tokenizer.encode_documents([prefix]), 1, 1)
        shards += writer.finish()
    write_manifest(tmp_path, tokenizer, shards)
    assert tokenizer.decode(TokenDataset(tmp_path).window(0, 4)) == "b<|endoftext|>a<|endoftext|>"


def test_nothing_is_read_before_it_is_whole(tmp_path):
    tokenizer = load_tokenizer("bytes")
    writer = ShardWriter(tmp_path, tokenizer)
    writer.add(np.array([1, 2], dtype=np.uint32), 1, 1)
    for _ in range(2):
        with pytest.raises(UserError, match="no token shards in .*manifest.json"):
            TokenDataset(tmp_path)
        shards = writer.finish()
    write_manifest(tmp_path, tokenizer, shards)
    assert TokenDataset(tmp_path).window(0, 2).tolist() == [1, 2]


@pytest.mark.parametrize("committed", range(7))
def test_going_on_after_a_commit(tmp_path, committed):
    """A writer dies some documents after its last commit; the next one makes the same files."""
    tokenizer = load_tokenizer("bytes")
    documents = [np.full(length, length, dtype=np.uint32) for length in (5, 1, 13, 2, 8, 30)]

    def add(writer, some):
        for document in some:
            writer.add(document, 1, len(document))

    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole = ShardWriter(tmp_path / "whole", tokenizer, shard_tokens=10)
    add(whole, documents)
    first = ShardWriter(tmp_path / "resumed", tokenizer, shard_tokens=10)
    add(first, documents[:committed])
    state = first.commit()
    add(first, documents[committed : committed + 2])
    first.commit()  # more is on the disk than the state counts
    second = ShardWriter(tmp_path / "resumed", tokenizer, shard_tokens=10, committed=state)
    add(second, documents[committed:])
    assert second.finish() == whole.finish()
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "resumed")]
    assert contents[0] == contents[1]


def test_id_outside_the_vocabulary(tmp_path):
    writer = ShardWriter(tmp_path, load_tokenizer("bytes"))
    with pytest.raises(ValueError, match="257"):
        writer.add(np.array([0, 257], dtype=np.uint32), 1, 1)


def damage(make_dataset, action) -> str:
    """Open a dataset, which records its checksums as good, damage its second shard, and open it again."""
    dataset = make_dataset(100, shard_tokens=30)
    shard = dataset.directory / dataset.manifest.shards[1].name
    action(shard)
    with pytest.raises(UserError) as error:
        TokenDataset(dataset.directory)
    assert "shard-00001.bin" in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_missing_shard(make_dataset):
    assert "missing" in damage(make_dataset, os.remove)


def test_truncated_shard(make_dataset):
    size = {}

    def truncate(path):
        size["old"] = path.stat().st_size
        os.truncate(path, size["old"] - 2)

    message = damage(make_dataset, truncate)
    assert f"has {size['old'] - 2} bytes instead of {size['old']}" in message


def flip(path):
    """Change one byte and pretend that nothing happened."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_altered_shard(make_dataset):
    assert "damaged" in damage(make_dataset, flip)


def test_altered_before_the_first_opening(make_dataset):
    dataset = make_dataset(100)
    (dataset.directory / "verified.json").unlink()
    flip(dataset.directory / "shard-00000.bin")
    with pytest.raises(UserError, match="shard-00000.bin is damaged"):
        TokenDataset(dataset.directory)


def test_checksums_are_not_computed_twice(make_dataset, monkeypatch):
    dataset = make_dataset(100, shard_tokens=30)
    hashed = []
    monkeypatch.setattr("flash_stu.data.shards._sha256", lambda path: hashed.append(path))
    TokenDataset(dataset.directory)
    assert hashed == []


def test_other_tokenizer(make_dataset):
    dataset = make_dataset(50)
    with pytest.raises(UserError, match="made by tokenizer 'bytes' .*not by 'bytes' \\(wide\\)"):
        TokenDataset(dataset.directory, WideTokenizer())


@pytest.mark.parametrize("change", [{"dtype": "float8"}, {"shards": None}, {"format": 99}])
def test_damaged_manifest(make_dataset, change):
    path = make_dataset(50).directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="manifest.json (is damaged|has format 99)"):
        TokenDataset(path.parent)
