"""What can be distilled, opened: a model directory, a training run, or a checkpoint of one."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flash_stu.data import Tokenizer, load_tokenizer
from flash_stu.errors import UserError
from flash_stu.loading import load_model, resolve_model_dir
from flash_stu.model import FlashSTUForCausalLM
from flash_stu.training.checkpoint import list_steps
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


def find_source(path: str | Path) -> Path:
    """The directory of weights that a path means: itself, or `final` in a training run.

    Raises:
        UserError: if there are none; for a run that is not finished, naming a checkpoint to give instead.
    """
    path = Path(path)
    if _is_checkpoint(path):
        return path
    steps = list_steps(path / "checkpoints")
    if steps and not any((folder / "config.json").is_file() for folder in (path, path / "final")):
        newest = path / "checkpoints" / f"step-{steps[-1]}"
        raise UserError(f"{path}: the training run has no final/ yet; a checkpoint of it can be distilled: {newest}")
    return resolve_model_dir(path)


def open_source(directory: Path) -> Source:
    """Load what `find_source` found.

    Raises:
        UserError: for weights that cannot be loaded.
    """
    if _is_checkpoint(directory):
        model, tokenizer = load_checkpoint(directory)
        copy = tokenizer.to_transformers
        run = directory.resolve().parent.parent
        return Source(directory, run, model, True, lambda: tokenizer, lambda folder: copy().save_pretrained(folder))

    files = sorted({path for pattern in _TOKENIZER_FILES for path in directory.glob(pattern)})
    run = directory.resolve().parent
    return Source(
        directory,
        run if directory.resolve().name == "final" and (run / "config.yaml").is_file() else None,
        load_model(directory, dtype="auto"),
        any(path.name.startswith("tokenizer") for path in files),
        lambda: load_tokenizer(str(directory)),
        lambda folder: [shutil.copy2(path, folder) for path in files],
    )


def _is_checkpoint(path: Path) -> bool:
    return path.resolve().parent.name == "checkpoints" and path.is_dir()
