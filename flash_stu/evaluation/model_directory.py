"""Check model directories, cheaply, before anything is loaded."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from flash_stu.errors import UserError
from flash_stu.loading import (
    check_tensors,
    load_model,
    load_model_tokenizer,
    read_model_config,
    resolve_model_dir,
    weight_files,
)


def check_model_dir(path: str | Path) -> Path:
    """Find the model directory that a path means and look whether its parts are there, whole and fit each other.

    Raises:
        UserError: if it is missing, not a model, without tokenizer, or its weights are missing, truncated or others
            than its config.json describes.
    """
    directory = resolve_model_dir(path)
    load_model_tokenizer(directory)
    if not check_tensors(directory, read_model_config(directory)):
        load_model(directory)  # which decides
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
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", *(file.name for file in weight_files(directory))]
    for path in (directory / name for name in names):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
