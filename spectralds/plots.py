"""One figure that shows how good a fit is."""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from flash_stu.figures import save_figure
from flash_stu.filters.exponentials import powers
from spectralds.bank import FilterBank
from spectralds.fit import LDSFit
from spectralds.options import METHODS

# Okabe and Ito's palette: told apart with any colour vision
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def plot_fit(bank: FilterBank, fit: LDSFit, curve: dict[str, list], path: str | Path) -> None:
    """Draw filters over their fit, the error per filter, the error against the state dimension, and the
    decays.

    Args:
        bank: the filters.
        fit: their fit.
        curve: errors against state dimension, see `error_curve`.
        path: the image to write; its ending chooses the format.
    """
    figure = Figure(figsize=(11, 7.6), dpi=150)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.955, bottom=0.07, hspace=0.28, wspace=0.18)
    filters, errors, dimensions, decays = figure.subplots(2, 2).flat
    _draw_filters(filters, bank, fit)
    _draw_errors(errors, bank, fit)
    _draw_dimensions(dimensions, curve, fit)
    _draw_decays(decays, bank, fit)
    for letter, axes in zip("abcd", figure.axes, strict=True):
        title = axes.get_title()
        axes.set_title("")
        axes.set_title(f"({letter})  {title}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, linewidth=0.6)
    save_figure(figure, path)


def _draw_filters(axes: Axes, bank: FilterBank, fit: LDSFit) -> None:
    last = bank.num_filters - 1
    shown = sorted({0, 1, *(round(last * part) for part in (0.2, 0.45, 0.7, 1))} & set(range(last + 1)))
    count = (bank.length + bank.step - 1) // bank.step
    places = torch.cat(
        [torch.arange(count)[:200], torch.logspace(2, math.log10(max(count - 1, 1)), 600).long()]
    ).unique()
    for place, k in enumerate(shown):
        lags = bank.first[k] + bank.step * places
        lags = lags[lags < bank.length]
        values, fitted = bank.phi[lags, k], powers(fit.A, lags.double()) @ fit.C[:, k]
        size = float(values.abs().max()) or 1.0
        offset = -2.2 * place
        axes.axhline(offset, color="black", linewidth=0.4, alpha=0.3)
        axes.plot(lags + 1, values / size + offset, color=_BLUE, linewidth=3.2, alpha=0.45, label="filter")
        axes.plot(lags + 1, fitted / size + offset, color="black", linewidth=0.9, linestyle="--", label="LDS")
    axes.set_yticks([-2.2 * place for place in range(len(shown))], [f"{k + 1}" for k in shown])
    axes.set_xscale("log")
    axes.set_xlabel("lag + 1 (tokens)")
    axes.set_ylabel("filter number (each scaled to its maximum)")
    axes.set_title(f"filters and LDS of state dimension {len(fit.A)}")
    axes.set_ylim(top=2.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:2], labels[:2], frameon=False, loc="upper right", ncols=2)


def _draw_errors(axes: Axes, bank: FilterBank, fit: LDSFit) -> None:
    numbers = np.arange(1, bank.num_filters + 1)
    report = fit.report["per_filter"]
    curves = (
        ("filter, root mean square", bank.phi.square().mean(dim=0).sqrt(), _BLUE, "s"),
        ("largest error", report["max_abs_error"], _ORANGE, "^"),
        ("error, root mean square", np.sqrt(report["mse"]), _GREEN, "o"),
    )
    for label, values, color, marker in curves:
        axes.semilogy(numbers, values, color=color, marker=marker, markersize=4, linewidth=1, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("filter number, largest eigenvalue first")
    axes.set_ylabel("absolute value")
    axes.set_title("error per filter")
    axes.legend(frameon=False)


def _draw_dimensions(axes: Axes, curve: dict[str, list], fit: LDSFit) -> None:
    report, dims = fit.report, curve["state_dim"]
    for method, (color, marker) in zip(METHODS, ((_BLUE, "o"), (_ORANGE, "s"), (_GREEN, "^")), strict=True):
        axes.semilogy(dims, curve[method], color=color, marker=marker, markersize=4, linewidth=1.2, label=method)
    bound = [(h, error) for h, error in zip(dims, curve["bound"], strict=True) if error > 0]
    if bound:
        axes.semilogy(*zip(*bound, strict=True), color=_GREY, linestyle=":", label="no LDS is below this")
    this = (report["state_dim"], report["mse"])
    axes.semilogy(*this, marker="*", markersize=14, color="black", linestyle="none", label="this fit")
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("state dimension")
    axes.set_ylabel("mean squared error of the filters")
    axes.set_title(f"error against state dimension, decays in {report['dtype']}")
    axes.legend(frameon=False, loc="upper right")


def _draw_decays(axes: Axes, bank: FilterBank, fit: LDSFit) -> None:
    half = len(fit.A) // 2
    memory = -1 / fit.A[:half].log()
    weight = fit.C[:half, : bank.num_filters].norm(dim=1)
    axes.loglog(memory, weight, color=_GREEN, marker="o", markersize=4, linestyle="none")
    axes.axvline(bank.length, color=_GREY, linestyle=":", linewidth=1.4)
    axes.annotate(
        "filter length",
        (bank.length, 0.94),
        xycoords=("data", "axes fraction"),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        color=_GREY,
    )
    axes.set_xlabel("memory of an eigenvalue a, -1 / ln a (tokens)")
    axes.set_ylabel("norm of its output weights")
    axes.set_title(f"the {half} positive eigenvalues (and their negatives)")
