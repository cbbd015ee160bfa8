"""Bits per byte and loss by position of a text, against the model's own loss."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.evaluation.language_model import EvaluatedLM
from flash_stu.evaluation.scoring import Score
from flash_stu.evaluation.text import by_position, score_text

EOT = 256


@pytest.fixture
def lm(lds_dir):
    return EvaluatedLM.load(lds_dir, "cpu")


def nats(lm, ids, start, stop):
    """Per token, of ids[start + 1 : stop + 1] after ids[start : stop]."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids[start:stop]])).logits[0]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start + 1 : stop + 1]), reduction="none").numpy()


def test_every_token_of_the_stream_is_scored_once(lm, documents, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents[:3]))
    found = score_text(lm, path, column="body")
    ids = [EOT, *(token for text in documents[:3] for token in [*text.encode(), EOT])]
    parts = [nats(lm, ids, start, min(start + 130, len(ids) - 1)) for start in range(0, len(ids) - 1, 130)]
    total, size = sum(part.sum() for part in parts), sum(len(text.encode()) for text in documents[:3])
    assert (found["window"], found["windows"]) == (130, len(parts))  # twice the trained length
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, size)
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    last = found["positions"][-1]
    assert (last["first"], last["last"]) == (129, 130)
    assert last["loss"] == pytest.approx(np.mean([part[128:].mean() for part in parts if len(part) == 130]), rel=1e-5)


def test_formats_give_the_same_and_a_limit_is_in_windows(lm, documents, tmp_path):
    text = documents[0]
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.py").write_text(text)
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    wanted, *others = (score_text(lm, tmp_path / name, length=50) for name in ("a.txt", "a.py", "a.parquet"))
    assert others == [wanted, wanted]
    two = score_text(lm, tmp_path / "a.txt", length=50, limit=2)
    assert (two["windows"], two["tokens"]) == (2, 100)
    assert two["bytes"] == round(100 / (len(text.encode()) + 1) * len(text.encode()))


def test_a_model_with_a_longest_input_gets_windows_that_fit(stu_dir, documents, tmp_path):
    (tmp_path / "a.txt").write_text(documents[0])
    found = score_text(EvaluatedLM.load(stu_dir, "cpu"), tmp_path / "a.txt", length=500)
    assert found["window"] == 65
    assert found["positions"][-1]["last"] == 65


def test_stretches_cover_every_position_once():
    rng = np.random.default_rng(0)
    scores = [Score(-rng.random(n).astype(np.float32), False) for n in (21, 21, 13)]
    buckets = by_position(scores, 21)
    assert [(b["first"], b["last"]) for b in buckets][:6] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8)]
    assert [b["first"] for b in buckets[1:]] == [b["last"] + 1 for b in buckets[:-1]]
    assert buckets[-1]["last"] == 21 and sum(b["tokens"] for b in buckets) == 55
    means = [-score.log_probs[4:6].mean() for score in scores]
    assert buckets[4]["loss"] == pytest.approx(np.mean(means), rel=1e-6)
    assert buckets[4]["stderr"] == pytest.approx(np.std(means, ddof=1) / 3**0.5, rel=1e-6)
    assert by_position(scores[:1], 21)[0]["stderr"] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("a.bin", b"ab\n\xff\xfe", "not UTF-8 text at byte 3, in line 2"),
        ("b.txt", "ab".encode("utf-16"), "the text is UTF-16"),
    ],
)
def test_files_without_text_are_refused(name, content, message, lm, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        score_text(lm, tmp_path / name)
