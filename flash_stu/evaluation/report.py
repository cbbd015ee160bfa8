"""An evaluation's files: results.json, tables in Markdown for readers and CSV for programs, and pictures."""

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from flash_stu.evaluation.compare import CLOSE
from flash_stu.evaluation.long_context import CHOICES, DEPTHS, parse_name
from flash_stu.figures import save_figure

RESULTS, TABLE, CSV, PICTURE = "results.json", "table.md", "table.csv", "table.png"
_WORK = ["forward_tokens", "forward_tokens_unshared", "truncated", "truncated_tokens", "beyond_trained_length"]
_VALUES = ["metric", "shots", "value", "stderr", "items", "items_available", "version", "config_hash"]
_CSV_COLUMNS = ["model", "published", "task", *_VALUES, "seconds", "requests", *_WORK]
_BY_DEPTH = {"acc": f"accuracy, of {CHOICES} answers", "exact_match": "exact match"}
_GREYS = ("0.45", "0.65", "0.8", "0.9")


def result_files(tasks: Iterable[str], texts: Iterable[str]) -> list[str]:
    """Returns the names of all files that `write_results` may write for these tasks and texts."""
    kinds = {task.kind for task in map(parse_name, tasks) if task is not None}
    pictures = [*map(_depth_picture, sorted(kinds)), *map(_text_picture, texts)]
    return [RESULTS, TABLE, CSV, PICTURE, *pictures]


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
    for kind, lengths in _long_tasks_of(results).items():
        draw_depths(
            {label: _scores_by_depth(model, kind) for label, model in results["models"].items()},
            lengths,
            kind,
            folder / _depth_picture(kind),
        )
    for name, found in _texts_of(results).items():
        trained = {label: results["models"][label]["trained_length"] for label in found}
        draw_positions(found, trained, name, folder / _text_picture(name))


def average_accuracy(tasks: dict[str, dict]) -> float | None:
    """Returns the plain mean of the tasks whose metric is acc; None if there is none."""
    values = [task["value"] for task in tasks.values() if task["metric"] == "acc"]
    return sum(values) / len(values) if values else None


def columns_of(results: dict[str, Any]) -> dict[str, dict]:
    """Returns the tasks that any model has been scored on, in the order asked for, each as one model has it."""
    found = {name: task for model in results["models"].values() for name, task in model["tasks"].items()}
    return {spec["name"]: found[spec["name"]] for spec in results["settings"]["tasks"] if spec["name"] in found}


def _texts_of(results: dict[str, Any]) -> dict[str, dict[str, dict]]:
    """Returns what was found on the texts: by name of the text and label of the model."""
    found: dict[str, dict[str, dict]] = {}
    for label, model in results["models"].items():
        for name, text in model.get("texts", {}).items():
            found.setdefault(name, {})[label] = text
    return found


def _long_tasks_of(results: dict[str, Any]) -> dict[str, list[int]]:
    """Returns the lengths in tokens of the long-context tasks that any model has been scored on: by kind, ascending."""
    found: dict[str, list[int]] = {}
    for task in filter(None, map(parse_name, columns_of(results))):
        found[task.kind] = sorted([*found.get(task.kind, []), task.length])
    return found


def _scores_by_depth(model: dict[str, Any], kind: str) -> dict[tuple[int, int], dict[str, float]]:
    """Returns a model's scores on a long-context task: by length in tokens and depth in percent."""
    named = ((parse_name(name), task) for name, task in model["tasks"].items())
    own = [(task.length, result) for task, result in named if task is not None and task.kind == kind]
    return {(length, scores["depth"]): scores for length, result in own for scores in result["depths"]}


def format_report(results: dict[str, Any]) -> str:
    """Returns all of table.md: scores, the work done for them, scores by depth, texts, comparisons."""
    parts = [format_table(results), format_details(results), format_depths(results), format_texts(results)]
    parts.append(format_comparisons(results))
    return "\n\n".join(part for part in parts if part)


def format_table(results: dict[str, Any]) -> str:
    """Returns the table of scores: models as rows, published ones last; tasks as columns, the average accuracy last."""
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
    """Returns the table of what was asked, and of the work of each model."""
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
    """Returns a table per pair of models: the difference on every task, and the p-value of McNemar's test."""
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


def format_depths(results: dict[str, Any]) -> str:
    """Returns a table per long-context task: accuracy and exact match of every model by length and depth."""
    parts = []
    for kind, lengths in _long_tasks_of(results).items():
        found = [_scores_by_depth(model, kind) for model in results["models"].values()]
        rows = []
        for length, depth in itertools.product(lengths, DEPTHS):
            own = [scores.get((length, depth)) for scores in found]
            if any(own):
                cells = ["" if one is None else " / ".join(f"{100 * one[key]:.0f}" for key in _BY_DEPTH) for one in own]
                rows.append([f"{length:,}", f"{depth} %", *cells])
        what = (
            f"{kind}, accuracy / exact match in percent, by tokens and depth; accuracy by chance is {100 // CHOICES}:"
        )
        parts.append("\n".join([f"{what}\n", *markdown(["tokens", "depth", *results["models"]], rows)]))
    return "\n\n".join(parts)


def format_texts(results: dict[str, Any]) -> str:
    """Returns tables of bits per byte and perplexity of texts, and of the loss by position."""
    parts = []
    for name, found in _texts_of(results).items():
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
                buckets = [b for b in text["positions"] if (b["first"], b["last"]) == (first, last)]
                row.append(_with_error(buckets[0]["loss"], buckets[0]["stderr"]) if buckets else "")
            by_position.append(row)
        lines = [f"{name}:\n", *markdown(header, rows), "", *markdown(["tokens before", *found], by_position)]
        lines.append("\nLoss in nats per token, ± one standard error over windows; perplexity is per token.")
        if len({text["window"] for text in found.values()}) > 1:
            lines.append("The windows are not equally long: compare these models by position.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def format_csv(results: dict[str, Any]) -> str:
    """Returns one line per model and task, values as they are; published values as fractions too."""
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
    """Returns the lines of a Markdown table, the first column to the left, the others to the right."""
    align = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, "pipe", disable_numparse=True, colalign=align).splitlines()


def summary(label: str, name: str, found: dict, known: bool) -> str:
    """Returns one line on what was found for a model on a task or text, `known` if by an earlier evaluation."""
    if "bits_per_byte" in found:
        figures = f"{found['bits_per_byte']:.4f} bits per byte, perplexity {found['perplexity']:.3f}"
        return f"{label}  {name}  {figures}  ({found['windows']} windows of {found['window']} tokens)"
    when = "found earlier" if known else f"{found['seconds']:.1f} s"
    items = f"{found['items']} of {found['items_available']} items"
    return f"{label}  {name}  {found['metric']} {_with_error(found['value'], found['stderr'])}  ({items}, {when})"


def too_long(label: str, model: dict, tasks: Sequence[str]) -> str:
    """Returns one line on tasks that are longer than what a model can take."""
    longest = f"{model['longest_input']:,} tokens"
    return f"{label}: {', '.join(tasks)} not measured, longer than the longest input of this model, {longest}."


def warning(label: str, model: dict, tasks: dict[str, dict]) -> str | None:
    """Returns one line on requests that did not fit the model, or None."""
    keys = ("truncated", "truncated_tokens", "beyond_trained_length", "requests")
    cut, lost, longer, asked = (sum(task[key] for task in tasks.values()) for key in keys)
    trained, share = f"{model['trained_length']:,} tokens", f"{cut or longer:,} of {asked:,} requests"
    if cut:
        return (
            f"{label}: {share} were longer than its {trained} and were cut from the left, by {lost:,} tokens together."
        )
    if longer:
        return f"{label}: {share} were longer than the {trained} it was trained on; its state read all of them."
    return None


def draw_table(results: dict[str, Any], output: Path) -> None:
    """Draw the accuracies, if there are any, as groups of bars: one group per task and one of the averages."""
    tasks = [name for name, task in columns_of(results).items() if task["metric"] == "acc"]
    if not tasks:
        return
    bars = []  # label, heights, errors, style
    for index, (label, model) in enumerate(results["models"].items()):
        own = {name: model["tasks"][name] for name in tasks if name in model["tasks"]}
        heights = [100 * own[name]["value"] if name in own else 0.0 for name in tasks]
        errors = [100 * (own[name]["stderr"] or 0.0) if name in own else 0.0 for name in tasks]
        average = average_accuracy(own) if len(own) == len(tasks) else None
        bars.append((label, [*heights, 100 * (average or 0.0)], [*errors, 0.0], {"color": f"C{index}"}))
    for index, (label, values) in enumerate(results.get("published", {}).items()):
        heights = [values.get(name, 0.0) for name in tasks]
        style = {"color": _GREYS[index % len(_GREYS)], "hatch": "///", "edgecolor": "white", "linewidth": 0}
        bars.append((f"{label} (published)", [*heights, sum(heights) / len(tasks)], None, style))

    groups = [*tasks, "average"]
    figure = Figure(figsize=(max(5.0, 1.2 * len(groups) + 1.5), 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(bars)
    for index, (label, heights, errors, style) in enumerate(bars):
        places = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, heights, 0.94 * width, label=label, zorder=2, **style)
        for x, y, error in zip(places, heights, errors or [0.0] * len(places), strict=True):
            if error:
                axes.errorbar(x, y, error, fmt="none", color="black", linewidth=0.9, capsize=1.5, zorder=3)
    axes.set_xticks(range(len(groups)), groups, rotation=25, ha="right", rotation_mode="anchor")
    axes.axvline(len(tasks) - 0.5, color="0.7", linewidth=0.8)
    axes.set_ylim(0, max(100 * 0.3, *(1.12 * max(heights) for _, heights, _, _ in bars)))
    axes.set_ylabel("accuracy (%)")
    axes.grid(axis="y", alpha=0.25, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    limit = results["settings"]["limit"]
    if limit is not None:
        axes.set_title(f"first {limit} items of each task only", fontsize="medium", color="0.3")
    figure.legend(loc="outside upper center", ncols=min(len(bars), 3), frameon=False)
    save_figure(figure, output)


def draw_positions(found: dict[str, dict], trained: dict[str, int], title: str, output: Path) -> None:
    """Draw the loss over the number of tokens before.

    Args:
        found: per model, what `score_text` returned.
        trained: per model, its trained length in tokens, marked by a dashed line.
        title: name of the text.
        output: the image to write.
    """
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (label, text) in enumerate(found.items()):
        buckets = text["positions"]
        x = [(b["first"] * b["last"]) ** 0.5 for b in buckets]
        y = [b["loss"] for b in buckets]
        error = [b["stderr"] or 0.0 for b in buckets]
        axes.plot(x, y, color=f"C{index}", marker="o", markersize=3.5, label=label, alpha=0.9)
        low, high = ([v + sign * e for v, e in zip(y, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
    for length in sorted(set(trained.values())):
        axes.axvline(length, color="0.4", linestyle="--", linewidth=1, label=f"trained length, {length:,}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens before the one predicted")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, output)


def draw_depths(
    found: dict[str, dict[tuple[int, int], dict[str, float]]], lengths: Sequence[int], title: str, output: Path
) -> None:
    """Draw scores over length and depth as heat maps: a column of two per model, what was not measured left white.

    Args:
        found: per model, by length in tokens and depth in percent, "acc" and "exact_match" from 0 to 1.
        lengths: in tokens.
        title: name of the task.
        output: the image to write.
    """
    width, height = 1.2 + max(2.0, 0.62 * len(lengths)), 0.9 + 0.32 * len(DEPTHS)
    figure = Figure(figsize=(width * len(found) + 0.8, height * len(_BY_DEPTH)), dpi=150, layout="constrained")
    grid = figure.subplots(len(_BY_DEPTH), len(found), squeeze=False, sharex=True, sharey=True)
    image = None
    for (i, (metric, name)), (j, (label, scores)) in itertools.product(
        enumerate(_BY_DEPTH.items()), enumerate(found.items())
    ):
        axes = grid[i][j]
        rows = [[scores.get((length, depth), {}).get(metric, math.nan) for length in lengths] for depth in DEPTHS]
        image = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (y, row), x in itertools.product(enumerate(rows), range(len(lengths))):
            if not math.isnan(row[x]):
                color = "black" if row[x] > 0.6 else "white"
                axes.text(x, y, f"{100 * row[x]:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_title(f"{label}\n{name}" if i == 0 else name, fontsize="small")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=35, ha="right", fontsize=7)
        axes.set_yticks(range(len(DEPTHS)), [f"{depth} %" for depth in DEPTHS], fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("tokens", fontsize="small")
    for axes in grid[:, 0]:
        axes.set_ylabel("depth", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.6, label="share of the items")
    save_figure(figure, output)


def _heading(name: str, task: dict) -> str:
    shots = f" {task['shots']}-shot" if task["shots"] else ""
    return f"{name}{shots}" if _is_percentage(task) else f"{name}{shots} ({task['metric']})"


def _cell(task: dict) -> str:
    return _with_error(task["value"], task["stderr"], *((100, 2) if _is_percentage(task) else (1, 4)))


def _with_error(value: float, stderr: float | None, scale: int = 1, digits: int = 4) -> str:
    return f"{scale * value:.{digits}f}" + ("" if stderr is None else f" ± {scale * stderr:.{digits}f}")


def _work(task: dict) -> list[str]:
    run, unshared = task["forward_tokens"], task["forward_tokens_unshared"]
    fewer = f" ({unshared / run:.1f}x)" if run else ""
    return [f"{task['seconds']:,.0f}", f"{run:,}", f"{unshared:,}{fewer}"]


def _is_percentage(task: dict) -> bool:
    return task["metric"] == "acc"


def _notes(results: dict[str, Any]) -> list[str]:
    """Returns what a reader must know before comparing these numbers with others."""
    notes = ["Columns without a metric are acc in percent, ± one standard error."]
    limit = results["settings"]["limit"]
    if limit is not None:
        notes.append(f"Only the first {limit} items of each task were scored: not to be compared with full runs.")
    for label, model in results["models"].items():
        if line := warning(label, model, model["tasks"]):
            notes.append(line)
        if model.get("too_long"):
            notes.append(too_long(label, model, model["too_long"]))
    return notes


def _depth_picture(kind: str) -> str:
    return f"{kind}.by-depth.png"


def _text_picture(name: str) -> str:
    return f"{Path(name).stem}.by-position.png"
