"""Check model directories, cheaply, before anything is loaded."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flash_stu.errors import UserError
from flash_stu.loading import resolve_model_dir


def check_model_dir(path: str | Path) -> Path:
    """Find the model directory that a path means and look whether its parts are there and whole.

    Raises:
        UserError: if it is missing, not a model, without tokenizer, or its weights are missing or truncated.
    """
    directory = resolve_model_dir(path)
    _read_json(directory / "config.json", key="model_type")
    for name in _weight_files(directory):
        _check_weights(directory / name)
    if not any((directory / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise UserError(f"{directory}: no tokenizer (tokenizer.json, tokenizer_config.json)")
    return directory


def label_models(paths: Sequence[str | Path]) -> list[str]:
    """Short names for the rows of the table: of the directory, or of the run if it is called final.

    Raises:
        UserError: if a directory is given twice.
    """
    resolved = [Path(path).resolve() for path in paths]
    for path, given in zip(resolved, paths, strict=True):
        if resolved.count(path) > 1:
            raise UserError(f"--model {given} is given twice; give it once")
    names = [path.parent.name if path.name == "final" else path.name for path in resolved]
    return [str(path) if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]


def config_hash(directory: Path) -> str:
    """A short hash of a model's config.json, for telling models apart in results."""
    return hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()[:16]


def content_hash(directory: Path) -> str:
    """A short hash of all that a model is: config, weights and tokenizer."""
    digest = hashlib.sha256()
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", *_weight_files(directory)]
    for path in (directory / name for name in names):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _read_json(path: Path, key: str) -> dict:
    try:
        return {key: json.loads(path.read_text(encoding="utf-8"))[key]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object with {key!r}") from error


def _weight_files(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(_read_json(index, key="weight_map")["weight_map"].values()))
    return ["model.safetensors"]


def _check_weights(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path.parent}: {path.name}, the weights, is missing")
    try:
        with safe_open(path, framework="pt"):
            pass  # opening compares the header with the size of the file
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated ({error})") from error
