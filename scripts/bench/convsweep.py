"""The Triton convolution at every block of channels, number of warps and of segments: what its constants should be.

    python scripts/bench/convsweep.py [--lengths 8192] [--minutes 6] [--output results/gpu]

Constants of flash_stu/ops/conv/triton.py are set one at a time and then together, those that it has; every setting is
compiled anew. Settings that there is no time for are counted. One that does not compile, or needs more registers or
shared memory than there are, says so in its row.
"""

import importlib
import itertools
import math
import statistics
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conv import FEATURES, filters_of
from measuring import attempt, forward_and_backward
from plots import bars

from flash_stu.arguments import integer, number, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.model.config import LARGEST_LENGTH
from flash_stu.ops.backends import why_not
from flash_stu.ops.conv.choice import spectral_conv
from flash_stu.results import environment, failure_cells, finish, page, save, spread, table

KERNELS = "flash_stu.ops.conv.triton"
SWEPT = {"_CHANNELS": (64, 32, 16, 128), "_WARPS": (4, 2, 8), "_SEGMENTS": (1, 2, 4, 8)}


def grid(kernels: Any) -> list[dict[str, int]]:
    """All settings of those constants that the module has, its own first, then by how many differ from those."""
    own = {name: getattr(kernels, name) for name in SWEPT if isinstance(getattr(kernels, name, None), int)}
    choices = [dict.fromkeys((own[name], *SWEPT[name])) for name in own]
    settings = [dict(zip(own, values, strict=True)) for values in itertools.product(*choices)]
    return sorted(settings, key=lambda setting: sum(setting[name] != own[name] for name in own))


def measure(kernels: Any, settings: dict[str, int], length: int, args: Namespace, device: torch.device) -> list:
    """Seconds of forward, and of forward and backward, of every repeat."""
    for name, value in settings.items():
        setattr(kernels, name, value)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(args.batch, length, args.channels, device=device).to(dtype).requires_grad_()
    weights = torch.randn(FEATURES, args.channels, device=device).div(5).requires_grad_()
    even = 2 * filters_of(length).to(device)[::2].contiguous()

    def call() -> tuple[float, float]:
        return forward_and_backward(lambda x, w: spectral_conv(x, even, w, "triton", 2), (x, weights))

    call()
    return [call() for _ in range(args.repeats)]


def sweep(args: Namespace, device: torch.device, results: dict) -> None:
    """Measure as many settings as there is time for."""
    kernels = importlib.import_module(KERNELS)
    settings, end = grid(kernels), time.monotonic() + 60 * args.minutes
    own = settings[0]
    try:
        for length, setting in ((length, setting) for setting in settings for length in args.lengths):
            if results["rows"] and time.monotonic() > end:
                results["left_out"] += 1
                continue
            samples, reason = attempt(partial(measure, kernels, setting, length, args, device))
            row: dict = {"settings": setting, "length": length}
            if reason:
                row["failed"] = reason
            else:
                row |= {"forward": [forward for forward, _ in samples], "total": [total for _, total in samples]}
            results["rows"].append(row)
            print(_name(row), reason or f"{statistics.median(row['total']) * 1e3:.2f} ms", flush=True)
            save("convsweep", results, args.output)
    finally:
        for name, value in own.items():
            setattr(kernels, name, value)


def _name(row: dict) -> str:
    settings = ", ".join(f"{value} {name.strip('_').lower()}" for name, value in row["settings"].items())
    return f"{row['length']:,}: {settings}"


def _taken(row: dict) -> float:
    return statistics.median(row["total"]) if "total" in row else math.inf


def render(results: dict) -> str:
    """One table, the fastest first."""
    shape = (
        f"Batch {results['batch']}, {results['channels']} channels. Left out for want of time: {results['left_out']}."
    )
    rows = sorted(results["rows"], key=lambda row: (row["length"], _taken(row)))
    cells = [
        [_name(row), *(failure_cells(row, 2) if "failed" in row else (spread(row["forward"]), spread(row["total"])))]
        for row in rows
    ]
    return page(results, shape, table(["length: setting", "forward, ms", "forward + backward, ms"], cells))


def plot(results: dict, path: Path) -> None:
    rows = [row for row in sorted(results["rows"], key=_taken) if "total" in row][:20]
    bars({"forward + backward, ms": {_name(row): [1e3 * second for second in row["total"]] for row in rows}}, path)


def main() -> None:
    device = default_device()
    parser = ArgumentParser(__doc__)
    parser.add_argument("--lengths", type=integer(1, LARGEST_LENGTH), nargs="+", default=[8192])
    parser.add_argument("--channels", type=integer(1, 2**17), default=1024)
    parser.add_argument("--batch", type=integer(1, 2**16), default=4)
    parser.add_argument("--repeats", type=integer(1, 10000), default=5)
    parser.add_argument("--minutes", type=number(0, 1e4), default=6, help="no setting is begun after this")
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write convsweep.json and .png there")
    args = parser.parse_args()
    if reason := why_not("triton"):
        raise UserError(f"convolution back end 'triton' is not available: {reason}")
    results = {
        "environment": environment(device),
        "batch": args.batch,
        "channels": args.channels,
        "left_out": 0,
        "rows": [],
    }
    sweep(args, device, results)
    finish("convsweep", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
