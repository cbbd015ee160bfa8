"""Time the STU's convolution, forward and backward, against the two-branch FFT of the published formulation.

    python scripts/bench/conv.py [--lengths 2048 8192] [--channels 256] [--batch 1] [--dtype float32]

Prints medians with the spread over repeats, variants taken in turn so that a drifting machine hits all alike, and the
ratio to the two-branch form. Runs on a GPU if there is one.
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch

from flash_stu.backends import why_not
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.loading import default_device
from flash_stu.ops.causal_conv import causal_conv


def two_branch_fft(x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Both branches as the published code computes them: x and x (-1)^t stacked, one FFT convolution, signs undone.

    Formulation of Flash STU (arXiv 2409.10489); float32 throughout, FFT of twice the next power of two.
    """
    length = x.shape[1]
    size = 2 << (length - 1).bit_length()
    signs = torch.ones(1, length, 1, device=x.device)
    signs[:, 1::2] = -1
    both = torch.stack([x.float(), x.float() * signs], dim=-1)
    spectrum = torch.fft.rfft(filters.float()[None, :, :, None], n=size, dim=1)
    y = torch.fft.irfft(torch.fft.rfft(both, n=size, dim=1) * spectrum, n=size, dim=1)[:, :length]
    plus, minus = y.unbind(dim=-1)
    return (plus + minus * signs).to(x.dtype)


def variants(device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """What is compared: all compute the same function of x and the filters (both branches, shared coefficients)."""
    full = {
        "two-branch FFT (published form)": two_branch_fft,
        "one full-length FFT": lambda x, f: causal_conv(x, _both_branches(f), "fft"),
        "polyphase FFT (shared branches)": lambda x, f: causal_conv(x, 2 * f[::2], "fft", dilation=2),
    }
    if why_not("flashfftconv") is None and dtype != torch.float32:
        full["polyphase flashfftconv"] = lambda x, f: causal_conv(x, 2 * f[::2], "flashfftconv", dilation=2)
    return full


def _both_branches(filters: torch.Tensor) -> torch.Tensor:
    signs = torch.ones(len(filters), 1, device=filters.device)
    signs[1::2] = -1
    return filters + signs * filters


def measure(function: Callable, x: torch.Tensor, filters: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward pass, and of forward and backward together."""

    def now() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    y = function(x, filters)
    middle = now()
    torch.autograd.grad(y, (x, filters), torch.ones_like(y))
    return middle - start, now() - start


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    device, dtype = default_device(), getattr(torch, args.dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {name}, {args.dtype}")
    print("milliseconds: median (min-max) of", args.repeats)
    for length in args.lengths:
        torch.manual_seed(0)
        x = torch.randn(args.batch, length, args.channels, device=device, dtype=dtype, requires_grad=True)
        filters = (torch.randn(length, args.channels, device=device) / length**0.5).requires_grad_()
        compared = variants(device, dtype)
        seconds: dict[str, list] = {key: [] for key in compared}
        for repeat in range(args.repeats + 1):
            for key, function in compared.items():
                sample = measure(function, x, filters)
                if repeat:  # the first round warms up
                    seconds[key].append(sample)
        print(f"\n(batch {args.batch}, length {length}, channels {args.channels})")
        print(f"| {'variant':32} | {'forward':>22} | {'forward + backward':>22} | speed-up |")
        print(f"|{'-' * 34}|{'-' * 23}:|{'-' * 23}:|---------:|")
        reference = statistics.median(total for _, total in seconds["two-branch FFT (published form)"])
        for key, samples in seconds.items():
            forward, total = zip(*samples, strict=True)
            ratio = reference / statistics.median(total)
            print(f"| {key:32} | {_spread(forward):>22} | {_spread(total):>22} | {ratio:7.1f}x |")


def _spread(samples: tuple[float, ...]) -> str:
    milliseconds = [1000 * s for s in samples]
    return f"{statistics.median(milliseconds):.1f} ({min(milliseconds):.1f}-{max(milliseconds):.1f})"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
