"""The tensors of a model directory: where its files hold them, and whether they are finite."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flash_stu.errors import UserError, reason
from flash_stu.files import MANIFEST, read_manifest, verify
from flash_stu.reading import DamagedError, read_json
from flash_stu.settings import shown


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a model directory as the header of its file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


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
