"""Download the data of evaluation tasks into a folder, for machines without internet: evaluate.py --data-dir reads it.

    python scripts/fetch_eval_data.py --tasks paper --output eval_data

The folder has <data set>/<configuration or default>/<split>.jsonl, with the splits that the tasks score and draw
examples from. What is there already is not fetched again, so a download that was stopped resumes.
"""

from pathlib import Path
from typing import Any

import datasets

from flash_stu.arguments import input_directory, output_directory
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.evaluation.definitions import Dataset, Definitions, data_of, file_of, resolve_tasks
from flash_stu.evaluation.patches import quiet
from flash_stu.growing import adding_files, growing_directory
from flash_stu.network import spare_the_hub

_KIND, _LABEL = "mirror of evaluation data", "output"


def fetch(tasks: str, output: Path, include_path: Path | None = None) -> list[Path]:
    """Fetch all splits that tasks need.

    Args:
        tasks: names of tasks, groups or suites, separated by commas.
        output: the folder.
        include_path: a folder with task definitions of the user's own.

    Returns:
        the files, old and new.

    Raises:
        UserError: for unknown tasks, tasks without a hub data set, data that cannot be had or written, or a folder
            that this program did not write or in which somebody changed a file.
    """
    spare_the_hub()
    definitions = Definitions(include_path)
    specs, _ = resolve_tasks(tasks)
    wanted: dict[str, tuple[Dataset, str, dict]] = {}  # by file
    for spec in specs:
        definitions.require(spec.name)
        for name, (definition, _) in definitions.leaves(spec.name).items():
            dataset, _, splits = data_of(name, definition, spec.shots_of(definition))
            for split in splits:
                file = file_of(Path(), dataset, split).as_posix()
                wanted.setdefault(file, (dataset, split, definition.get("dataset_kwargs") or {}))
    with growing_directory(output, _KIND, _LABEL, wanted):
        for file, source in wanted.items():
            if not (output / file).is_file():
                rows = _download(*source)
                with adding_files(output, _LABEL) as temporary, quiet():
                    (temporary / file).parent.mkdir(parents=True)
                    rows.to_json(temporary / file, force_ascii=False)
                print(f"{output / file}: {len(rows):,} rows", flush=True)
    return [output / file for file in wanted]


def _download(dataset: Dataset, split: str, options: dict[str, Any]) -> datasets.Dataset:
    """Returns the rows of one split of a hub data set."""
    name, configuration = dataset
    options = {key: value for key, value in options.items() if key != "trust_remote_code"}
    try:
        return datasets.load_dataset(name, configuration, split=split, trust_remote_code=False, **options)
    except Exception as error:  # the hub, its cache and the files fail in as many ways
        reason = " ".join(str(error).split())
        what = name if configuration is None else f"{name} ({configuration})"
        raise UserError(f"split {split} of {what} cannot be had: {type(error).__name__}: {reason}") from error


def main() -> None:
    """Parse the command line and fetch."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--tasks", default="paper", metavar="LIST", help="tasks, groups and suites, comma-separated (%(default)s)")
    add("--output", required=True, type=output_directory, metavar="DIR", help="where the data go")
    own = "task definitions of your own, in lm-eval's YAML format"
    add("--include-path", type=input_directory, metavar="DIR", help=own)
    arguments = parser.parse_args()
    include_path = None if arguments.include_path is None else Path(arguments.include_path)
    files = fetch(arguments.tasks, Path(arguments.output), include_path)
    print(f"{len(files)} files; python evaluate.py --tasks {arguments.tasks} --data-dir {arguments.output} ...")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
