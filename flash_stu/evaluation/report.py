"""Results on disk and on the screen: results.json and table.md."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json and table.md, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "results.json", json.dumps(results, indent=2, default=str) + "\n")
    _write(folder / "table.md", format_table(results) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def average_accuracy(tasks: dict[str, dict]) -> float | None:
    """The plain mean of the tasks whose metric is acc; None if there is none."""
    values = [task["value"] for task in tasks.values() if task["metric"] == "acc"]
    return sum(values) / len(values) if values else None


def format_table(results: dict[str, Any]) -> str:
    """The Markdown table: models as rows, tasks as columns, the average of the accuracies last."""
    models: dict[str, dict] = results["models"]
    if not models:
        return ""
    columns: dict[str, dict] = next(iter(models.values()))["tasks"]
    averaged = average_accuracy(columns) is not None
    header = ["model", *(_heading(name, task) for name, task in columns.items())] + ["average acc"] * averaged
    rows = []
    for label, model in models.items():
        average = average_accuracy(model["tasks"])
        cells = [_cell(model["tasks"][name]) for name in columns]
        rows.append([label, *cells] + [f"{100 * average:.2f}"] * averaged if averaged else [label, *cells])
    lines = _markdown(header, rows)
    return "\n".join([*lines, *(f"\n{note}" for note in _notes(results))])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        aligned = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return [line(header), rule, *(line(row) for row in rows)]


def _heading(name: str, task: dict) -> str:
    shots = f" {task['shots']}-shot" if task["shots"] else ""
    return f"{name}{shots}" if _is_percentage(task) else f"{name}{shots} ({task['metric']})"


def _cell(task: dict) -> str:
    scale, digits = (100, 2) if _is_percentage(task) else (1, 4)
    stderr = "" if task["stderr"] is None else f" ± {scale * task['stderr']:.{digits}f}"
    return f"{scale * task['value']:.{digits}f}{stderr}"


def _is_percentage(task: dict) -> bool:
    return task["metric"] == "acc"


def _notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know before comparing these numbers with others."""
    notes = ["Columns without a metric are acc in percent, ± one standard error."]
    limit = results["settings"]["limit"]
    if limit is not None:
        notes.append(f"Only the first {limit} items of each task were scored: not to be compared with full runs.")
    for label, model in results["models"].items():
        cut = sum(task["truncated"] for task in model["tasks"].values())
        asked = sum(task["requests"] for task in model["tasks"].values())
        if cut:
            notes.append(
                f"{label}: {cut} of {asked} requests were longer than its {model['max_length']} tokens "
                "and were cut from the left."
            )
    return notes
