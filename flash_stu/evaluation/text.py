"""The loss on any text, and how it depends on the position: does it keep falling with more context?

The documents of a file are joined as in training, each followed by an end-of-text token, and the stream is cut into
windows. Every token is scored once, after as many tokens as come before it in its window; so every position is
measured on the same mixture of documents.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flash_stu.data.formats import file_format, read_texts
from flash_stu.errors import UserError
from flash_stu.evaluation.language_model import EvaluatedLM
from flash_stu.evaluation.scoring import Score, Window
from flash_stu.reading import read_text

_LARGEST = 1 << 40  # bytes; all of a text is in memory


def score_text(
    lm: EvaluatedLM, path: Path, column: str = "text", length: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Measure a model on a file of text.

    Args:
        lm: the model.
        path: a .jsonl or .parquet file, or any file of text.
        column: parquet column or jsonl key of the text.
        length: tokens in a window; None for twice the trained length. A model that has a longest input gets windows
            of at most that.
        limit: score only so many windows.

    Returns:
        bits_per_byte, perplexity (per token), loss (nats per token), window, windows, tokens, bytes, and positions: for
        stretches of positions (first to last number of tokens before) the loss, its standard error over windows and
        the number of tokens.

    Raises:
        UserError: if the file cannot be read or holds no text.
    """
    length = length or 2 * lm.trained_length
    if lm.longest is not None:
        length = min(length, lm.longest)
    share, num_bytes = 1.0, 0
    stream, total = [lm.prefix_token_id], 0
    wanted = math.inf if limit is None else limit * length
    for ids, size in _documents(lm, path, column):
        stream += ids
        total, num_bytes = total + len(ids), num_bytes + size
        if total >= wanted:
            share = wanted / total
            break
    if not total:
        raise UserError(f"text {path} holds no text")
    stream = stream[: int(min(wanted, total)) + 1]
    pieces = [stream[start : start + length + 1] for start in range(0, len(stream) - 1, length)]
    windows = [Window(tuple(piece[:-1]), tuple(piece[1:])) for piece in pieces]
    scores = lm.score(windows)

    tokens = len(stream) - 1
    nats = -sum(score.log_likelihood for score in scores)
    scored_bytes = num_bytes * share
    return {
        "bits_per_byte": nats / math.log(2) / scored_bytes,
        "perplexity": math.exp(nats / tokens),
        "loss": nats / tokens,
        "window": length,
        "windows": len(windows),
        "tokens": tokens,
        "bytes": round(scored_bytes),
        "positions": by_position(scores, length),
    }


def by_position(scores: Sequence[Score], length: int) -> list[dict[str, float | int | None]]:
    """Returns the mean loss in stretches of positions that end at powers of two and half-way between them."""
    found: list[dict[str, float | int | None]] = []
    for before, last in pairwise([0, *_ends(length)]):
        parts = [-score.log_probs[before:last].astype(np.float64) for score in scores if len(score.log_probs) > before]
        if not parts:
            break
        means = np.array([part.mean() for part in parts])
        found.append(
            {
                "first": before + 1,
                "last": last,
                "loss": float(np.concatenate(parts).mean()),
                "stderr": float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
                "tokens": sum(map(len, parts)),
            }
        )
    return found


def _ends(length: int) -> list[int]:
    """Returns 1, 2, 3, 4, 6, 8, 12, ... up to length."""
    ends, power = [1], 2
    while power < length:
        ends += [power, power * 3 // 2]
        power *= 2
    return [end for end in ends if end < length] + [length]


def _documents(lm: EvaluatedLM, path: Path, column: str) -> Iterator[tuple[list[int], int]]:
    """Yields the token ids of every document, end-of-text included, and its size in bytes.

    A file of no known format is one document.
    """
    texts = read_texts(path, column) if file_format(path) else [read_text(path, "text", _LARGEST)]
    for text in texts:
        if text:
            yield [*lm.tok_encode(text, add_special_tokens=False), lm.eot_token_id], len(text.encode())
