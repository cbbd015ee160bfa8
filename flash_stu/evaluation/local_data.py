"""The harness's own task definitions on data from a local folder.

For every task a YAML file is written that includes the harness's definition, keeps its name, and reads
`<data dir>/<dataset id>/<config or default>/<split>.jsonl` instead of the hub. Splits that only few-shot
prompts need may be missing where no shots are asked for; what the harness scores or draws from may not.
"""

from pathlib import Path

import yaml

from flash_stu.errors import UserError
from flash_stu.files import write_text

Dataset = tuple[str, str | None]  # id on the hub, configuration

_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


def write_local_task(
    name: str, definition: dict, definition_path: Path, data_dir: Path, shots: int, folder: Path
) -> Path:
    """Write the YAML file that reads one task's data from a folder.

    Args:
        name: the task's name.
        definition: its resolved definition (the harness's YAML, inclusions merged).
        definition_path: where that YAML is.
        data_dir: the mirror.
        shots: examples in the prompt.
        folder: where to write.

    Raises:
        UserError: naming the file that the mirror lacks, or the task if it does not read a hub data set.
    """
    dataset, splits, needed = data_of(name, definition, shots)
    files = {split: file_of(data_dir, dataset, split) for split in splits.values() if split is not None}
    for split in needed:
        if not files[split].is_file():
            raise UserError(f"task {name!r} needs {files[split]}, which does not exist")
        if not files[split].stat().st_size:
            raise UserError(f"task {name!r} needs {files[split]}, which is empty")
    present = {split: str(path.resolve()) for split, path in files.items() if path.is_file()}
    absent = {key: None for key, split in splits.items() if split is not None and split not in present}

    override = {
        "include": str(definition_path.resolve()),  # a relative one would be looked for beside this file
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": present},
        **absent,
    }
    path = folder / f"{name}.yaml"
    write_text(path, yaml.safe_dump(override, sort_keys=False))
    return path


def data_of(name: str, definition: dict, shots: int) -> tuple[Dataset, dict[str, str | None], list[str]]:
    """What data a task reads.

    Args:
        name: the task's name.
        definition: its resolved definition.
        shots: examples in the prompt.

    Returns:
        the data set; the split that each of the definition's entries names; and the splits that are needed: what is
        scored, and if there are shots what they are drawn from.

    Raises:
        UserError: if the task does not read a hub data set, or has nothing to score.
    """
    dataset = definition.get("dataset_path")
    if not dataset or "class" in definition or "custom_dataset" in definition:
        raise UserError(f"task {name!r} does not read a hub data set, so a mirror cannot serve it")
    splits = {key: definition.get(key) for key in _SPLIT_KEYS}
    scored = splits["test_split"] or splits["validation_split"]
    if scored is None:
        raise UserError(f"task {name!r} has neither a test nor a validation split")
    examples = splits["fewshot_split"] or splits["training_split"] or splits["validation_split"] or scored
    needed = [scored] if not shots or examples == scored else [scored, examples]
    return (dataset, definition.get("dataset_name")), splits, needed


def file_of(data_dir: Path, dataset: Dataset, split: str) -> Path:
    """Where a mirror keeps a split."""
    name, configuration = dataset
    return data_dir / name / (configuration or "default") / f"{split}.jsonl"
