"""Identify a system from a table on disk: the system, a report and figures, all of it or nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from flash_stu.errors import UserError
from flash_stu.figures import save_figure
from flash_stu.files import check_output, replacing_directory
from spectralds.identification.options import AUTO, STATES
from spectralds.identification.select import Found, search
from spectralds.identification.system import SymmetricLDS
from spectralds.identification.table import read_columns

_KIND = "identified system"
SYSTEM, REPORT, PREDICTION, POLES = "system.safetensors", "identification.json", "prediction.png", "poles.png"
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito's palette
_SHOWN, _LONGEST = 4, 1000  # outputs and time steps that are drawn


def identify_directory(
    data: str | Path,
    inputs: list[str],
    outputs: list[str],
    output: str | Path,
    method: str = AUTO,
    max_states: int = STATES,
) -> dict:
    """Identify a system from columns of a file.

    Args:
        data: a .csv, .npz or .parquet file, see `read_columns`.
        inputs: names of the input columns; outputs: names of the output columns.
        output: directory to write: system.safetensors (see `SymmetricLDS.load`), identification.json, prediction.png,
            poles.png. An earlier identification there, if nobody changed it, is replaced once the new one is complete.
        method: see `identify`, like max_states.
        max_states: the largest number of states.

    Returns:
        the content of identification.json: data, inputs and outputs as given; the report of `identify`; poles, the
        eigenvalues. Also seconds, which is not written.

    Raises:
        UserError: as `identify` and `read_columns`, and for an output that was not created by this program.
    """
    check_output(output, _KIND)
    u, y = read_columns(data, inputs), read_columns(data, outputs)
    if u.shape[:-1] != y.shape[:-1]:
        raise UserError(f"data {data}: inputs have shape {u.shape} and outputs {y.shape}; the times must be the same")
    found = search(u, y, method, max_states)
    report = {"data": str(data), "inputs": inputs, "outputs": outputs, **found.system.report}
    seconds = report.pop("seconds")
    report["poles"] = sorted(set(found.system.A.tolist()))
    with replacing_directory(output, _KIND) as temporary:
        replace(found.system, report=report).save(temporary / SYSTEM)
        (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _plot_prediction(found, u, y, temporary / PREDICTION)
        _plot_poles(found.system, u.shape[-2], temporary / POLES)
    return report | {"seconds": seconds}


def summary(report: dict) -> str:
    """Returns the few lines of a report that a user looks for first."""
    errors = ", ".join(f"{name} {error:.2e}" for name, error in report["held_out_errors"].items())
    noise = ", ".join(f"{variance:.3g}" for variance in report["noise_variance"])
    return "\n".join(
        [
            f"method            {report['method']}, {report['states']} states at {len(report['poles'])} poles",
            f"held-out error    {errors}, of the outputs' power",
            f"noise variance    {noise}, estimated",
            f"initial state     {'at rest' if report['initial_state'] is None else 'estimated'}",
            f"time              {report['seconds']:.1f} s for {report['samples']} samples",
        ]
    )


def _plot_prediction(found: Found, inputs: np.ndarray, outputs: np.ndarray, path: Path) -> None:
    """Draw the outputs of the first held-out trajectory over what the system predicts that was fitted without it."""
    if inputs.ndim == 3:
        inputs, outputs = inputs[found.trajectory], outputs[found.trajectory]
    predicted = found.trained.simulate(inputs, found.state)
    channels = min(outputs.shape[1], _SHOWN)
    figure = Figure(figsize=(10, 1 + 2.2 * channels), dpi=150, layout="constrained")
    last = min(len(outputs), found.first + _LONGEST)
    times = np.arange(found.first, last)
    for channel, axes in enumerate(figure.subplots(channels, 1, sharex=True, squeeze=False)[:, 0]):
        axes.plot(times, outputs[times, channel], color=_BLUE, linewidth=2.4, alpha=0.45, label="measured")
        axes.plot(times, predicted[times, channel], color="black", linewidth=0.9, label="predicted from the inputs")
        axes.set_ylabel(f"output {channel + 1}")
    figure.axes[0].set_title("held-out time: the system was fitted without it and is shown no output", loc="left")
    figure.axes[0].legend(frameon=False, ncols=2, loc="upper right")
    figure.axes[-1].set_xlabel("time step")
    _finish(figure, path)


def _plot_poles(system: SymmetricLDS, length: int, path: Path) -> None:
    """Draw the memory of each pole against how much its state adds to the outputs."""
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    poles = system.A.numpy()
    gain = np.linalg.norm(system.B, axis=1) / np.sqrt((1 - poles) * (1 + poles)) * np.linalg.norm(system.C, axis=0)
    memory = -1 / np.log(np.maximum(np.abs(poles), np.finfo(float).tiny))
    for sign, color, marker, label in ((1, _BLUE, "o", "positive"), (-1, _ORANGE, "s", "negative")):
        ours = np.sign(poles) == sign
        axes.plot(memory[ours], gain[ours], color=color, marker=marker, linestyle="none", label=f"{label} poles")
    axes.set(xscale="log", xlabel="memory of a pole a, -1 / ln |a| (time steps)")
    axes.set_xlim(min(0.1, *memory, length) / 2, 3 * max(*memory, length, 1))
    axes.set_ylabel("standard deviation it gives the outputs, white inputs")
    if len(poles):
        axes.set_yscale("log")
    axes.axvline(length, color=_GREY, linestyle=":", linewidth=1.4, label="length of the data")
    axes.legend(frameon=False)
    _finish(figure, path)


def _finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, linewidth=0.6)
    save_figure(figure, path)
