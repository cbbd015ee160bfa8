"""Error of the LDS fits against their state dimension, how few states reach an error, and how long a fit takes.

    python scripts/bench/fits.py [--length 8192] [--filters 24] [--basis hankel] [--output results/cpu]

Decays are rounded to float32 before the output weights are solved for, as a model runs them. MSE is over all lags and
filters; the bound is what no LDS of that dimension can undercut (0: below float64's rounding). "At run time" is the
relative error of the impulse responses once the output weights are rounded to float32 too; this, the largest weight
and lambda_max h (Theorem 1) are the best method's. The picture is that of distill.py, for 160 states.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from measuring import seconds

from flash_stu.arguments import integer, output_directory
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.filters.spectral import BASES, compute_filters
from flash_stu.model.config import LARGEST_LENGTH
from flash_stu.ops.conv.choice import causal_conv
from flash_stu.results import environment, finish, page, spread, table
from spectralds import fit_lds
from spectralds.bank import FilterBank
from spectralds.curve import error_curve
from spectralds.fit import LDSFit, rounding_floor
from spectralds.options import METHODS
from spectralds.plots import plot_fit

CPU = torch.device("cpu")
STATE_DIMS = (16, 24, 32, 40, 48, 52, 56, 64, 72, 80, 88, 96, 112, 128, 160)
SHOWN = 160  # states of the timed fit and of the picture
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 3e-6, 1e-8, 1e-12)
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--length", type=integer(8, LARGEST_LENGTH), default=8192)
    parser.add_argument("--filters", type=integer(1, 1024), default=24)
    parser.add_argument("--basis", choices=BASES, default="hankel")
    parser.add_argument("--repeats", type=integer(1, 10000), default=5, help="of what is timed")
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write fits.json and .png there")
    args = parser.parse_args()
    _, phi = compute_filters(args.length, args.filters, args.basis)
    bank = FilterBank(phi)
    settings = {"length": args.length, "filters": args.filters, "basis": args.basis}
    results = {
        "environment": environment(CPU),
        **settings,
        "filter_seconds": repeated(lambda: compute_filters(*settings.values()), args.repeats),
        "fit_seconds": repeated(lambda: fit_lds(phi, SHOWN), args.repeats),
        "recurrence_error": recurrence_error(fit_lds(bank, SHOWN), phi) if args.length <= 65536 else None,
        "floors": {name: rounding_floor(bank, dtype) for name, dtype in DTYPES.items()},
        "rows": errors(bank),
        "smallest": [smallest(bank, tolerance) for tolerance in TOLERANCES],
    }
    finish("fits", results, render, plot, args.output)


def repeated(function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call."""
    return [seconds(function, CPU) for _ in range(repeats)]


def errors(bank: FilterBank) -> list[dict]:
    """Errors, bounds, coefficients and Theorem 1's quantities for each state dimension."""
    curve, kept = error_curve(bank, torch.float32, 1, STATE_DIMS), ("run_time_error", "max_coefficient", "lambda_max_h")
    rows = [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]
    reports = [fit_lds(bank, states).report for states in STATE_DIMS]
    return [row | {key: report[key] for key in kept} for row, report in zip(rows, reports, strict=True)]


def smallest(bank: FilterBank, tolerance: float) -> dict:
    """How many states "auto" takes for a tolerance in each dtype; None where none are enough."""
    found: dict[str, float | None] = {"tolerance": tolerance}
    for name, dtype in DTYPES.items():
        try:
            found[name] = fit_lds(bank, "auto", dtype=dtype, tolerance=tolerance).report["state_dim"]
        except UserError:
            found[name] = None
    return found


def render(results: dict) -> str:
    """Errors against the state dimension, and the fewest states for some tolerances."""
    shape = (
        f"{results['filters']} {results['basis']} filters of length {results['length']:,}. Computing them took "
        f"{spread(results['filter_seconds'])} ms, a fit of {SHOWN} states {spread(results['fit_seconds'])} ms."
    )
    if results["recurrence_error"] is not None:
        shape += (
            f" Its float32 recurrence over {results['length']:,} random tokens is within "
            f"{results['recurrence_error']:.1e} of the exact convolution, relative."
        )
    header = ["state dim", *METHODS, "no LDS is below", "at run time", "largest weight", "lambda_max h"]
    rows = [
        [str(row["state_dim"]), *(f"{row[key]:.1e}" for key in (*METHODS, "bound", "run_time_error"))]
        + [f"{row['max_coefficient']:,.1f}", f"{row['lambda_max_h']:,.0f}"]
        for row in results["rows"]
    ]
    found = [["fewest states, " + name, *(str(row[name] or "-") for row in results["smallest"])] for name in DTYPES]
    floors = " and ".join(f"about {floor:.1e} in {name}" for name, floor in results["floors"].items())
    return page(
        results,
        shape,
        table(header, rows),
        table(["relative error", *(f"{row['tolerance']:g}" for row in results["smallest"])], found),
        f"Rounding alone leaves a relative error of {floors}, however many states.",
    )


def plot(results: dict, path: Path) -> None:
    _, phi = compute_filters(results["length"], results["filters"], results["basis"])
    bank = FilterBank(phi)
    curve = {key: [row[key] for row in results["rows"]] for key in ("state_dim", *METHODS, "bound")}
    plot_fit(bank, fit_lds(bank, SHOWN), curve, path)


@torch.inference_mode()
def recurrence_error(fit: LDSFit, phi: torch.Tensor, channels: int = 4) -> float:
    """Relative (Frobenius) error of the float32 recurrence over the filters' length, on white noise, all features."""
    length = phi.shape[0]
    x = torch.randn(length, channels, generator=torch.Generator().manual_seed(0))
    signs = torch.ones(length, 1, dtype=torch.float64)
    signs[1::2] = -1
    taps = torch.cat([phi, signs * phi], dim=1)
    decay, readout = fit.A.float(), fit.C.float().double()
    state, outputs = torch.zeros(channels, len(decay)), torch.empty(length, channels, taps.shape[1])
    for t in range(length):
        state = torch.addcmul(x[t, :, None], state, decay)
        outputs[t] = state.double() @ readout
    columns = x.double()[None, :, :].expand(taps.shape[1], -1, -1)  # (features, length, channels)
    exact = torch.stack([causal_conv(c[None], taps[:, i, None].expand(-1, channels))[0] for i, c in enumerate(columns)])
    difference = outputs.permute(2, 0, 1) - exact
    return float(difference.norm() / exact.norm())


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
