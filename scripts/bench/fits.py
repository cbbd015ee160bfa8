"""Error of the LDS fits against their state dimension, how few states reach an error, and how long a fit takes.

    python scripts/bench/fits.py [--length 8192] [--filters 24] [--basis hankel] [--figure fits.png]

Decays are rounded to float32 before the output weights are solved for, as a model runs them. MSE is over all lags and
filters; the bound is what no LDS of that dimension can undercut (0: below float64's rounding). "At run time" is the
relative error of the impulse responses once the output weights are rounded to float32 too. The Theorem 1 columns are
those of the best method's decays.
"""

import resource
import time

import torch

from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.filters import BASES, compute_filters
from flash_stu.ops.causal_conv import causal_conv
from spectralds import fit_lds
from spectralds.bank import FilterBank
from spectralds.curve import error_curve
from spectralds.fit import METHODS, LDSFit, rounding_floor
from spectralds.plots import plot_fit

STATE_DIMS = (16, 24, 32, 40, 48, 52, 56, 64, 72, 80, 88, 96, 112, 128, 160)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 3e-6, 1e-8, 1e-12)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--filters", type=int, default=24)
    parser.add_argument("--basis", choices=BASES, default="hankel")
    parser.add_argument("--figure", metavar="FILE", help="draw the fit of state dimension 160 and the table's errors")
    args = parser.parse_args()
    started = time.perf_counter()
    _, phi = compute_filters(args.length, args.filters, args.basis)
    print(f"{args.filters} {args.basis} filters of length {args.length}: {time.perf_counter() - started:.2f} s")
    started = time.perf_counter()
    fit = fit_lds(phi, 160)
    print(f"state dim 160, the first fit of these filters: {time.perf_counter() - started:.2f} s")

    bank = FilterBank(phi)
    started = time.perf_counter()
    curve = error_curve(bank, torch.float32, 1, STATE_DIMS)
    print(f"{len(STATE_DIMS)} state dimensions, {len(METHODS)} methods: {time.perf_counter() - started:.2f} s")
    table(bank, curve)
    smallest(bank)
    for dtype in (torch.float32, torch.float64):
        print(f"rounding floor, {dtype}: relative error {rounding_floor(bank, dtype):.1e} however many states")
    if args.length <= 65536:
        print(f"float32 recurrence over {args.length} tokens, state dim 160: {recurrence_error(fit, phi):.1e} relative")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    if args.figure:
        plot_fit(bank, fit, curve, args.figure)


def table(bank: FilterBank, curve: dict[str, list]) -> None:
    """Errors, bounds, coefficients and Theorem 1's quantities against the state dimension."""
    head = [*(f"{method} MSE" for method in METHODS), "bound on the MSE", "AAK bound", "at run time", "largest weight"]
    head += ["lambda_max", "lambda_max h"]
    print(f"\n| state dim | {' | '.join(head)} |\n|{'---:|' * (len(head) + 1)}")
    for i, states in enumerate(curve["state_dim"]):
        report = fit_lds(bank, states).report
        cells = [*(curve[method][i] for method in METHODS), *(report[key] for key in ("mse_bound", "aak_bound"))]
        cells = [f"{cell:.1e}" for cell in cells] + [f"{report['run_time_error']:.1e}"]
        cells += [f"{report[key]:.1f}" for key in ("max_coefficient", "lambda_max", "lambda_max_h")]
        print(f"| {states} | {' | '.join(cells)} |")


def smallest(bank: FilterBank) -> None:
    """What state_dim "auto" finds for some tolerances, or why it finds nothing."""
    print("\n| tolerance | run-time dtype | smallest state dim | MSE | seconds |\n|---:|---|---:|---:|---:|")
    refused = []
    for dtype in (torch.float32, torch.float64):
        for tolerance in TOLERANCES:
            started, name = time.perf_counter(), str(dtype).removeprefix("torch.")
            try:
                report = fit_lds(bank, "auto", dtype=dtype, tolerance=tolerance).report
                cells = f"{report['state_dim']} | {report['mse']:.1e}"
            except UserError as error:
                refused.append(f"{name}: {error}")
                cells = "- | -"
            print(f"| {tolerance:g} | {name} | {cells} | {time.perf_counter() - started:.2f} |")
    print("\n" + "\n".join(refused))


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
