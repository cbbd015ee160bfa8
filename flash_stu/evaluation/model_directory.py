"""Check model directories, cheaply, before anything is loaded."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from flash_stu.errors import UserError
from flash_stu.model.loading import check_tensors, load_model, load_model_tokenizer, read_model_config
from flash_stu.model.source import find_source, is_checkpoint
from flash_stu.model.weights import weight_files
from flash_stu.training.checkpoint_export import load_checkpoint


def check_model_dir(path: str | Path) -> Path:
    """Find the directory of weights that a path means and look whether its parts are there, whole and fit each other.

    Args:
        path: see `flash_stu.model.source.find_source`.

    Raises:
        UserError: if it is missing, not a model, without tokenizer, or its weights are missing, truncated or others
            than its config.json describes.
    """
    directory = find_source(path, "evaluated")
    if is_checkpoint(directory):
        load_checkpoint(directory)  # which compares checksums
        return directory
    load_model_tokenizer(directory)
    if not check_tensors(directory, read_model_config(directory)):
        load_model(directory)  # which decides
    return directory


def label_models(paths: Sequence[str | Path]) -> list[str]:
    """Short names for the rows of the table: of the directory; of the run for its final/, with the step for another.

    Raises:
        UserError: if a directory is given twice.
    """
    resolved = [Path(path).resolve() for path in paths]
    for path, given in zip(resolved, paths, strict=True):
        if resolved.count(path) > 1:
            raise UserError(f"--model {given} is given twice; give it once")
    names = [_name(path) for path in resolved]
    return [str(path) if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]


def config_hash(directory: Path) -> str:
    """A short hash of a model's config.json (a checkpoint's config.yaml), for telling models apart in results."""
    return hashlib.sha256(_config_file(directory).read_bytes()).hexdigest()[:16]


def content_hash(directory: Path) -> str:
    """A short hash of all that a model is: config, weights and tokenizer."""
    digest = hashlib.sha256()
    if is_checkpoint(directory):
        files = [_config_file(directory), *sorted(directory.glob("*.safetensors"))]
    else:
        names = ("config.json", "tokenizer.json", "tokenizer_config.json")
        files = [directory / name for name in names] + weight_files(directory)
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _config_file(directory: Path) -> Path:
    if is_checkpoint(directory):
        return directory.resolve().parent.parent / "config.yaml"
    return directory / "config.json"


def _name(path: Path) -> str:
    if is_checkpoint(path):
        return f"{path.parent.parent.name}-{path.name}"
    return path.parent.name if path.name == "final" else path.name
