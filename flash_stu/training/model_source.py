"""The models of model directories, training runs and checkpoints: found, loaded on one process, or exported."""

from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from flash_stu import files
from flash_stu.data import Tokenizer, load_tokenizer
from flash_stu.errors import UserError
from flash_stu.model.loading import load_model, load_model_tokenizer, resolve_model_dir
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.reading import DamagedError
from flash_stu.training import checkpoint_folder
from flash_stu.training.initialization import build_model
from flash_stu.training.run_config import load_config


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
    steps = checkpoint_folder.list_steps(path / "checkpoints")
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
        path: see `find_source`.
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


def load_source_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model that a path means, without the model.

    Raises:
        UserError: as `find_source`, and for a tokenizer that cannot be loaded.
    """
    directory = find_source(path)
    if not is_checkpoint(directory):
        return load_model_tokenizer(directory)
    config = load_config(directory.resolve().parent.parent / "config.yaml")
    return load_tokenizer(config.data.tokenizer).to_transformers()


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
    """Give a model, which may be on the meta device, the weights and buffers of a checkpoint, on the CPU.

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
    wanted = {name: entry for name, entry in saved.items() if name.startswith("model.")}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in wanted.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    model.load_state_dict(weights, assign=True, strict=False)  # tied ones have other names too


def export_checkpoint(path: str | Path, output: str | Path, label: str = "--output") -> None:
    """Write the model of a checkpoint and its tokenizer as a transformers directory, whole or not at all.

    A model directory that this program wrote is replaced.

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
