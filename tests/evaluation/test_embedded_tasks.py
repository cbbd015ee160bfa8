"""The tasks made from the embedded corpus: what their items must be like."""

import json

import pytest

from flash_stu.data import embedded_corpus
from flash_stu.evaluation.definitions import write_embedded_data
from flash_stu.evaluation.embedded import bpb_documents, cloze_items


@pytest.fixture(scope="module")
def validation():
    return embedded_corpus()["validation"]


def test_cloze_items_of_the_corpus_are_fair(validation):
    items = cloze_items(validation)
    assert len(items) == 200
    assert items == cloze_items(list(validation))
    labels = [item["label"] for item in items]
    assert all(labels.count(label) > 25 for label in range(4))
    for item in items:
        true = item["choices"][item["label"]]
        source = [text for text in validation if item["context"] + true in text]
        assert source
        assert len(set(item["choices"])) == 4
        assert len(item["context"].encode()) == 96
        for choice in item["choices"]:
            assert len(choice.encode()) == 48
            assert choice[0] == " " and not choice[1].isspace() and not choice[-1].isspace()
            assert choice == true or not any(item["context"] + choice in text for text in validation)


def test_cloze_passages_do_not_overlap(documents):
    items = cloze_items(documents)
    assert len(items) > 30
    spans = []
    for item in items:
        passage = item["context"] + item["choices"][item["label"]]
        (index,) = [i for i, text in enumerate(documents) if passage in text]
        spans.append((index, documents[index].index(passage)))
    for i, (document, start) in enumerate(spans):
        assert all(document != d or abs(start - s) >= 96 + 48 for d, s in spans[:i])


def test_cloze_needs_four_documents(documents):
    assert cloze_items(documents[:3]) == []


def test_bpb_documents_stay_within_their_sizes(validation, documents):
    rows = bpb_documents(validation)
    sizes = [len(row["text"].encode()) for row in rows]
    assert sum(sizes) <= 65536 and max(sizes) <= 4096 and len(rows) > 20
    assert all(any(text.startswith(row["text"]) for text in validation) for row in rows)
    cut = bpb_documents(["é" * 4096])  # 8192 bytes: a character is never cut in half
    assert cut == [{"text": "é" * 2048}]
    assert bpb_documents(["  \n"]) == []
    assert sum(len(row["text"].encode()) for row in bpb_documents(documents * 100)) > 65536 - 4096


def test_data_are_written_once_and_follow_the_content(documents, tmp_path):
    folder = write_embedded_data(documents, tmp_path)
    names = [folder / f"flash_stu/embedded/{name}/validation.jsonl" for name in ("bpb", "cloze")]
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in names]
    assert rows == [bpb_documents(documents), cloze_items(documents)]
    stamp = names[0].stat().st_mtime_ns
    assert write_embedded_data(documents, tmp_path) == folder
    assert names[0].stat().st_mtime_ns == stamp
    assert write_embedded_data(documents[1:], tmp_path) != folder
    assert len(list(tmp_path.iterdir())) == 2  # nothing temporary is left
