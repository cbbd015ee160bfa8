"""Results as pictures: bars per task with error bars, and the loss by position."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flash_stu.evaluation.report import average_accuracy, columns_of
from flash_stu.figures import save_figure

_GREYS = ("0.45", "0.65", "0.8", "0.9")


def draw_table(results: dict[str, Any], output: Path) -> bool:
    """Draw the accuracies as groups of bars, one group per task and one of the averages.

    Args:
        results: the content of results.json.
        output: the image to write.

    Returns:
        whether there was anything to draw.
    """
    tasks = [name for name, task in columns_of(results).items() if task["metric"] == "acc"]
    if not tasks:
        return False
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
        if errors is not None:
            marked = [(x, y, e) for x, y, e in zip(places, heights, errors, strict=True) if e]
            if marked:
                xs, ys, es = zip(*marked, strict=True)
                axes.errorbar(xs, ys, es, fmt="none", color="black", linewidth=0.9, capsize=1.5, zorder=3)
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
    return True


def draw_positions(found: dict[str, dict], trained: dict[str, int], title: str, output: Path) -> None:
    """Draw the loss over the number of tokens before, one line per model.

    Args:
        found: per model, what flash_stu.evaluation.text.score_text returned.
        trained: per model, its trained length in tokens, marked by a dashed line.
        title: what the text is.
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
