"""Model directories on disk: load one, or say in a line why not."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from flash_stu.errors import UserError


def resolve_model_dir(path: str | Path) -> Path:
    """Find the transformers directory that a path means: itself, or `final` in a training run.

    Raises:
        UserError: if there is no model there.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such directory")
    for candidate in (path, path / "final"):
        if (candidate / "config.json").is_file():
            return candidate
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: the training run has no final/ yet; let it finish")
    raise UserError(f"{path}: not a model directory (no config.json, no final/config.json)")


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a causal language model for inference.

    Args:
        path: a transformers model directory or a training run.
        device: where to put it.
        dtype: of the parameters; spectral filters and decays stay float32.

    Raises:
        UserError: for a missing directory, one that is not a model, or weights that are missing, truncated or do not
            fit the configuration.
    """
    directory = resolve_model_dir(path)
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory}: no .safetensors file with the weights")
    progress = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{directory}: cannot be loaded: {' '.join(str(error).split())}") from None
    finally:
        if progress:
            hf_logging.enable_progress_bar()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise UserError(f"{directory}: the weights have {problem.replace('_', ' ')}: {sorted(info[problem])[0]}")
    return model.to(device).eval()


def load_model_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model.

    Raises:
        UserError: if the directory has none.
    """
    directory = resolve_model_dir(path)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: no usable tokenizer: {' '.join(str(error).split())}") from None


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the default one for None.

    Raises:
        UserError: for a name that means no device here.
    """
    if name is None:
        return default_device()
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    allowed = ["cpu", *["cuda"] * bool(gpus), *gpus]
    if name not in allowed:
        raise UserError(f"--device is {name!r}; allowed here: {', '.join(allowed)}")
    return torch.device(name)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
