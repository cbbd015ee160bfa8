"""An evaluation's files: results.json, table.md, table.csv and the pictures."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flash_stu.evaluation.picture import draw_positions, draw_table
from flash_stu.evaluation.report import format_csv, format_report

RESULTS, TABLE, CSV, PICTURE = "results.json", "table.md", "table.csv", "table.png"


def result_files(texts: Iterable[str]) -> list[str]:
    """Returns the names of all files that `write_results` may write for these texts."""
    return [RESULTS, TABLE, CSV, PICTURE, *(_text_picture(name) for name in texts)]


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write all files into an empty directory.

    Args:
        folder: the directory.
        results: the content of results.json.
    """
    files = {RESULTS: json.dumps(results, indent=2, default=str), TABLE: format_report(results)}
    if results["settings"]["tasks"]:
        files[CSV] = format_csv(results).rstrip("\n")
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    draw_table(results, folder / PICTURE)
    for name in {name: None for model in results["models"].values() for name in model["texts"]}:
        models = {label: model for label, model in results["models"].items() if name in model["texts"]}
        draw_positions(
            {label: model["texts"][name] for label, model in models.items()},
            {label: model["trained_length"] for label, model in models.items()},
            name,
            folder / _text_picture(name),
        )


def _text_picture(name: str) -> str:
    return f"{Path(name).stem}.by-position.png"
