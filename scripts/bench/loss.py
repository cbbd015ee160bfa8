"""Time and memory of the head's loss, forward and backward: plain, in chunks, and by Triton kernels on a GPU.

    python scripts/bench/loss.py [--tokens 2048] [--chunked-tokens 512 8192] [--hidden 1024] [--vocabulary 200064]
        [--dtype bfloat16] [--output results/cpu]

Weights are float32; with --dtype bfloat16 the loss runs under autocast, as it does in training. Each measurement has a
process of its own; one that fails, out of memory for example, says so in its row. Numbers of tokens without the plain
loss are there for the memory: one call. Memory is the peak above the inputs, the weight and their gradients: of the
process on the CPU, of PyTorch's allocator on a GPU. Differences are the largest ones, relative to the largest entry of
the plain loss's gradient. The plain loss at 2,048 tokens of the default shape takes about 6 GiB.
"""

import json
import resource
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import seconds
from plots import bars
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from flash_stu.arguments import integer, output_directory, output_file
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.files import replacing_file
from flash_stu.model.config import LARGEST_LENGTH
from flash_stu.ops.cross_entropy import BACKENDS
from flash_stu.ops.cross_entropy.choice import linear_cross_entropy
from flash_stu.results import environment, failure_cells, finish, page, save, spread, table

ROWS = 8192  # of the weight's gradient compared at a time
OTHERS = [name for name in BACKENDS if name != "auto"]


def loss_of(variant: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss by a variant: "plain", or a back end of linear_cross_entropy."""
    if variant == "plain":
        return F.cross_entropy(F.linear(hidden, weight), labels)
    return linear_cross_entropy(hidden, weight, labels, backend=variant)


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has had so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux's rusage starts with what the process had that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(args: Namespace) -> dict:
    """Run one variant; seconds of each repeat, bytes above inputs, weight and gradients, and the loss."""
    device = default_device()
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(args.vocabulary, args.hidden)
    weight.normal_(std=args.hidden**-0.5, generator=generator)
    hidden = torch.empty(args.tokens, args.hidden).normal_(generator=generator)
    labels = torch.randint(0, args.vocabulary, (args.tokens,), generator=generator).to(device)
    hidden, weight = (tensor.to(device).requires_grad_() for tensor in (hidden, weight))
    before, taken, losses = peak_bytes(device), [], []

    def there_and_back() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of(args.variant, hidden, weight, labels)
        loss.backward()
        losses.append(loss.item())

    for turn in range(args.repeats + (device.type == "cuda")):  # there the first call loads and compiles kernels
        hidden.grad = weight.grad = None
        second = seconds(there_and_back, device)
        if turn or device.type != "cuda":
            taken.append(second)
    gradients = (hidden.numel() + weight.numel()) * weight.itemsize
    result = {"seconds": taken, "bytes": peak_bytes(device) - before - gradients, "loss": losses[-1]}
    if args.save:
        named = {"hidden": hidden, "weight": weight}
        with replacing_file(args.save) as temporary:
            save_file({name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}, temporary)
    return result


def in_a_process(args: Namespace, variant: str, tokens: int, repeats: int, save: Path | None = None) -> dict:
    """The same in a fresh process."""
    print(f"{variant}, {tokens:,} tokens", flush=True)
    options = {"variant": variant, "tokens": tokens, **{k: getattr(args, k) for k in ("hidden", "vocabulary", "dtype")}}
    command = [sys.executable, __file__, f"--repeats={repeats}"]
    command += [f"--{key}={value}" for key, value in (options | ({"save": save} if save else {})).items()]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"ended with status {run.returncode}"]
        return {"variant": variant, "tokens": tokens, "failed": lines[-1].removeprefix("error: ")[:160]}
    return {"variant": variant, "tokens": tokens, **json.loads(run.stdout.splitlines()[-1])}


def largest_difference(path: Path, reference: Path, name: str) -> float:
    """Of two saved gradients, relative to the reference's largest entry, a part of them at a time."""
    difference = largest = 0.0
    with safe_open(path, "pt") as ours, safe_open(reference, "pt") as theirs:
        ours, theirs = ours.get_slice(name), theirs.get_slice(name)
        for start in range(0, theirs.get_shape()[0], ROWS):
            part, exact = ours[start : start + ROWS], theirs[start : start + ROWS]
            difference = max(difference, (part - exact).abs().max().item())
            largest = max(largest, exact.abs().max().item())
    return difference / largest


def compare(args: Namespace, rows: list[dict]) -> Iterator[None]:
    """Add all variants at --tokens, with their differences from the plain loss; then the others at other numbers."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder, "plain")
        plain = in_a_process(args, "plain", args.tokens, args.repeats, reference)
        rows.append(plain)
        for variant in OTHERS:
            path = Path(folder, variant)
            row = in_a_process(args, variant, args.tokens, args.repeats, path)
            if "failed" not in row | plain:
                differences = [abs(row["loss"] - plain["loss"]) / abs(plain["loss"])]
                differences += [largest_difference(path, reference, name) for name in ("hidden", "weight")]
                row["differences"] = differences
            rows.append(row)
            path.unlink(missing_ok=True)
            yield
    for tokens in args.chunked_tokens:
        for variant in (row["variant"] for row in rows[1 : 1 + len(OTHERS)] if not _absent(row)):
            rows.append(in_a_process(args, variant, tokens, 1))
            yield


def _absent(row: dict) -> bool:
    return "is not available" in row.get("failed", "")


def render(results: dict) -> str:
    """One table of all variants."""
    dtype = results.get("dtype", "float32")
    shape = f"Width {results['hidden']:,}, vocabulary {results['vocabulary']:,}, {dtype}."
    header = [
        "loss",
        "tokens",
        "forward + backward, s",
        "memory, GiB",
        "loss, rel.",
        "d hidden, rel.",
        "d weight, rel.",
    ]
    rows = [
        [
            row["variant"],
            f"{row['tokens']:,}",
            *(failure_cells(row, 2) if "failed" in row else (spread(row["seconds"], 1), f"{row['bytes'] / 2**30:.2f}")),
            *(f"{difference:.1e}" for difference in row.get("differences", [])),
        ]
        for row in results["rows"]
    ]
    return page(results, shape, table(header, [row + [""] * (len(header) - len(row)) for row in rows]))


def plot(results: dict, path: Path) -> None:
    rows = [row for row in results["rows"] if "failed" not in row]
    labels = [f"{row['variant']}, {row['tokens']:,} tokens" for row in rows]
    taken = [row["seconds"] for row in rows]
    memory = [[row["bytes"] / 2**30] for row in rows]
    panels = {"forward + backward, s": taken, "memory, GiB": memory}
    bars({title: dict(zip(labels, samples, strict=True)) for title, samples in panels.items()}, path)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--tokens", type=integer(1, LARGEST_LENGTH), default=2048, help="where all are compared")
    parser.add_argument(
        "--chunked-tokens",
        type=integer(1, LARGEST_LENGTH),
        nargs="*",
        default=[512, 8192],
        help="without the plain loss",
    )
    parser.add_argument("--hidden", type=integer(1, 2**17), default=1024)
    parser.add_argument("--vocabulary", type=integer(2, 2**24), default=200064)
    parser.add_argument("--repeats", type=integer(1, 10000), default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--variant", choices=["plain", *OTHERS], help="measure one in this process")
    parser.add_argument("--save", type=output_file, help="with --variant: write its gradients to this file")
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write loss.json and .png there")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args)))
        return
    results = {"environment": environment(default_device()), "rows": []}
    results |= {"hidden": args.hidden, "vocabulary": args.vocabulary, "dtype": args.dtype}
    for _ in compare(args, results["rows"]):
        save("loss", results, args.output)
    finish("loss", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
