"""Real text on which a model and its distillation are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flash_stu.data import Tokenizer, embedded_corpus, prepare
from flash_stu.data.tokenizer import naming_documents
from flash_stu.errors import UserError
from flash_stu.reading import read_text
from flash_stu.training.run_config import load_config

TOKENS = 8192
_LARGEST = 1 << 40  # bytes; all of a text is in memory


@dataclass(frozen=True)
class ComparisonText:
    """Token windows (windows, length + 1), int64, and a description of where they are from."""

    windows: torch.Tensor
    source: str


def comparison_text(
    load_tokenizer: Callable[[], Tokenizer], run: Path | None, text: str | None, longest: int, tokens: int = TOKENS
) -> ComparisonText:
    """Choose and tokenise the text for a comparison.

    Args:
        load_tokenizer: returns the model's tokenizer.
        run: the training run that the model is from, with its config.yaml; None for a model from elsewhere.
        text: a UTF-8 text file, or "embedded" for the embedded corpus' validation documents. None: the
            validation split of the training run, in windows of its sequence length; outside a run, the
            embedded corpus.
        longest: tokens the model can take.
        tokens: how many to compare on, about.

    Returns:
        windows spread evenly over the text.

    Raises:
        UserError: for a file that cannot be read or is too short, and if the run's data or the tokenizer
            cannot be loaded.
    """
    if text is None and run is not None:
        config = load_config(run / "config.yaml")
        try:
            dataset = prepare(config.data).validation
        except UserError as error:
            raise UserError(f"{error}; or compare on another text (argument text)") from None
        length = min(longest, config.train.sequence_length)
        windows = _windows(dataset.window, len(dataset), length, tokens)
        return ComparisonText(windows, f"validation split of {run}")

    if text in (None, "embedded"):
        documents, source = embedded_corpus()["validation"], "validation documents of the embedded corpus"
    else:
        documents, source = [read_text(text, "text", _LARGEST)], text
    encoder = load_tokenizer()
    with naming_documents(encoder, documents, source):
        ids = encoder.encode_documents(documents)
    windows = _windows(lambda start, count: ids[start : start + count], len(ids), longest, tokens)
    return ComparisonText(windows, source)


def _windows(read: Callable[[int, int], np.ndarray], available: int, length: int, tokens: int) -> torch.Tensor:
    """Cut windows of length + 1 tokens, spread evenly; `read` returns ids, given where they start and their number."""
    length = min(length, available - 1, tokens)
    if length < 1:
        raise UserError(f"the text for the comparison has {available} token(s); allowed: 2 or more")
    fitting = (available - 1) // length
    count = min(fitting, max(1, tokens // length))
    starts = [i * fitting // count * length for i in range(count)]
    return torch.from_numpy(np.stack([read(start, length + 1) for start in starts]).astype(np.int64))
