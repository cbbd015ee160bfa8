"""Time the layers of a block beside each other: STU, LDS, sliding-window attention and MLP, forward and backward.

    python scripts/bench/layers.py [--lengths 1024 4096 16384] [--dtype bfloat16] [--output results/cpu]

Layers are those of the 340M model at another width (--width): eight heads, a window of 1,024, 24 filters of the
longest length, an LDS of 160 states. Weights are float32; with --dtype bfloat16 a layer runs under autocast, as it
does in training.
Figures are medians with their spread, layers taken in turn. Runs on a GPU if there is one.
"""

import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import forward_and_backward, take_turns
from plots import against_length

from flash_stu import FlashSTUConfig
from flash_stu.arguments import SECONDS, integer, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.model.config import LARGEST_LENGTH
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.modeling import FlashSTUModel
from flash_stu.results import environment, failure_cells, finish, page, save, spread, table

LAYERS = ("STU", "LDS", "sliding-window attention", "MLP")


def build(
    args: Namespace, device: torch.device
) -> tuple[dict[str, torch.nn.Module], Callable[[torch.Tensor], SequenceContext]]:
    """One layer of each kind with fresh weights, and what makes their context."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": args.width,
        "intermediate_size": 11 * args.width // 4,
        "max_position_embeddings": max(args.lengths),
    }
    kinds = ["linear_attention", "sliding_attention"]
    stu = FlashSTUModel(FlashSTUConfig(num_hidden_layers=2, layer_types=kinds, **shape))
    lds = FlashSTUModel(FlashSTUConfig(num_hidden_layers=1, lds_state_dim=160, layer_types=kinds[:1], **shape))
    for model in (stu, lds):
        torch.nn.Module.to(model, device)
    names = ("layers.0.mixer", "layers.1.mixer", "layers.0.mlp")
    mixer, attention, mlp = (stu.get_submodule(name) for name in names)
    layers = (mixer, lds.get_submodule("layers.0.mixer"), attention, mlp)
    return dict(zip(LAYERS, layers, strict=True)), lambda x: stu.context(x, 0, None, None)


def compare(
    length: int, args: Namespace, device: torch.device, dtype: torch.dtype, layers: dict, context: Callable
) -> list[dict]:
    """One row of raw figures for each layer at one length."""
    x = torch.randn(args.batch, length, args.width, device=device).to(dtype).requires_grad_()
    shared = context(x)

    def call(name: str) -> tuple[float, float]:
        layer = layers[name]

        def run(x: torch.Tensor, *_: object) -> torch.Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return layer(x) if name == "MLP" else layer(x, shared)

        return forward_and_backward(run, (x, *layer.parameters()))

    failed: dict[str, str] = {}
    taken = take_turns({name: lambda name=name: call(name) for name in layers}, args.repeats, args.seconds, failed)
    rows = [
        {"layer": name, "length": length, "forward": [f for f, _ in samples], "total": [t for _, t in samples]}
        for name, samples in taken.items()
    ]
    return rows + [{"layer": name, "length": length, "failed": reason} for name, reason in failed.items()]


def render(results: dict) -> str:
    """One table of all lengths and layers."""
    rows = []
    for row in results["rows"]:
        cells = failure_cells(row, 3) if "failed" in row else [spread(row["forward"]), spread(row["total"])]
        if "failed" not in row:
            cells.append(f"{results['batch'] * row['length'] / statistics.median(row['total']):,.0f}")
        rows.append([f"{row['length']:,}: {row['layer']}", *cells])
    shape = f"Batch {results['batch']}, width {results['width']}, {results['dtype']}."
    return page(results, shape, table(["length: layer", "forward, ms", "forward + backward, ms", "tokens/s"], rows))


def plot(results: dict, path: Path) -> None:
    title = f"batch {results['batch']}, width {results['width']}, {results['dtype']}"
    against_length([row for row in results["rows"] if "failed" not in row], "layer", path, title)


def main() -> None:
    device = default_device()
    cuda = device.type == "cuda"
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--lengths",
        type=integer(1, LARGEST_LENGTH),
        nargs="+",
        default=[2048, 8192, 32768] if cuda else [1024, 4096, 16384],
    )
    parser.add_argument("--width", type=integer(16, 2**17), default=1024 if cuda else 256, help="divisible by 16")
    parser.add_argument("--batch", type=integer(1, 2**16), default=4 if cuda else 1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--repeats", type=integer(1, 10000), default=7)
    parser.add_argument("--seconds", type=SECONDS, default=10, help="a layer that took so long is not repeated")
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write layers-DTYPE.json and .png there")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    results = {"environment": environment(device), "dtype": args.dtype, "batch": args.batch, "width": args.width}
    results["rows"] = []
    layers, context = build(args, device)
    for length in args.lengths:
        print(f"{length:,} tokens", flush=True)
        results["rows"] += compare(length, args, device, dtype, layers, context)
        save(f"layers-{args.dtype}", results, args.output)
    finish(f"layers-{args.dtype}", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
