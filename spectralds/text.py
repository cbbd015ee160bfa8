"""Real text on which a model and its distillation are compared."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flash_stu.data import embedded_corpus, load_tokenizer, prepare
from flash_stu.errors import UserError
from flash_stu.training.config import load_config

TOKENS = 8192


@dataclass(frozen=True)
class ComparisonText:
    """Token windows (windows, length + 1), int64, and in words where they are from."""

    windows: torch.Tensor
    source: str


def comparison_text(directory: Path, text: str | None, longest: int, tokens: int = TOKENS) -> ComparisonText | None:
    """Choose and tokenise the text for a comparison.

    Args:
        directory: the model's, with its tokenizer; in a training run its name is final.
        text: a UTF-8 text file, or "embedded" for the embedded corpus' validation documents. None: the
            validation split of the training run, in windows of its sequence length; outside a run, the
            embedded corpus.
        longest: tokens the model can take.
        tokens: how many to compare on, about.

    Returns:
        windows spread evenly over the text; None if no text was asked for and the model came without a
        tokenizer.

    Raises:
        UserError: for a file that cannot be read or is too short, and if the run's data or the tokenizer
            cannot be loaded.
    """
    run = directory.parent / "config.yaml"
    if text is None and directory.name == "final" and run.is_file():
        config = load_config(run)
        try:
            dataset = prepare(config.data).validation
        except UserError as error:
            raise UserError(f"{error}; or choose another text for the comparison with --text") from None
        length = min(longest, config.train.sequence_length)
        windows = _windows(dataset.window, len(dataset), length, tokens)
        return ComparisonText(windows, f"validation split of {run.parent}")

    if text is None and not any(directory.glob("tokenizer*")):
        return None
    documents = embedded_corpus()["validation"] if text in (None, "embedded") else [_read(Path(text))]
    ids = load_tokenizer(str(directory)).encode_documents(documents)
    source = "validation documents of the embedded corpus" if text in (None, "embedded") else text
    windows = _windows(lambda start, count: ids[start : start + count], len(ids), longest, tokens)
    return ComparisonText(windows, source)


def _windows(read, available: int, length: int, tokens: int) -> torch.Tensor:
    """Cut windows of length + 1 tokens, spread evenly; `read` gives (start, count) -> ids."""
    length = min(length, available - 1, tokens)
    if length < 1:
        raise UserError(f"the text for the comparison has {available} token(s); allowed: 2 or more")
    fitting = (available - 1) // length
    count = min(fitting, max(1, tokens // length))
    starts = [i * fitting // count * length for i in range(count)]
    return torch.from_numpy(np.stack([read(start, length + 1) for start in starts]).astype(np.int64))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror or error}; allowed: a text file, or embedded") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {path}: not UTF-8 text") from None
