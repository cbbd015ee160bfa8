"""Models of training checkpoints: loaded on one process, or written as transformers directories."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from transformers.utils import logging

from flash_stu import files
from flash_stu.data import Tokenizer, load_tokenizer
from flash_stu.errors import UserError
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.reading import DamagedError
from flash_stu.training import checkpoint_folder
from flash_stu.training.initialization import build_model
from flash_stu.training.run_config import load_config


def find_checkpoint(run: str | Path, step: int | None = None) -> Path:
    """Returns the path of a run's checkpoint of a step, of the newest if none is given.

    Raises:
        UserError: if the run has no such checkpoint.
    """
    folder = Path(run) / "checkpoints"
    steps = checkpoint_folder.list_steps(folder)
    if not steps:
        raise UserError(f"{run} has no checkpoints")
    if step is not None and step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}; there are: {', '.join(map(str, steps))}")
    return folder / f"step-{steps[-1] if step is None else step}"


def load_checkpoint(path: str | Path) -> tuple[FlashSTUForCausalLM, Tokenizer]:
    """Load the model of a checkpoint, whatever the number of processes that wrote it.

    Args:
        path: RUN/checkpoints/step-N, beside the run's config.yaml.

    Returns:
        the model in float32 on the CPU, in eval mode, and the tokenizer of its data.

    Raises:
        UserError: if this is not a checkpoint of a run, or it is damaged.
    """
    path = Path(path)
    config_file = path.resolve().parent.parent / "config.yaml"
    if not path.is_dir() or not config_file.is_file():
        raise UserError(f"{path} is not a checkpoint of a training run; expected RUN/checkpoints/step-N")
    config = load_config(config_file)
    tokenizer = load_tokenizer(config.data.tokenizer)
    architecture = config.architecture()
    architecture.eos_token_id = tokenizer.eos_token_id
    model = build_model(architecture)
    load_weights(path, model)
    model.tie_weights()
    return model.eval(), tokenizer


def load_weights(path: Path, model: nn.Module) -> None:
    """Give a model the weights and buffers of a checkpoint, on the CPU.

    Args:
        path: the checkpoint.
        model: may be on the meta device; its tensors are replaced.

    Raises:
        UserError: if the checkpoint is not there, not as it was written, or another model's.
    """
    try:
        checkpoint_folder.read_state(path)
        files.verify(path)
        reader, saved = checkpoint_folder.open_reader(path)
    except (OSError, DamagedError) as error:
        raise UserError(f"damaged checkpoint {path}: {error}") from error
    checkpoint_folder.check_weights(path, saved, checkpoint_folder.own_tensors(model))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if name.startswith("model.")
    }
    load(tensors, storage_reader=reader, no_dist=True)
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    model.load_state_dict(weights, assign=True, strict=False)  # tied ones have other names too


def export_checkpoint(path: str | Path, output: str | Path, label: str = "--output") -> None:
    """Write the model of a checkpoint and its tokenizer as a transformers directory, whole or not at all.

    Args:
        path: see load_checkpoint.
        output: replaced if it is a model directory that this program wrote.
        label: what a message calls it.

    Raises:
        UserError: as load_checkpoint; if output is something else, or cannot be written.
    """
    files.check_output(output, "model", label)
    model, tokenizer = load_checkpoint(path)
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with files.replacing_directory(output, "model", label) as temporary:
            model.save_pretrained(temporary)
            tokenizer.to_transformers().save_pretrained(temporary)
    finally:
        if progress:
            logging.enable_progress_bar()
