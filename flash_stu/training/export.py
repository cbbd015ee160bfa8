"""From a training checkpoint to a transformers model directory."""

import os
import shutil
from pathlib import Path

import torch
from transformers.utils import logging

from flash_stu.data import Tokenizer, load_tokenizer
from flash_stu.errors import UserError
from flash_stu.model import FlashSTUForCausalLM
from flash_stu.training.checkpoint import list_steps, load_weights
from flash_stu.training.config import load_config


def find_checkpoint(run: str | Path, step: int | None = None) -> Path:
    """The checkpoint of a step of a run; of the newest, if none is given.

    Raises:
        UserError: if the run has no such checkpoint.
    """
    folder = Path(run) / "checkpoints"
    steps = list_steps(folder)
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
    if not (path / "progress.json").is_file() or not config_file.is_file():
        raise UserError(f"{path} is not a checkpoint of a training run; expected RUN/checkpoints/step-N")
    config = load_config(config_file)
    tokenizer = load_tokenizer(config.data.tokenizer)
    architecture = config.architecture()
    architecture.eos_token_id = tokenizer.eos_token_id
    with torch.device("meta"):
        model = FlashSTUForCausalLM(architecture)
    model.load_state_dict(load_weights(path), assign=True, strict=False)
    model.tie_weights()
    return model.eval(), tokenizer


def export_checkpoint(path: str | Path, output: str | Path) -> None:
    """Write the model of a checkpoint and its tokenizer as a transformers directory, whole or not at all.

    Args:
        path: see load_checkpoint.
        output: replaced if it is a model directory already.

    Raises:
        UserError: as load_checkpoint; if output is something else, or cannot be written.
    """
    output = Path(output)
    if output.exists() and not (output / "config.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not a model directory; choose another --output")
    model, tokenizer = load_checkpoint(path)
    temporary = output.with_name(f".{output.name}.tmp")
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(temporary)
        tokenizer.to_transformers().save_pretrained(temporary)
        shutil.rmtree(output, ignore_errors=True)
        os.rename(temporary, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        if progress:
            logging.enable_progress_bar()
