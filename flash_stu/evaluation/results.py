"""An evaluation's files: results.json, table.md, table.csv and the pictures."""

import json
from pathlib import Path
from typing import Any

from flash_stu.evaluation.picture import draw_positions, draw_table
from flash_stu.evaluation.report import format_csv, format_report
from flash_stu.evaluation.store import RESULTS, write_text


def write_results(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Write everything, each file whole or not at all.

    Args:
        folder: the directory, made if needed.
        results: the content of results.json.

    Returns:
        the files.
    """
    files = {RESULTS: json.dumps(results, indent=2, default=str), "table.md": format_report(results)}
    if results["settings"]["tasks"]:
        files["table.csv"] = format_csv(results).rstrip("\n")
    for name, text in files.items():
        write_text(folder / name, text + "\n")
    written = [folder / name for name in files]
    if draw_table(results, folder / "table.png"):
        written.append(folder / "table.png")
    for name in {name: None for model in results["models"].values() for name in model["texts"]}:
        models = {label: model for label, model in results["models"].items() if name in model["texts"]}
        picture = folder / f"{Path(name).stem}.by-position.png"
        draw_positions(
            {label: model["texts"][name] for label, model in models.items()},
            {label: model["trained_length"] for label, model in models.items()},
            name,
            picture,
        )
        written.append(picture)
    return written
