"""Model directories on disk: load one, or say in a line why not."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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

from flash_stu.config import check_bounds
from flash_stu.errors import UserError
from flash_stu.files import MANIFEST, DamagedError, read_json, read_manifest, reason, verify
from flash_stu.model import FlashSTUForCausalLM
from flash_stu.settings import shown

_FLOATING = ("F64", "F32", "F16", "BF16")
_LARGEST_TOKENIZER = 1 << 30  # bytes
_LONGEST_REASON = 300  # characters


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


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a model directory is and what it is, from the header of its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


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


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a model directory by name, read from the headers of its safetensors files.

    Raises:
        UserError: if a file is missing, damaged, or not as this program wrote it.
    """
    tensors = {}
    check_written(directory, [path.name for path in weight_files(directory)])
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    tensors[name] = StoredTensor(path, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or truncated: {reason(error)}") from None
    return tensors


def check_written(directory: Path, names: Iterable[str]) -> None:
    """Compare files with the manifest of a directory that this program wrote; of another there is nothing to compare.

    Raises:
        UserError: if one differs, or the manifest is damaged.
    """
    try:
        known = read_manifest(directory)["files"]
        verify(directory, [name for name in names if name in known])
    except FileNotFoundError:
        pass
    except (OSError, DamagedError) as error:
        raise UserError(f"{directory}: {reason(error)}; if it is meant to be so, delete {MANIFEST} there") from None


def weight_files(directory: Path) -> list[Path]:
    """Returns the safetensors files with a model's weights: one, or those that its index names.

    Raises:
        UserError: if one is missing, or the index is damaged.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not single.is_file() and index.is_file():
        content = read_json(index)
        places, metadata = content.get("weight_map"), content.get("metadata")
        if not isinstance(places, dict) or not isinstance(metadata, dict) or not places:
            raise UserError(f"{index}: weight_map, of tensors to files, and metadata are needed")
        for name in places.values():
            if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
                raise UserError(f"{index}: weight_map names {shown(name)}; allowed: .safetensors files beside it")
        files = [directory / name for name in sorted(set(places.values()))]
    else:
        files = [single]
    for file in files:
        if not file.is_file():
            raise UserError(f"{directory}: {file.name}, a .safetensors file with weights, is missing")
    return files


def check_tensors(directory: Path, config: PreTrainedConfig) -> bool:
    """Compare names, shapes and dtypes of a directory's tensors with the model of its configuration; loads nothing.

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
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{directory}: no causal language model: {_one_line(error)}") from None
    problem = _difference(found, model, config)
    if problem and isinstance(model, FlashSTUForCausalLM):
        raise UserError(f"{directory}: {problem}")
    return problem is None


def _difference(found: dict[str, StoredTensor], model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """The first thing in which stored tensors are not a model's."""
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    for name, shape in expected.items():
        optional = any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())
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
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """Load a causal language model for inference.

    Args:
        path: a transformers model directory or a training run.
        device: where to put it.
        dtype: of the parameters, "auto" for that of the files; spectral filters and decays stay float32.

    Raises:
        UserError: for a missing directory, one that is not a model, or weights that are missing, truncated, not finite
            or do not fit the configuration.
    """
    directory = resolve_model_dir(path)
    config = read_model_config(directory)
    check_tensors(directory, config)
    if (generation := directory / "generation_config.json").exists():
        read_json(generation)
    with _quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are reported below, in one line
                output_loading_info=True,
            )
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


@torch.no_grad()
def check_finite(tensors: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Look for NaN and infinity in weights: one pass over them, and one synchronisation with a GPU.

    Raises:
        UserError: naming the first tensor that has some.
    """
    checked = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    finite = [torch.stack(tensor.aminmax()).isfinite().all() for tensor in checked.values()]
    for name, good in zip(checked, torch.stack(finite).tolist() if finite else [], strict=True):
        if not good:
            raise UserError(f"{where}: {name} has values that are not finite")


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
    """Keep transformers' reports and progress bars off the terminal; what they report is raised as one line."""
    verbosity, progress = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
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
