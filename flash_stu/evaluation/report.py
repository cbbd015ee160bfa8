"""Results as tables: Markdown for readers, CSV for programs."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from flash_stu.evaluation.comparison import CLOSE

_WORK = ["forward_tokens", "forward_tokens_unshared", "truncated", "truncated_tokens", "beyond_trained_length"]
_VALUES = ["metric", "shots", "value", "stderr", "items", "items_available", "version", "config_hash"]
_CSV_COLUMNS = ["model", "published", "task", *_VALUES, "seconds", "requests", *_WORK]


def average_accuracy(tasks: dict[str, dict]) -> float | None:
    """The plain mean of the tasks whose metric is acc; None if there is none."""
    values = [task["value"] for task in tasks.values() if task["metric"] == "acc"]
    return sum(values) / len(values) if values else None


def columns_of(results: dict[str, Any]) -> dict[str, dict]:
    """The tasks that any model has been scored on, in the order they were asked for, each as one model has it."""
    found = {name: task for model in results["models"].values() for name, task in model["tasks"].items()}
    return {spec["name"]: found[spec["name"]] for spec in results["settings"]["tasks"] if spec["name"] in found}


def format_report(results: dict[str, Any]) -> str:
    """All of table.md: scores, what is behind them, texts, comparisons."""
    parts = [format_table(results), format_details(results), format_texts(results), format_comparisons(results)]
    return "\n\n".join(part for part in parts if part)


def format_table(results: dict[str, Any]) -> str:
    """The table of scores: models as rows, published ones last; tasks as columns, the average accuracy last."""
    columns = columns_of(results)
    if not columns:
        return ""
    averaged = average_accuracy(columns) is not None
    header = ["model", *(_heading(name, task) for name, task in columns.items())] + ["average acc"] * averaged
    rows = []
    for label, model in results["models"].items():
        tasks = {name: model["tasks"][name] for name in columns if name in model["tasks"]}
        cells = [_cell(tasks[name]) if name in tasks else "" for name in columns]
        average = average_accuracy(tasks) if len(tasks) == len(columns) else None
        rows.append([label, *cells] + ["" if average is None else f"{100 * average:.2f}"] * averaged)
    for label, values in results.get("published", {}).items():
        cells = [f"{values[name]:.2f}" if name in values else "" for name in columns]
        known = [values[name] for name, task in columns.items() if _is_percentage(task) and name in values]
        complete = len(known) == sum(map(_is_percentage, columns.values()))
        average = f"{sum(known) / len(known):.2f}" if complete else ""
        rows.append([f"{label} (published)", *cells] + [average] * averaged)
    return "\n".join([*markdown(header, rows), *(f"\n{note}" for note in _notes(results))])


def format_details(results: dict[str, Any]) -> str:
    """What was asked, and what each model had to do for it."""
    columns = columns_of(results)
    header = ["task", "metric", "shots", "items", "version", "config"]
    for label in results["models"]:
        header += [f"{label}: seconds", "forward tokens", "without sharing"]
    rows = []
    for name, task in columns.items():
        row = [name, task["metric"], task["shots"], f"{task['items']:,} of {task['items_available']:,}"]
        row += [task["version"], task["config_hash"]]
        for model in results["models"].values():
            done = model["tasks"].get(name)
            row += [""] * 3 if done is None else _work(done)
        rows.append([str(cell) for cell in row])
    return "\n".join(markdown(header, rows)) if rows else ""


def format_comparisons(results: dict[str, Any]) -> str:
    """Per pair of models: the difference on every task, and the p-value of McNemar's test."""
    tables = []
    for pair in results.get("comparisons", []):
        first, second = pair["first"], pair["second"]
        header = ["task", "items", "difference", f"only {first} right", f"only {second} right", "p"]
        header += ["same answer", f"log-likelihoods within {CLOSE:g}", "largest difference"]
        rows = []
        for name, task in pair["tasks"].items():
            percent = "p_value" in task
            scale, digits = (100, 2) if percent else (1, 4)
            row = [name, f"{task['items']:,}"]
            row.append(f"{scale * task['difference']:+.{digits}f} ± {scale * task['stderr']:.{digits}f}")
            counts = [f"{task['only_first']:,}", f"{task['only_second']:,}", f"{task['p_value']:.3g}"]
            alike, gap = [f"{task['alike'] / task['items']:.2%}"], task["largest_log_likelihood_difference"]
            alike += ["", ""] if gap is None else [f"{task['close'] / task['items']:.2%}", f"{gap:.1e}"]
            rows.append([*row, *(counts if percent else [""] * 3), *alike])
        tables.append(f"{second} minus {first}, item by item (p: McNemar's exact test, two-sided):\n")
        tables[-1] += "\n" + "\n".join(markdown(header, rows))
    return "\n\n".join(tables)


def format_texts(results: dict[str, Any]) -> str:
    """Bits per byte and perplexity of texts, and the loss by position."""
    texts = {name: None for model in results["models"].values() for name in model.get("texts", {})}
    parts = []
    for name in texts:
        found = {label: m["texts"][name] for label, m in results["models"].items() if name in m.get("texts", {})}
        header = ["model", "bits per byte", "perplexity", "tokens", "bytes", "window"]
        rows = [
            [label, f"{t['bits_per_byte']:.4f}", f"{t['perplexity']:.3f}", *(f"{t[k]:,}" for k in header[3:])]
            for label, t in found.items()
        ]
        spans = {(b["first"], b["last"]): None for text in found.values() for b in text["positions"]}
        by_position = []
        for first, last in spans:
            row = [f"{first:,}" if first == last else f"{first:,} to {last:,}"]
            for text in found.values():
                cells = [_loss(b) for b in text["positions"] if (b["first"], b["last"]) == (first, last)]
                row.append(cells[0] if cells else "")
            by_position.append(row)
        lines = [f"{name}:\n", *markdown(header, rows), "", *markdown(["tokens before", *found], by_position)]
        lines.append("\nLoss in nats per token, ± one standard error over windows; perplexity is per token.")
        if len({text["window"] for text in found.values()}) > 1:
            lines.append("The windows are not equally long: compare these models by position.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def format_csv(results: dict[str, Any]) -> str:
    """One line per model and task, values as they are; published values as fractions too."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for label, model in results["models"].items():
        for name, task in model["tasks"].items():
            writer.writerow({"model": label, "published": 0, "task": name, **task})
    columns = columns_of(results)
    for label, values in results.get("published", {}).items():
        for name, value in values.items():
            if name in columns:
                row = {"model": label, "published": 1, "task": name, "metric": "acc"}
                writer.writerow(row | {"value": round(value / 100, 6)})
    return buffer.getvalue()


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]

    def line(cells):
        aligned = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return [line(header), rule, *(line(row) for row in rows)]


def warning(label: str, model: dict, tasks: dict[str, dict]) -> str | None:
    """One line on requests that did not fit the model, or None."""
    cut, lost, longer, asked = (
        sum(task[key] for task in tasks.values())
        for key in ("truncated", "truncated_tokens", "beyond_trained_length", "requests")
    )
    trained = f"{model['trained_length']:,} tokens"
    if cut:
        return (
            f"{label}: {cut:,} of {asked:,} requests were longer than its {trained} "
            f"and were cut from the left, by {lost:,} tokens together."
        )
    if longer:
        return (
            f"{label}: {longer:,} of {asked:,} requests were longer than the {trained} "
            "it was trained on; its state read all of them."
        )
    return None


def _heading(name: str, task: dict) -> str:
    shots = f" {task['shots']}-shot" if task["shots"] else ""
    return f"{name}{shots}" if _is_percentage(task) else f"{name}{shots} ({task['metric']})"


def _cell(task: dict) -> str:
    scale, digits = (100, 2) if _is_percentage(task) else (1, 4)
    stderr = "" if task["stderr"] is None else f" ± {scale * task['stderr']:.{digits}f}"
    return f"{scale * task['value']:.{digits}f}{stderr}"


def _work(task: dict) -> list[str]:
    run, unshared = task["forward_tokens"], task["forward_tokens_unshared"]
    fewer = f" ({unshared / run:.1f}x)" if run else ""
    return [f"{task['seconds']:,.0f}", f"{run:,}", f"{unshared:,}{fewer}"]


def _loss(bucket: dict) -> str:
    stderr = "" if bucket["stderr"] is None else f" ± {bucket['stderr']:.4f}"
    return f"{bucket['loss']:.4f}{stderr}"


def _is_percentage(task: dict) -> bool:
    return task["metric"] == "acc"


def _notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know before comparing these numbers with others."""
    notes = ["Columns without a metric are acc in percent, ± one standard error."]
    limit = results["settings"]["limit"]
    if limit is not None:
        notes.append(f"Only the first {limit} items of each task were scored: not to be compared with full runs.")
    lines = (warning(label, model, model["tasks"]) for label, model in results["models"].items())
    return notes + [line for line in lines if line]
