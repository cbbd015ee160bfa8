"""Caches and prepared tokens that are damaged: written anew, or refused with the remedy."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from writing_commands import FAULTS, failing, files_of, refused

from flash_stu.data import TokenDataset, load_tokenizer
from flash_stu.errors import UserError
from flash_stu.evaluation import definitions
from flash_stu.evaluation.definitions import write_embedded_data
from flash_stu.filters import spectral as filters
from flash_stu.filters.spectral import spectral_filters


def damages():
    yield "flipped", lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
    yield "cut", lambda content: content[:-8]
    yield "empty", lambda content: b""
    yield "other", lambda content: b"\xff[]7"


damage_of_every_kind = pytest.mark.parametrize("damage", [pytest.param(change, id=name) for name, change in damages()])


def flips(content):
    """A content with one bit changed in each place."""
    for place in range(len(content)):
        yield content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


@damage_of_every_kind
def test_a_damaged_entry_of_the_filter_cache_is_written_anew(damage, tmp_path):
    expected = spectral_filters(33, 4)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert all(map(torch.equal, spectral_filters(33, 4), expected))
    assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]


def endless(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("replace", [endless, device])
def test_pipes_and_devices_in_place_of_cached_files_are_not_read(replace, tokens, inputs, tmp_path):
    expected = spectral_filters(33, 4)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    for place in (path, tokens / "verified.json"):
        place.unlink()
        replace(place)
    assert all(map(torch.equal, spectral_filters(33, 4), expected))
    TokenDataset(tokens)  # compares the checksums
    (tokens / "manifest.json").unlink()
    replace(tokens / "manifest.json")
    with pytest.raises(UserError, match="manifest.json cannot be read: manifest.json is not a regular file"):
        TokenDataset(tokens)


def test_no_bit_of_the_filter_cache_can_change_unnoticed(tmp_path, monkeypatch):
    expected = spectral_filters(9, 2)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    monkeypatch.setattr(filters, "compute_filters", lambda *_: expected)
    monkeypatch.setattr(filters, "_write_cache", lambda *_: None)
    for content in flips(path.read_bytes()):
        path.write_bytes(content)
        assert all(map(torch.equal, spectral_filters(9, 2), expected))


@pytest.mark.parametrize("change", [{"sigma": torch.ones(3)}, {"phi": torch.ones(33, 4)}, {"checksum": torch.ones(2)},
                                    {"phi": torch.full((33, 4), float("nan")).double()}])  # fmt: skip
def test_filters_of_another_shape_or_type_are_not_used(change, tmp_path):
    expected = spectral_filters(33, 4)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    tensors = load_file(path) | change
    if "checksum" not in change and tensors["phi"].dtype == torch.float64:
        tensors["checksum"] = torch.tensor(filters._checksum(tensors["sigma"], tensors["phi"]))
    save_file(tensors, path)
    assert all(map(torch.equal, spectral_filters(33, 4), expected))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_filter_cache_that_cannot_be_written_ends_nothing(fault, tmp_path, monkeypatch):
    calls, number, _ = FAULTS[fault]
    if calls == "limit":
        (tmp_path / "cache").write_text("a file in its place")
    else:
        failing(monkeypatch, tmp_path, calls, number)
    assert spectral_filters(33, 4)[1].shape == (33, 4)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], ["cache"])


@damage_of_every_kind
def test_damaged_data_of_the_embedded_tasks_are_written_anew(damage, tmp_path):
    documents = [f"words of document {number}, and others. " * 9 for number in range(9)]
    folder = write_embedded_data(documents, tmp_path)
    whole = files_of(tmp_path)
    for path in folder.rglob("*.jsonl"):
        path.write_bytes(damage(path.read_bytes()))
    assert write_embedded_data(documents, tmp_path) == folder
    assert files_of(tmp_path) == whole


def test_data_of_the_embedded_tasks_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(definitions, "_scratch", lambda: str(tmp_path / "scratch"))
    folder = write_embedded_data(["a document"], tmp_path / "file")
    assert folder.is_relative_to(tmp_path / "scratch") and len(list(folder.rglob("*.jsonl"))) == 2


@pytest.mark.parametrize("content", [b"7", b"[]", b"null", b"\xff", b"{", b"[" * 20000, b'{"shard-0000-00000.bin": 7}',
                                     b'{"shard-0000-00000.bin": [1, 2, 3]}', b""])  # fmt: skip
def test_a_damaged_record_of_verification_means_verifying_again(content, tokens):
    record = tokens / "verified.json"
    whole = record.read_bytes()
    record.write_bytes(content)
    TokenDataset(tokens)
    assert record.read_bytes() == whole
    shard = tokens / "shard-0000-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    record.write_bytes(content)
    with pytest.raises(UserError, match="shard-0000-00000.bin is damaged"):
        TokenDataset(tokens)


def manifests():
    for content in (b"7", b"[]", b"null", b"\xff", b"{", b"[" * 20000, b"{}", b""):
        yield repr(content[:9]), lambda _, content=content: content
    changes = [
        {key: value} for key in ("num_tokens", "num_documents", "num_bytes") for value in (-1, "9", None, 1.5, 7)
    ]
    changes += [{"shards": value} for value in ([], {}, [7], "x", [{}])]
    changes += [{"format": "1"}, {"dtype": 2}, {"dtype": "uint32"}, {"eos_token_id": 255}, {"eos_token_id": -1}]
    changes += [{"vocab_size": True}, {"tokenizer_fingerprint": 3}]
    for change in changes:
        yield str(change), lambda content, change=change: json.dumps(json.loads(content) | change).encode()
    for key, value in (
        ("name", "../x.bin"),
        ("name", "/etc/x.bin"),
        ("num_tokens", -3),
        ("num_bytes", 1),
        ("sha256", 1),
    ):

        def alter(content, key=key, value=value):
            manifest = json.loads(content)
            manifest["shards"][0][key] = value
            return json.dumps(manifest).encode()

        yield f"shard {key} {value}", alter


@pytest.mark.parametrize("alter", [pytest.param(alter, id=name) for name, alter in manifests()])
def test_a_damaged_manifest_of_shards_is_one_line_with_the_remedy(alter, tokens):
    path = tokens / "manifest.json"
    path.write_bytes(alter(path.read_bytes()))
    with pytest.raises(UserError) as error:
        TokenDataset(tokens, load_tokenizer("bytes"))
    message = str(error.value)
    assert "\n" not in message and str(tokens) in message and f"delete {tokens} to tokenise again" in message


def test_what_is_left_of_a_deleted_split_is_refused_and_stays(tokens, command, tmp_path):
    (tokens / "manifest.json").unlink()
    (tokens / "notes.txt").write_text("mine")
    before = files_of(tmp_path)
    assert refused(command("prepare", tmp_path / "tokens"), f"{tokens} has no manifest.json and is not empty")
    assert files_of(tmp_path) == before
    for path in tokens.iterdir():
        path.unlink()
    (tokens.parent / "notes.txt").write_text("mine")
    assert command("prepare", tmp_path / "tokens")[0] == 0
    TokenDataset(tokens)
    assert (tokens.parent / "notes.txt").read_text() == "mine"


def test_an_altered_state_of_an_unfinished_preparation_is_refused(inputs, command, tmp_path, monkeypatch):
    monkeypatch.setattr("flash_stu.data.tokenize._BATCH", 500)
    monkeypatch.setattr("flash_stu.data.tokenize._COMMIT_EVERY", 0)
    with monkeypatch.context() as patch:
        patch.setattr("flash_stu.data.preparation.Preparation._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command("prepare")
    for name in ("part-0000.json", "job.json"):
        (path,) = (tmp_path / "output").glob(f".*.unfinished/{name}")
        whole = path.read_bytes()
        for content in [*list(flips(whole))[:: max(1, len(whole) // 40)], b"7", b"[]", b"\xff", b"{}", b""]:
            path.write_bytes(content)
            try:
                unchanged = json.loads(content) == json.loads(whole)  # white space only
            except ValueError:
                unchanged = False
            if not unchanged:
                assert refused(command("prepare"), f"{path} is damaged; delete ")
        path.write_bytes(whole)
    (path.parent / "notes.txt").write_text("mine")
    assert command("prepare")[0] == 0
    (entry,) = (tmp_path / "output").iterdir()  # of the unfinished one only a file of the user's is left
    assert sorted(other.name for other in entry.iterdir()) == ["notes.txt", "train", "validation"]
