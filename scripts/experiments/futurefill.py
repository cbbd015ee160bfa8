"""One STU layer generating token by token: seconds and multiply-adds against length, for each way to carry the past.

    python scripts/experiments/futurefill.py [--quick | --full] [--output results/experiments]

A layer of width 128 with 24 filters takes the same normal inputs one by one: as a direct sum over the past, by epoched
and by continuous FutureFill, and distilled to systems of 100 and of 800 states. Seconds are the processor's, of one
thread, so that other work on the machine does not count. Filters are made ready before the clock starts; a spectrum of
theirs is computed while it runs, for the first block that needs it. Outputs are compared with the convolution of the
whole sequence.

Multiply-adds of the convolution are counted from the schedule of blocks, exactly; a transform of N reals counts as
5/4 N log2 N of them, half a complex radix-2 one. Beyond the longest generation, seconds are extrapolated: the counts
that are still to come, at the seconds per multiply-add of the last doubling. How well that does is measured too: the
longest generation is predicted from its first eighth.

Source: Agarwal et al. 2024, FutureFill (arXiv 2410.03766), algorithms 2 and 3.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM
from flash_stu.errors import run_cli
from flash_stu.figures import save_figure
from flash_stu.model.layers import LDS, STU
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.layers.state import LDSState
from flash_stu.ops.futurefill import ConvState
from flash_stu.results import environment, experiment_parser, finish, page, panels, table
from spectralds import distill
from spectralds.fit import few_threads

WIDTH, FILTERS = 128, 24
SEED = 0
EXACT = {"naive": "naive", "epoched FutureFill": "futurefill_epoched", "FutureFill": "futurefill"}
STATES = (100, 800)
SIZES = {  # filter length = longest extrapolation, tokens, tokens of the naive sum
    "quick": (4096, 512, 256),
    "default": (2**20, 2**17, 2**15),
    "full": (2**20, 2**20, 2**17),
}
SHORTEST = 32  # lengths are the powers of two from here on
DOUBLINGS = 3  # by which the extrapolation is checked


def powers_of_two(longest: int) -> list[int]:
    """Returns SHORTEST, twice that, ... up to `longest`."""
    return [1 << k for k in range(SHORTEST.bit_length() - 1, longest.bit_length())]


def transform_work(size: int) -> float:
    """Returns the multiply-adds of a Fourier transform of so many reals, a power of two."""
    return 1.25 * size * math.log2(size)


def schedule(state: ConvState, tokens: int) -> tuple[int, Counter[int]]:
    """Count what `tokens` steps after an empty state ask for, without taking them.

    Args:
        state: its filters, dilation and kind of blocks are read.

    Returns:
        inputs of all direct sums, and by their size the transforms' number of blocks.
    """
    direct, blocks = 0, Counter()
    for phase in range(state.dilation):
        steps = (tokens - phase + state.dilation - 1) // state.dilation
        whole, rest = divmod(steps, state.unit)
        direct += whole * state.unit * (state.unit + 1) // 2 + rest * (rest + 1) // 2
        for end in range(state.unit, steps + 1, state.unit):
            length = end if state.whole else end & -end
            reach = min(state.unit if state.whole else length, len(state.taps) - end)
            if reach > 0:
                blocks[1 << (length + reach - 1).bit_length()] += 1
    return direct, blocks


def stu_work(state: ConvState, tokens: int, width: int = WIDTH) -> list[float]:
    """Returns the multiply-adds of the direct sums and of the blocks of so many steps.

    A block transforms its inputs and its outputs, multiplies the spectra (4 a frequency), and adds to the outputs; each
    size of blocks transforms the filters once.
    """
    direct, blocks = schedule(state, tokens)
    work = sum(n * (2 * transform_work(size) + 4 * (size // 2 + 1)) for size, n in blocks.items())
    return [float(width * direct), width * (work + sum(map(transform_work, blocks)))]


def lds_work(states: int, tokens: int, width: int = WIDTH) -> list[float]:
    """Returns the multiply-adds of so many steps of a system, one to advance and one to read each state of a token."""
    return [2.0 * states * width * tokens, 0.0]


@torch.inference_mode()
def generate(
    layer: STU | LDS, x: torch.Tensor, context: SequenceContext
) -> tuple[list[float], torch.Tensor, ConvState | LDSState]:
    """Step through inputs (1, tokens, width).

    Returns:
        processor seconds at each of the lengths, from an empty state; outputs as the inputs; the state at the end,
        without taps.
    """
    step: Callable = layer.step  # of a state of the layer's own kind
    _, state = layer.prefill(x[:, :0], context)
    outputs, times = torch.empty_like(x), []
    wanted, done = powers_of_two(x.shape[1]), 0
    start = time.process_time()
    for length in wanted:
        for t in range(done, length):
            outputs[:, t : t + 1], state = step(x[:, t : t + 1], context, state)
        times.append(time.process_time() - start)
        done = length
    return times, outputs, state.core


def extrapolate(seconds: list[float], work: list[float]) -> list[float]:
    """Continue seconds by the work still to do, at the seconds per multiply-add of the last two of them.

    Args:
        seconds: at the first lengths.
        work: multiply-adds at all lengths.

    Returns:
        seconds at all lengths.
    """
    last = len(seconds) - 1
    rate = (seconds[last] - seconds[last - 1]) / (work[last] - work[last - 1])
    return seconds + [seconds[last] + rate * (more - work[last]) for more in work[last + 1 :]]


def rows(longest: int, tokens: int, tokens_naive: int) -> list[dict]:
    """Returns a row for each way: seconds at the lengths measured, multiply-adds at all, and the outputs' error."""
    torch.manual_seed(SEED)
    settings = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_filters": FILTERS, "vocab_size": 2}
    one = {"num_hidden_layers": 1, "layer_types": ["linear_attention"], "max_position_embeddings": longest}
    model = FlashSTUForCausalLM(FlashSTUConfig.from_user({**settings, **one})).eval()
    layer = model.get_submodule("model.layers.0.mixer")
    assert isinstance(layer, STU) and model.model.filters is not None
    context = SequenceContext(model.model.filters.phi, None)
    x = torch.randn(1, tokens, WIDTH)
    lengths = powers_of_two(longest)
    with torch.inference_mode():
        expected = layer(x, context)

    def row(label: str, mixer: STU | LDS, count: int) -> dict:
        print(f"{label}: {count:,} tokens", flush=True)
        seconds, outputs, state = generate(mixer, x[:, :count], context)
        if isinstance(state, ConvState):
            work = [stu_work(state, n) for n in lengths]
        else:
            work = [lds_work(len(state.decay), n) for n in lengths]
        error = float((outputs - expected[:, :count]).norm() / expected[:, :count].norm())
        return {"label": label, "seconds": seconds, "work": work, "error": error}

    result = []
    for label, backend in EXACT.items():
        layer.config.decode_backend = backend
        result.append(row(label, layer, tokens_naive if backend == "naive" else tokens))
    for states in STATES:
        mixer = distill(model, states).get_submodule("model.layers.0.mixer")
        assert isinstance(mixer, LDS)
        result.append(row(f"LDS, {states} states", mixer, tokens))
    return result


def totals(row: dict) -> list[float]:
    """Returns the multiply-adds of a row at all lengths."""
    return [sum(work) for work in row["work"]]


def check(row: dict) -> float:
    """Returns the seconds of the longest generation as its beginning predicts them, over those measured."""
    measured = len(row["seconds"])
    return extrapolate(row["seconds"][:-DOUBLINGS], totals(row))[measured - 1] / row["seconds"][-1]


def render(results: dict) -> str:
    """Seconds and multiply-adds at some lengths, and how far each figure can be trusted."""
    lengths, longest = results["lengths"], max(len(row["seconds"]) for row in results["rows"])
    shown = sorted({longest - 7, longest - 4, longest - 1, len(lengths) - 1})
    what = (
        f"One STU layer, width {results['width']}, {results['filters']} filters of length {lengths[-1]:,}, float32, "
        f"batch 1. Processor seconds to generate so many tokens, ~ extrapolated; multiply-adds of the convolution."
    )
    header = [f"{lengths[i]:,} tokens" for i in shown] + [f"multiply-adds, {lengths[i]:,}" for i in shown[-2:]]
    header += ["us a token, last half", f"predicted from 1/{2**DOUBLINGS}", "rel. error"]
    lines = []
    for row in results["rows"]:
        seconds, measured = extrapolate(row["seconds"], totals(row)), len(row["seconds"])
        cells = ["~" * (i >= measured) + _digits(seconds[i]) for i in shown]
        cells += [f"{totals(row)[i]:.1e}" for i in shown[-2:]]
        last = (seconds[measured - 1] - seconds[measured - 2]) / (lengths[measured - 1] - lengths[measured - 2])
        lines.append([row["label"], *cells, f"{1e6 * last:.0f}", f"{check(row) - 1:+.0%}", f"{row['error']:.0e}"])
    return page(results, what, table(["", *header], lines))


def _digits(seconds: float) -> str:
    return f"{float(f'{seconds:.3g}'):,.0f}" if seconds >= 99.5 else f"{seconds:.3g}"


def plot(results: dict, path: Path) -> None:
    lengths = results["lengths"]
    figure, (left, right) = panels(2, width=5.6)
    for i, row in enumerate(results["rows"]):
        measured = len(row["seconds"])
        style = {"color": f"C{i}", "linewidth": 1.6}
        left.plot(lengths[:measured], row["seconds"], "o-", markersize=3, label=row["label"], **style)
        left.plot(lengths[measured - 1 :], extrapolate(row["seconds"], totals(row))[measured - 1 :], "--", **style)
        right.plot(lengths, totals(row), **style)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="tokens generated")
    left.set_title("processor seconds; dashed: extrapolated", loc="left", fontsize=10)
    right.set_title("multiply-adds of the convolution, counted", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    args = experiment_parser(__doc__, "futurefill").parse_args()
    longest, tokens, tokens_naive = SIZES[args.size]
    with few_threads():
        results = {
            "environment": environment(torch.device("cpu")),
            "size": args.size,
            "seed": SEED,
            "width": WIDTH,
            "filters": FILTERS,
            "lengths": powers_of_two(longest),
            "rows": rows(longest, tokens, tokens_naive),
        }
    finish("futurefill", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
