"""Find and load the model that a path means: a model directory, a training run, or a checkpoint of one."""

from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_stu.errors import UserError
from flash_stu.model.loading import load_model, load_model_tokenizer, resolve_model_dir
from flash_stu.training.checkpoint_export import load_checkpoint
from flash_stu.training.checkpoint_folder import list_steps


def find_source(path: str | Path, purpose: str = "used") -> Path:
    """Returns the directory of weights that a path means: itself, or `final` in a training run.

    Args:
        path: a transformers model directory, a training run, or RUN/checkpoints/step-N.
        purpose: what is done with it, for the message.

    Raises:
        UserError: if there are none; for a run that is not finished, naming a checkpoint to give instead.
    """
    path = Path(path)
    if is_checkpoint(path):
        return path
    steps = list_steps(path / "checkpoints")
    if steps and not any((folder / "config.json").is_file() for folder in (path, path / "final")):
        newest = path / "checkpoints" / f"step-{steps[-1]}"
        raise UserError(f"{path}: the training run has no final/ yet; a checkpoint of it can be {purpose}: {newest}")
    return resolve_model_dir(path)


def is_checkpoint(path: Path) -> bool:
    """Returns whether a path is RUN/checkpoints/step-N."""
    return path.resolve().parent.name == "checkpoints" and path.is_dir()


def load_source(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that a path means, and its tokenizer.

    Args:
        path: a transformers model directory, a training run, or RUN/checkpoints/step-N.
        device: where to put the model.
        dtype: of its parameters; spectral filters and decays stay float32.

    Raises:
        UserError: as `find_source`, and for weights or a tokenizer that cannot be loaded.
    """
    directory = find_source(path)
    if not is_checkpoint(directory):
        tokenizer = load_model_tokenizer(directory)  # the quicker one to be refused
        return load_model(directory, device, dtype), tokenizer
    model, tokenizer = load_checkpoint(directory)
    cast(torch.nn.Module, model).to(device, dtype)
    return model, tokenizer.to_transformers()
