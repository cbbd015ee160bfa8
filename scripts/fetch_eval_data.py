"""Download the data of evaluation tasks into a folder, for machines without internet: evaluate.py --data-dir reads it.

    python scripts/fetch_eval_data.py --tasks paper --output eval_data

The folder has <data set>/<configuration or default>/<split>.jsonl, with the splits that the tasks score and draw
examples from. What is there already is not fetched again, so a download that was stopped goes on.
"""

import os
from pathlib import Path

import datasets

from flash_stu.arguments import input_directory, output_directory
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.evaluation.definitions import Definitions, quiet, shots_of
from flash_stu.evaluation.local_data import Dataset, data_of, file_of
from flash_stu.evaluation.suite import resolve_tasks
from flash_stu.network import spare_the_hub


def fetch(tasks: str, output: Path, include_path: Path | None = None) -> list[Path]:
    """Fetch all splits that tasks need.

    Args:
        tasks: names of tasks, groups or suites, separated by commas.
        output: the folder.
        include_path: a folder with task definitions of the user's own.

    Returns:
        the files, old and new.

    Raises:
        UserError: for unknown tasks, tasks without a hub data set, or data that cannot be had.
    """
    spare_the_hub()
    definitions, files = Definitions(include_path), []
    specs, _ = resolve_tasks(tasks)
    for spec in specs:
        definitions.require(spec.name)
        for name in sorted(definitions.leaves(spec.name)):
            definition = definitions[name].cfg
            dataset, _, splits = data_of(name, definition, shots_of(spec, definition))
            for split in splits:
                path = file_of(output, dataset, split)
                if not path.is_file():
                    rows = _download(dataset, split, definition.get("dataset_kwargs") or {}, path)
                    print(f"{path}: {rows:,} rows", flush=True)
                files.append(path)
    return list(dict.fromkeys(files))


def _download(dataset: Dataset, split: str, options: dict, path: Path) -> int:
    """Write one split of a hub data set, whole or not at all; returns its number of rows."""
    name, configuration = dataset
    try:
        rows = datasets.load_dataset(name, configuration, split=split, **(options | {"trust_remote_code": False}))
    except Exception as error:  # the hub, its cache and the files fail in as many ways
        reason = " ".join(str(error).split())
        what = name if configuration is None else f"{name} ({configuration})"
        raise UserError(f"split {split} of {what} cannot be had: {type(error).__name__}: {reason}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with quiet():
        rows.to_json(temporary, force_ascii=False)
    os.replace(temporary, path)
    return len(rows)


def main() -> None:
    """Parse the command line and fetch."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--tasks", default="paper", metavar="LIST", help="tasks, groups and suites, comma-separated (%(default)s)")
    add("--output", required=True, type=output_directory, metavar="DIR", help="where the data go")
    add(
        "--include-path",
        type=input_directory,
        metavar="DIR",
        help="task definitions of your own, in lm-eval's YAML format",
    )
    arguments = parser.parse_args()
    include_path = None if arguments.include_path is None else Path(arguments.include_path)
    files = fetch(arguments.tasks, Path(arguments.output), include_path)
    print(f"{len(files)} files; python evaluate.py --tasks {arguments.tasks} --data-dir {arguments.output} ...")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
