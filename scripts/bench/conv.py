"""Time the STU's convolution, forward and backward, against the two-branch FFT of the published formulation.

    python scripts/bench/conv.py [--lengths 512 2048 8192 32768 131072] [--dtype bfloat16] [--output results/cpu]

Every variant computes the same function of the inputs and the filters' weights, both branches sharing coefficients.
Figures are medians with their spread, variants taken in turn so that a drifting machine hits all alike. Also: the
arithmetic that a variant does, as a share of the rate of a large matrix product in the same dtype, and its time over
that of moving the activations once (x, y, both gradients and x again, at the rate of a large copy), both measured in
the same run. Runs on a GPU if there is one. What it finds fastest is what flash_stu/ops/conv/choice.py chooses from.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from measuring import device_rates, forward_and_backward, take_turns
from plots import against_length

from flash_stu import spectral_filters
from flash_stu.arguments import SECONDS, integer, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.model.config import LARGEST_LENGTH
from flash_stu.ops.backends import why_not
from flash_stu.ops.conv.choice import CHUNK, causal_conv, spectral_conv
from flash_stu.ops.conv.fft import fft_size
from flash_stu.results import environment, failure_cells, finish, page, save, spread, table

TWO_BRANCH = "two-branch FFT (published form)"
NAMES = {"polyphase FFT": "fft", "chunked": "chunked", "Triton": "triton", "polyphase flashfftconv": "flashfftconv"}
STATES = 32  # of the chunked form, about; for its count of operations
FEATURES = 24


def two_branch_fft(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Both branches as the published code computes them: x and x (-1)^t stacked, one FFT convolution, signs undone.

    Formulation of Flash STU (arXiv 2409.10489); float32 throughout, FFT of twice the next power of two.
    """
    length = x.shape[1]
    size = 2 << (length - 1).bit_length()
    signs = _signs(x)
    both = torch.stack([x.float(), x.float() * signs], dim=-1)
    spectrum = torch.fft.rfft(filters.float()[None, :, :, None], n=size, dim=1)
    y = torch.fft.irfft(torch.fft.rfft(both, n=size, dim=1) * spectrum, n=size, dim=1)[:, :length]
    plus, minus = y.unbind(dim=-1)
    return (plus + minus * signs).to(x.dtype)


def two_branch_flashfftconv(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """The same through FlashFFTConv, as the published code uses it: both branches stacked along the batch."""
    signs = _signs(x).to(x.dtype)
    plus, minus = causal_conv(torch.cat([x, x * signs]), filters, "flashfftconv").chunk(2)
    return plus + minus * signs


def _signs(x: torch.Tensor) -> torch.Tensor:
    signs = torch.ones(1, x.shape[1], 1, device=x.device)
    signs[:, 1::2] = -1
    return signs


def variants(phi: torch.Tensor, device: torch.device, dtype: torch.dtype, direct: bool) -> dict[str, Callable]:
    """Returns the variants to compare: functions of x (batch, length, channels) and weights (filters, channels)."""
    both = phi + phi * (-1.0) ** torch.arange(len(phi), device=device)[:, None]
    even = 2 * phi[::2].contiguous()
    result = {
        TWO_BRANCH: lambda x, w: two_branch_fft(x, phi @ w),
        "one full-length FFT": lambda x, w: spectral_conv(x, both, w, "fft"),
    }
    result |= {
        name: lambda x, w, backend=backend: spectral_conv(x, even, w, backend, 2)
        for name, backend in NAMES.items()
        if backend in ("fft", "chunked")
        or (backend == "triton" and why_not(backend) is None and device.type == "cuda")
        or (backend == "flashfftconv" and why_not(backend) is None and dtype != torch.float32)
    }
    if "polyphase flashfftconv" in result:
        result["two-branch flashfftconv (published form)"] = lambda x, w: two_branch_flashfftconv(x, phi @ w)
    if direct:
        result["direct sum"] = lambda x, w: spectral_conv(x, even, w, "direct", 2)
    return result


def operations(name: str, batch: int, length: int, channels: int) -> float:
    """Floating-point operations of a variant, forward and backward; those on the filters' weights left out."""
    steps = -(-length // 2)
    if name == "direct sum":
        return 3 * 2 * batch * 2 * channels * steps * (steps + 1) / 2
    if name in ("chunked", "Triton"):  # a band of near lags for every channel, in three products
        return batch * length * channels * (3 * 4 * CHUNK[name.lower()] + 10 * STATES)
    if name.startswith("two-branch"):
        size, signals = 2 << (length - 1).bit_length(), 2 * batch
    elif name.startswith("one"):
        size, signals = fft_size(length, length), batch
    else:
        size, signals = fft_size(steps, steps), 2 * batch
    # five transforms of signals and four of filters, of 5/2 n log n each, and three products of half as many complex
    # numbers
    transform = 2.5 * size * math.log2(size)
    return channels * ((5 * signals + 4) * transform + 3 * signals * 6 * size / 2)


@cache
def filters_of(length: int) -> torch.Tensor:
    return spectral_filters(length, FEATURES)[1].float()


def compare(length: int, args: Namespace, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """One row of raw figures for each variant at one length."""
    torch.manual_seed(0)
    x = torch.randn(args.batch, length, args.channels, device=device).to(dtype).requires_grad_()
    weights = torch.randn(FEATURES, args.channels, device=device).div(5).requires_grad_()
    compared = variants(filters_of(length).to(device), device, dtype, length <= args.direct_up_to)
    calls = {name: lambda f=f: forward_and_backward(f, (x, weights)) for name, f in compared.items()}
    moved = 5 * x.numel() * x.element_size()
    failed: dict[str, str] = {}
    rows = [
        {
            "variant": name,
            "length": length,
            "forward": [forward for forward, _ in samples],
            "total": [total for _, total in samples],
            "flops": operations(name, args.batch, length, args.channels),
            "bytes": moved,
        }
        for name, samples in take_turns(calls, args.repeats, args.seconds, failed).items()
    ]
    return rows + [{"variant": name, "length": length, "failed": reason} for name, reason in failed.items()]


def measured(rows: list[dict]) -> list[dict]:
    """Those rows that have figures."""
    return [row for row in rows if "failed" not in row]


def render(results: dict) -> str:
    """One table of all lengths and variants, and how the time grows."""
    rates, rows = results["rates"], []
    references = {
        r["length"]: statistics.median(r["total"]) for r in measured(results["rows"]) if r["variant"] == TWO_BRANCH
    }
    for row in results["rows"]:
        label = f"{row['length']:,}: {row['variant']}"
        if "failed" in row:
            rows.append([label, *failure_cells(row, 5)])
            continue
        taken = statistics.median(row["total"])
        share, over = row["flops"] / taken / rates["flops"], taken / (row["bytes"] / rates["bytes"])
        reference = references.get(row["length"])
        rows.append(
            [
                label,
                spread(row["forward"]),
                spread(row["total"]),
                "" if reference is None else f"{reference / taken:.1f}x",
                f"{share:.0%}",
                f"{over:,.1f}x",
            ]
        )
    header = [
        "length: variant",
        "forward, ms",
        "forward + backward, ms",
        "speed-up",
        "of the product rate",
        "over moving",
    ]
    shape = (
        f"Batch {results['batch']}, {results['channels']} channels, {results['dtype']}; a matrix product runs at "
        f"{rates['flops'] / 1e9:,.0f} GFLOP/s, a copy at {rates['bytes'] / 1e9:,.1f} GB/s."
    )
    return page(results, shape, table(header, rows), growth(measured(results["rows"])), fastest(results["rows"]))


def growth(rows: list[dict]) -> str:
    """How forward and backward together grow, as exponents; below 2,048 tokens calls cost more than work."""
    lengths = sorted({row["length"] for row in rows if row["length"] >= 2048})
    if len(lengths) < 2:
        return ""
    short, long = lengths[0], lengths[-1]
    taken = {(row["variant"], row["length"]): statistics.median(row["total"]) for row in rows}
    found = [
        f"{name} length^{math.log(taken[name, long] / taken[name, short]) / math.log(long / short):.2f}"
        for name in dict.fromkeys(row["variant"] for row in rows)
        if (name, long) in taken
    ]
    return f"From {short:,} to {long:,} tokens the time grows as: {', '.join(found)}."


def fastest(rows: list[dict]) -> str:
    """Which of the back ends won at each length."""
    winners = []
    for length in sorted({row["length"] for row in rows}):
        mine = [row for row in measured(rows) if row["length"] == length and row["variant"] in NAMES]
        if mine:
            best = min(mine, key=lambda row: statistics.median(row["total"]))
            winners.append(f"`{NAMES[best['variant']]}` at {length:,}")
    return f"Fastest back end: {', '.join(winners)}."


def plot(results: dict, path: Path) -> None:
    title = f"batch {results['batch']}, {results['channels']} channels, {results['dtype']}"
    rows = measured(results["rows"])
    moved = {row["length"]: row["bytes"] / results["rates"]["bytes"] for row in rows}
    against_length(rows, "variant", path, title, {"moving the activations once": moved})


def main() -> None:
    device = default_device()
    cuda = device.type == "cuda"
    lengths = [2048, 8192, 32768] if cuda else [512, 2048, 8192, 32768, 131072]
    parser = ArgumentParser(__doc__)
    parser.add_argument("--lengths", type=integer(1, LARGEST_LENGTH), nargs="+", default=lengths)
    parser.add_argument("--channels", type=integer(1, 2**17), default=1024 if cuda else 256)
    parser.add_argument("--batch", type=integer(1, 2**16), default=4 if cuda else 1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=integer(1, 10000), default=7)
    parser.add_argument("--seconds", type=SECONDS, default=10, help="a variant that took so long is not repeated")
    parser.add_argument(
        "--direct-up-to", type=integer(0, LARGEST_LENGTH), default=512, help="longest sequence that is summed directly"
    )
    parser.add_argument(
        "--output", type=output_directory, metavar="DIR", help="write conv-DTYPE.json and conv-DTYPE.png there"
    )
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    results = {
        "environment": environment(device),
        "rates": device_rates(device, dtype),
        "batch": args.batch,
        "channels": args.channels,
        "dtype": args.dtype,
        "rows": [],
    }
    for length in args.lengths:
        print(f"{length:,} tokens", flush=True)
        results["rows"] += compare(length, args, device, dtype)
        save(f"conv-{args.dtype}", results, args.output)
    finish(f"conv-{args.dtype}", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
