"""Error of the LDS fits against their state dimension, and how long a fit takes.

    python scripts/bench/fits.py [--length 8192] [--filters 24] [--basis hankel]

Decays are rounded to float32 before the output weights are solved for, as a model runs them. MSE is over all lags and
filters; the bound is what no LDS of that dimension can undercut (0: below float64's rounding).
"""

import time

import torch

from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.filters import BASES, compute_filters
from flash_stu.ops.causal_conv import causal_conv
from spectralds import fit_lds
from spectralds.bank import FilterBank
from spectralds.fit import METHODS, LDSFit

STATE_DIMS = (40, 48, 56, 64, 80, 96, 128, 160)


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


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--filters", type=int, default=24)
    parser.add_argument("--basis", choices=BASES, default="hankel")
    args = parser.parse_args()
    started = time.perf_counter()
    _, phi = compute_filters(args.length, args.filters, args.basis)
    print(f"{args.filters} {args.basis} filters of length {args.length}: {time.perf_counter() - started:.2f} s")
    bank = FilterBank(phi)

    print(f"\n| state dim | {METHODS[0]} MSE | {METHODS[1]} MSE | bound on the MSE | largest weight |")
    print("|---:|---:|---:|---:|---:|")
    for states in STATE_DIMS:
        fits = [_try_fit(bank, states, method) for method in METHODS]
        cells = ["-" if fit is None else f"{fit.report['mse']:.1e}" for fit in fits]
        report = fits[0].report
        print(f"| {states} | {cells[0]} | {cells[1]} | {report['mse_bound']:.1e} | {report['max_coefficient']:.1f} |")

    started = time.perf_counter()
    fit = fit_lds(phi, 160)
    seconds = time.perf_counter() - started
    print(f"\nstate dim 160: fitted in {seconds:.2f} s, AAK bound {fit.report['aak_bound']:.1e}")
    print(f"float32 recurrence over {args.length} tokens: relative error {recurrence_error(fit, phi):.1e}")


def _try_fit(bank: FilterBank, states: int, method: str) -> LDSFit | None:
    try:
        return fit_lds(bank, states, method)
    except UserError:  # balanced truncation resolves no more states in float64
        return None


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
