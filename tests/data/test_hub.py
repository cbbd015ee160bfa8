"""Datasets on the hub: the hub's replies are replaced, datasets' own streaming is not."""

from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flash_stu.data import DataConfig, iter_documents, prepare, prepare_part, sources, tokenize
from flash_stu.errors import UserError

FILES = {"a": ["first", "second", None], "b": ["third"], "c": ["", "fourth", "fifth"], "v": ["held out"]}


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub with one dataset: `splits` says which files each split has, `path` where they are."""
    fake = SimpleNamespace(splits={"train": "abc", "validation": "v"}, commit="c0ffee", loaded=[])
    fake.path = lambda file: tmp_path / f"{file}.parquet"
    for file, texts in FILES.items():
        pq.write_table(pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), fake.path(file))
    original = datasets.load_dataset

    def load_dataset(name, subset, revision, streaming, trust_remote_code):
        fake.loaded.append((name, subset, revision))
        files = {split: [str(fake.path(file)) for file in files] for split, files in fake.splits.items()}
        return original("parquet", data_files=files, streaming=streaming)

    monkeypatch.setattr(sources.HfApi, "dataset_info", lambda *args, **kwargs: SimpleNamespace(sha=fake.commit))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return fake


@pytest.fixture
def break_file(fake_hub):
    """Make a file unreadable; gives what repairs it."""

    def break_file(file):
        content = fake_hub.path(file).read_bytes()
        fake_hub.path(file).write_bytes(b"no parquet")
        return lambda: fake_hub.path(file).write_bytes(content)

    return break_file


def read(**settings) -> dict[str, list[str]]:
    splits = {"train": [], "validation": []}
    for split, text in iter_documents(DataConfig(dataset="someone/corpus", **settings)):
        splits[split].append(text)
    return splits


def refusal(**settings) -> str:
    with pytest.raises(UserError) as error:
        read(**settings)
    assert "\n" not in str(error.value) and "'someone/corpus'" in str(error.value)
    return str(error.value)


def test_splits_and_subset(fake_hub):
    expected = {"train": ["first", "second", "third", "fourth", "fifth"], "validation": ["held out"]}
    assert read(subset="small", revision="v1") == expected
    assert fake_hub.loaded == [("someone/corpus", "small", "c0ffee")]
    assert read(max_documents=3)["train"] == ["first", "second", "third"]
    fake_hub.splits = {"train": ["a", "b", "c"]}
    assert read(validation_fraction=0.9)["validation"]


def test_refusals(fake_hub):
    assert "no column 'body'; there are: id, text" in refusal(text_column="body")
    assert "column 'id' holds int64, not text" in refusal(text_column="id")
    fake_hub.splits = {"test": ["v"]}
    assert "no train split; there are: test" in refusal()


def test_hub_out_of_reach(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network here")

    monkeypatch.setattr(sources.HfApi, "dataset_info", refuse)
    assert "no such file or directory" in refusal() and "(ConnectionError)" in refusal()


def config(tmp_path, name="cache") -> DataConfig:
    return DataConfig(dataset="someone/corpus", cache_dir=str(tmp_path / name))


def tokens(data) -> list:
    return [split.window(0, len(split)).tolist() for split in (data.train, data.validation)]


def test_a_part_opens_only_its_files(fake_hub, break_file, tmp_path):
    whole = prepare(config(tmp_path), progress=False)
    parts = config(tmp_path, "parts")
    repair = break_file("b")
    assert prepare_part(parts, 1, 2, progress=False) == [0]
    repair()
    repair = break_file("c")
    assert prepare_part(parts, 0, 2, progress=False) == []
    assert tokens(prepare(parts, progress=False)) == tokens(whole)


def test_a_prepared_dataset_needs_no_hub(fake_hub, tmp_path, monkeypatch):
    first = prepare(config(tmp_path), progress=False)
    monkeypatch.setattr(datasets, "load_dataset", None)
    monkeypatch.setattr(sources.HfApi, "dataset_info", None)
    assert prepare(config(tmp_path), progress=False).directory == first.directory


def test_goes_on_after_a_failure_at_the_same_commit(fake_hub, break_file, tmp_path, monkeypatch):
    """Listings read before are not read again, and nobody's push in between mixes two versions."""
    monkeypatch.setattr(tokenize, "_COMMIT_EVERY", 0)
    monkeypatch.setattr(tokenize, "_AHEAD", 1)
    monkeypatch.setattr(tokenize, "_num_threads", lambda: 1)
    whole = prepare(config(tmp_path, "whole"), progress=False)
    repair = break_file("c")
    with pytest.raises(UserError, match="'someone/corpus' cannot be read on: ArrowInvalid"):
        prepare(config(tmp_path), progress=False)
    repair()
    break_file("b")
    fake_hub.commit = "decade"
    fake_hub.loaded.clear()
    assert tokens(prepare(config(tmp_path), progress=False)) == tokens(whole)
    assert fake_hub.loaded == [("someone/corpus", None, "c0ffee")]
