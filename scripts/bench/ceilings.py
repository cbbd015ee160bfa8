"""The ceilings of a device: rates of large matrix products and of a large copy, which other figures are held to.

    python scripts/bench/ceilings.py [--repeats 20] [--output results/gpu]

A product of 8192-cubes on a GPU, of 1024-cubes on a CPU, in bfloat16 and float32; the copy reads and writes 1 GiB (64
MiB).
"""

from pathlib import Path

import torch
from measuring import attempt, device_rates
from plots import bars

from flash_stu.arguments import integer, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.results import environment, failure_cells, finish, page, table
from flash_stu.training.flops import peak_flops

DTYPES = ("bfloat16", "float32")


def render(results: dict) -> str:
    """A table of the rates, best of all calls, and the maker's figure where it is known."""
    rows = []
    for row in results["rows"]:
        if "failed" in row:
            rows.append([row["dtype"], *failure_cells(row, 3)])
            continue
        peak = row["peak"]
        share = "" if peak is None else f"{row['flops'] / peak:.0%}"
        rows.append([row["dtype"], f"{row['flops'] / 1e12:,.2f}", share, f"{row['bytes'] / 1e9:,.1f}"])
    return page(results, table(["dtype", "product, TFLOP/s", "of the data sheet", "copy, GB/s"], rows))


def plot(results: dict, path: Path) -> None:
    rows = [row for row in results["rows"] if "failed" not in row]
    bars(
        {
            "product, TFLOP/s": {row["dtype"]: [row["flops"] / 1e12] for row in rows},
            "copy, GB/s": {row["dtype"]: [row["bytes"] / 1e9] for row in rows},
        },
        path,
    )


def main() -> None:
    device = default_device()
    parser = ArgumentParser(__doc__)
    parser.add_argument("--repeats", type=integer(1, 10000), default=20)
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write ceilings.json and .png there")
    args = parser.parse_args()
    results = {"environment": environment(device), "rows": []}
    for dtype in DTYPES:
        rates, reason = attempt(lambda d=dtype: device_rates(device, getattr(torch, d), args.repeats))
        row = {"failed": reason} if reason else rates | {"peak": peak_flops(device, getattr(torch, dtype))}
        results["rows"].append({"dtype": dtype, **row})
    finish("ceilings", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
