"""Load a transformers model directory, or raise one line that names what is wrong with it."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from flash_stu.errors import UserError
from flash_stu.model import auto
from flash_stu.model.config import FlashSTUConfig, check_bounds
from flash_stu.model.layers.linear import FusedLinear, join, separate_layers
from flash_stu.model.pretrained import OPTIONAL_TENSORS, FlashSTUPreTrainedModel
from flash_stu.model.weights import StoredTensor, check_finite, check_written, find_tensors
from flash_stu.reading import read_json
from flash_stu.settings import shown

_FLOATING = ("F64", "F32", "F16", "BF16")
_LARGEST_TOKENIZER = 1 << 30  # bytes
_LONGEST_REASON = 300  # characters


def resolve_model_dir(path: str | Path) -> Path:
    """Returns the transformers directory that a path means: itself, or `final` in a training run.

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


def read_model_config(directory: Path) -> PreTrainedConfig:
    """Read and check config.json; no code that the directory holds or names is run.

    Raises:
        UserError: if it is damaged, of an unknown model_type, or describes a model that cannot be built.
    """
    path = directory / "config.json"
    raw = read_json(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{path}: model_type is {shown(kind)}, which neither this project nor transformers knows")
    if "transformers_weights" in raw or (directory / "adapter_config.json").exists():
        raise UserError(f"{directory}: part of a model (transformers_weights, adapter_config.json); needed: all of it")
    with _quiet():
        try:
            check_bounds(raw)
            return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers and torch fail in as many ways as there are values
            raise UserError(f"{path}: {_one_line(error)}") from None


def stored_class(config: PreTrainedConfig, any_class: bool = False) -> Any:
    """Returns what builds the model of a directory: a language model, or with `any_class` ours that it was saved as."""
    names = [name for name in config.architectures or [] if name in auto.CLASSES]
    if any_class and isinstance(config, FlashSTUConfig) and names:
        return auto.model_class(names[0])
    return AutoModelForCausalLM


def check_tensors(directory: Path, config: PreTrainedConfig, any_class: bool = False) -> bool:
    """Compare names, shapes and dtypes of a directory's tensors with the model of its configuration; loads nothing.

    Args:
        directory: of the model.
        config: its configuration.
        any_class: see `load_model`.

    Returns:
        whether they agree. Of another kind of model than ours that is no verdict: transformers may rename and merge its
        tensors as it loads them.

    Raises:
        UserError: if the directory has no causal language model, or one of ours whose tensors do not fit, naming the
            first that is missing, misshapen, unknown or not of floating point.
    """
    found = find_tensors(directory)
    try:
        with torch.device("meta"), _quiet():
            kind = stored_class(config, any_class)
            is_auto = kind is AutoModelForCausalLM
            model = kind.from_config(config, trust_remote_code=False) if is_auto else kind(config)
    except Exception as error:
        raise UserError(f"{directory}: no causal language model: {_one_line(error)}") from None
    problem = _difference(found, model, _expected(found, model))
    if problem and isinstance(model, FlashSTUPreTrainedModel):
        raise UserError(f"{directory}: {problem}")
    return problem is None


def _expected(found: dict[str, StoredTensor], model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's tensors by the names that a directory has for them; tied ones once."""
    tied, separate = model.all_tied_weights_keys, {joined[0] for joined in map(join, found) if joined}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    for name, module in model.named_modules():
        for layer, part in separate_layers(module, name) if isinstance(module, FusedLinear) else ():
            for key, tensor in part.named_parameters():
                if f"{name}.{key}" in separate:
                    expected.pop(f"{name}.{key}", None)
                    expected[f"{layer}.{key}"] = tuple(tensor.shape)
    return expected


def _difference(
    found: dict[str, StoredTensor], model: PreTrainedModel, expected: dict[str, tuple[int, ...]]
) -> str | None:
    """Returns the first difference between stored tensors and a model's, or None."""
    tied = model.all_tied_weights_keys
    for name, shape in expected.items():
        optional = any(re.search(pattern, name) for pattern in OPTIONAL_TENSORS)
        if name not in found and not optional:
            return f"the weights have no tensor {name}"
        if name in found and found[name].shape != shape:
            return f"{name} has shape {found[name].shape}; config.json asks for {shape}"
    for name, tensor in found.items():
        if name not in expected and name not in tied:
            return f"{name} has no place in the model of config.json"
        if tensor.dtype not in _FLOATING:
            return f"{name} has dtype {tensor.dtype}; allowed: {', '.join(_FLOATING)}"
    return None


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    any_class: bool = False,
) -> PreTrainedModel:
    """Load a causal language model for inference.

    Args:
        path: a transformers model directory or a training run.
        device: where to put it.
        dtype: of the parameters, "auto" for that of the files; spectral filters and decays stay float32.
        any_class: a classifier or another model of ours is loaded as what it was saved as, not as a language model.

    Raises:
        UserError: for a missing directory, one that is not a model, or weights that are missing, truncated, not finite
            or do not fit the configuration.
    """
    directory = resolve_model_dir(path)
    config = read_model_config(directory)
    check_tensors(directory, config, any_class)
    if (generation := directory / "generation_config.json").exists():
        read_json(generation)
    with _quiet():
        try:
            loaded: Any = stored_class(config, any_class).from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are reported below, in one line
                output_loading_info=True,
            )
            model, info = loaded
            model = model.to(device).eval()
        except Exception as error:  # see read_model_config
            raise UserError(f"{directory}: cannot be loaded: {_one_line(error)}") from None
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[problem]:
            first = sorted(info[problem])[0]
            name = first if isinstance(first, str) else first[0]
            raise UserError(f"{directory}: the weights have {problem.replace('_', ' ')}: {name}")
    check_finite({**dict(model.named_parameters()), **dict(model.named_buffers())}, directory)
    return model


def load_model_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model.

    Raises:
        UserError: if the directory has none, it is damaged, or it has ids that the model does not.
    """
    directory = resolve_model_dir(path)
    if not any((directory / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise UserError(f"{directory}: no tokenizer (tokenizer.json, tokenizer_config.json)")
    for file in (directory / "tokenizer_config.json", directory / "tokenizer.json"):
        if file.exists():
            read_json(file, largest=_LARGEST_TOKENIZER)
    check_written(directory, ["tokenizer.json"])
    vocab_size = read_model_config(directory).get_text_config().vocab_size
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            largest = max(tokenizer.get_vocab().values(), default=-1)
        except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
            raise UserError(f"{directory}: no usable tokenizer: {_one_line(error)}") from None
    if largest >= vocab_size:
        raise UserError(
            f"{directory}: the tokenizer's ids go up to {largest}, the model's vocabulary to {vocab_size - 1}"
        )
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' reports and progress bars off the terminal; callers raise them as one line."""
    verbosity, progress = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if progress:
            hf_logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    """Returns the message of another library, or of what it was caused by, shortened."""
    text = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
