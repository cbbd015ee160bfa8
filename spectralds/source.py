"""What can be distilled, opened: a model directory, a training run, or a checkpoint of one."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flash_stu.data import Tokenizer, load_tokenizer
from flash_stu.loading import load_model, load_model_tokenizer
from flash_stu.model import FlashSTUForCausalLM
from flash_stu.source import is_checkpoint
from flash_stu.training.export import load_checkpoint

_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    "chat_template*",
)


@dataclass(frozen=True)
class Source:
    """A model with what belongs to it.

    Attributes:
        directory: where its weights are.
        run: the training run that it is from, if that is known.
        model: on the CPU in eval mode, in the dtype of its file.
        has_tokenizer: whether there is one; tokenizer: loads it, or raises a UserError.
        copy_tokenizer: puts its files, as transformers reads them, into a directory.
    """

    directory: Path
    run: Path | None
    model: FlashSTUForCausalLM
    has_tokenizer: bool
    tokenizer: Callable[[], Tokenizer]
    copy_tokenizer: Callable[[Path], None]


def open_source(directory: Path) -> Source:
    """Load what `flash_stu.source.find_source` found.

    Raises:
        UserError: for weights or a tokenizer that cannot be loaded.
    """
    if is_checkpoint(directory):
        model, tokenizer = load_checkpoint(directory)
        copy = tokenizer.to_transformers
        run = directory.resolve().parent.parent
        return Source(directory, run, model, True, lambda: tokenizer, lambda folder: copy().save_pretrained(folder))

    files = sorted({path for pattern in _TOKENIZER_FILES for path in directory.glob(pattern)})
    has_tokenizer = any(path.name.startswith("tokenizer") for path in files)
    if has_tokenizer:
        load_model_tokenizer(directory)  # a damaged one is not passed on
    run = directory.resolve().parent
    return Source(
        directory,
        run if directory.resolve().name == "final" and (run / "config.yaml").is_file() else None,
        load_model(directory, dtype="auto"),
        has_tokenizer,
        lambda: load_tokenizer(str(directory)),
        lambda folder: [shutil.copy2(path, folder) for path in files if path.is_file()],
    )
