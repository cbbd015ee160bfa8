"""Drawing functions that the benchmarks share."""

import statistics
from pathlib import Path

from flash_stu.figures import save_figure
from flash_stu.results import panels


def against_length(rows: list[dict], kind: str, path: Path, title: str, limits: dict[str, dict] | None = None) -> None:
    """Draw milliseconds of forward and backward against length, median and range.

    Args:
        rows: with "length", "total" (seconds, samples) and under `kind` the name of a curve.
        path: the image to write.
        title: above it.
        limits: further curves by name, seconds by length.
    """
    figure, (axes,) = panels(height=5)
    for name in dict.fromkeys(row[kind] for row in rows):
        mine = [row for row in rows if row[kind] == name]
        medians, reach = _range([[1000 * second for second in row["total"]] for row in mine])
        lengths = [row["length"] for row in mine]
        axes.errorbar(lengths, medians, reach, marker="o", markersize=3, capsize=2, label=name)
    for name, seconds in (limits or {}).items():
        axes.plot(list(seconds), [1000 * second for second in seconds.values()], "--", color="gray", label=name)
    lengths = sorted({row["length"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="length, tokens", ylabel="forward + backward, ms")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_title(title, loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save_figure(figure, path)


def bars(groups: dict[str, dict[str, list[float]]], path: Path, log: bool = False) -> None:
    """Draw horizontal bars of medians with their range, a panel for each group: {what and unit: {name: samples}}."""
    groups = groups or {"nothing was measured": {}}
    figure, grid = panels(len(groups), height=1.2 + 0.3 * max(map(len, groups.values())))
    for axes, (title, group) in zip(grid, groups.items(), strict=True):
        medians, reach = _range(list(group.values()))
        axes.barh(range(len(group)), medians, xerr=reach, height=0.6, error_kw={"capsize": 2, "linewidth": 1})
        axes.set_yticks(range(len(group)), [name if len(name) <= 60 else name[:59] + "…" for name in group], fontsize=8)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xscale("log" if log else "linear")
        axes.set_title(title, loc="left", fontsize=10)
    save_figure(figure, path)


def _range(samples: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the least and the greatest samples are from them."""
    medians = [statistics.median(values) for values in samples]
    below = [median - min(values) for median, values in zip(medians, samples, strict=True)]
    above = [max(values) - median for median, values in zip(medians, samples, strict=True)]
    return medians, [below, above]
