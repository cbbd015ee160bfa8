"""Identify a system from a table on disk: the system, a report and figures, all of it or nothing."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from flash_stu.figures import save_figure
from flash_stu.files import check_output, replacing_directory
from spectralds.identification.options import AUTO, STATES
from spectralds.identification.records import Records
from spectralds.identification.select import identify
from spectralds.identification.system import SymmetricLDS
from spectralds.identification.table import read_columns

_KIND = "identified system"
SYSTEM, REPORT, PREDICTION, POLES = "system.safetensors", "identification.json", "prediction.png", "poles.png"
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito's palette
_SHOWN = 4  # outputs that are drawn


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
    system = identify(u, y, method, max_states)
    judged = _judged(u, y, method=system.report["method"], max_states=max_states)
    seconds = system.report.pop("seconds")
    report = {
        "data": str(data),
        "inputs": inputs,
        "outputs": outputs,
        **system.report,
        "poles": sorted(set(system.A.tolist())),
    }
    with replacing_directory(output, _KIND) as temporary:
        system.save(temporary / SYSTEM)
        (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _plot_prediction(judged, outputs, temporary / PREDICTION)
        _plot_poles(system, temporary / POLES)
    return report | {"seconds": seconds}
