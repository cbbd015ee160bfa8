"""Time the STU's convolution, forward and backward, against the two-branch FFT of the published formulation.

    python scripts/bench/conv.py [--lengths 512 2048 8192 32768 131072] [--dtype bfloat16] [--output results/cpu]

Every variant computes the same function of the inputs and the filters' weights, both branches sharing coefficients.
Figures are medians with their spread, variants taken in turn so that a drifting machine hits all alike. Also: the
arithmetic that a variant does, as a share of the rate of a large matrix product in the same dtype, and its time over
that of moving the activations once (x, y, both gradients and x again, at the rate of a large copy), both measured in
the same run. Runs on a GPU if there is one. What it finds fastest is what flash_stu/ops/spectral_conv.py chooses from.
"""

import math
import statistics
from collections.abc import Callable
from functools import cache

import torch
from matplotlib.figure import Figure
from measuring import describe, device_rates, environment, forward_and_backward, spread, table, take_turns, write

from flash_stu import spectral_filters
from flash_stu.backends import why_not
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.loading import default_device
from flash_stu.ops.causal_conv import _fft_size, causal_conv
from flash_stu.ops.spectral_conv import CHUNK, spectral_conv

TWO_BRANCH = "two-branch FFT (published form)"
NAMES = {"polyphase FFT": "fft", "chunked": "chunked", "Triton": "triton", "polyphase flashfftconv": "flashfftconv"}
STATES = 32  # of the chunked form, about; for its count of operations


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
    """What is compared: functions of x (batch, length, channels) and weights (filters, channels)."""
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
    if name in ("chunked", "Triton"):
        return batch * length * channels * (3 * 4 * CHUNK + 10 * STATES)
    if name.startswith("two-branch"):
        size, signals = 2 << (length - 1).bit_length(), 2 * batch
    elif name.startswith("one"):
        size, signals = _fft_size(length, length), batch
    else:
        size, signals = _fft_size(steps, steps), 2 * batch
    # five transforms of signals and four of filters, of 5/2 n log n each, and three products of half as many complex
    # numbers
    transform = 2.5 * size * math.log2(size)
    return channels * ((5 * signals + 4) * transform + 3 * signals * 6 * size / 2)


@cache
def filters_of(length: int) -> torch.Tensor:
    return spectral_filters(length, 24)[1].float()


def compare(length: int, args, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """One row of raw figures for each variant at one length."""
    torch.manual_seed(0)
    x = torch.randn(args.batch, length, args.channels, device=device).to(dtype).requires_grad_()
    weights = torch.randn(24, args.channels, device=device).div(5).requires_grad_()
    compared = variants(filters_of(length).to(device), device, dtype, length <= args.direct_up_to)
    calls = {name: lambda f=f: forward_and_backward(f, (x, weights)) for name, f in compared.items()}
    moved = 5 * x.numel() * x.element_size()
    return [
        {
            "variant": name,
            "length": length,
            "forward": [forward for forward, _ in samples],
            "total": [total for _, total in samples],
            "flops": operations(name, args.batch, length, args.channels),
            "bytes": moved,
        }
        for name, samples in take_turns(calls, args.repeats, args.seconds).items()
    ]


def render(results: dict) -> str:
    """Tables of results as `main` writes them, one for each length, and how the time grows."""
    parts, rates = [], results["rates"]
    header = ["", "forward, ms", "forward + backward, ms", "speed-up", "GFLOP", "of the product rate", "over moving"]
    for length in sorted({row["length"] for row in results["rows"]}):
        rows = [row for row in results["rows"] if row["length"] == length]
        reference = next(statistics.median(row["total"]) for row in rows if row["variant"] == TWO_BRANCH)
        lines = []
        for row in rows:
            taken = statistics.median(row["total"])
            share, over = row["flops"] / taken / rates["flops"], taken / (row["bytes"] / rates["bytes"])
            lines.append([row["variant"], spread(row["forward"]), spread(row["total"]), f"{reference / taken:.1f}x",
                          f"{row['flops'] / 1e9:,.2f}", f"{share:.0%}", f"{over:.1f}x"])  # fmt: skip
        shape = f"batch {results['batch']}, length {length:,}, {results['channels']} channels, {results['dtype']}"
        parts += [shape, table(header, lines)]
    parts.append(growth(results["rows"]))
    return "\n\n".join(part for part in parts if part)


def growth(rows: list[dict]) -> str:
    """How forward and backward together grow from length to length, as an exponent."""
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        points = [(row["length"], statistics.median(row["total"])) for row in rows if row["variant"] == name]
        points = [point for point in points if point[0] >= 2048]  # below, calls cost more than work
        if len(points) > 1:
            (short, before), (long, after) = points[0], points[-1]
            exponent = math.log(after / before) / math.log(long / short)
            lines.append(f"{name}: as length^{exponent:.2f} from {short:,} to {long:,}")
    return "\n".join(lines)


def fastest(rows: list[dict]) -> str:
    """Which of the back ends won at each length."""
    winners = []
    for length in sorted({row["length"] for row in rows}):
        mine = [row for row in rows if row["length"] == length and row["variant"] in NAMES]
        best = min(mine, key=lambda row: statistics.median(row["total"]))
        winners.append(f"{length}: {NAMES[best['variant']]}")
    return "fastest back end by length: " + ", ".join(winners)


def plot(results: dict, path) -> None:
    figure = Figure(figsize=(6.4, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    rows = results["rows"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        points = [(row["length"], [1000 * s for s in row["total"]]) for row in rows if row["variant"] == name]
        lengths, medians = [p[0] for p in points], [statistics.median(p[1]) for p in points]
        errors = [[m - min(p[1]) for m, p in zip(medians, points, strict=True)],
                  [max(p[1]) - m for m, p in zip(medians, points, strict=True)]]  # fmt: skip
        axes.errorbar(lengths, medians, errors, marker="o", markersize=3, capsize=2, label=name)
    moved = sorted({(row["length"], 1000 * row["bytes"] / results["rates"]["bytes"]) for row in rows})
    axes.plot(*zip(*moved, strict=True), "--", color="gray", label="moving the activations once")
    axes.set(xscale="log", yscale="log", xlabel="length, tokens", ylabel="forward + backward, ms")
    axes.set_xticks([m[0] for m in moved], [f"{m[0]:,}" for m in moved])
    axes.minorticks_off()
    axes.set_title(f"batch {results['batch']}, {results['channels']} channels, {results['dtype']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    device = default_device()
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 32768, 131072])
    parser.add_argument("--channels", type=int, default=1024 if device.type == "cuda" else 256)
    parser.add_argument("--batch", type=int, default=8 if device.type == "cuda" else 1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=20, help="a variant that took so long is not repeated")
    parser.add_argument("--direct-up-to", type=int, default=512, help="longest sequence that is summed directly")
    parser.add_argument("--output", metavar="DIR", help="write conv-DTYPE.json and conv-DTYPE.png there")
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
    rates = results["rates"]
    print(describe(results["environment"]))
    print(f"a matrix product runs at {rates['flops'] / 1e9:,.0f} GFLOP/s, a copy at {rates['bytes'] / 1e9:,.1f} GB/s")
    for length in args.lengths:
        rows = compare(length, args, device, dtype)
        results["rows"] += rows
        print("\n" + render(results | {"rows": rows}), flush=True)
    print("\n" + growth(results["rows"]))
    print(fastest(results["rows"]))
    if args.output:
        path = write(args.output, f"conv-{args.dtype}", results)
        plot(results, path.with_suffix(".png"))
        print(f"written to {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
