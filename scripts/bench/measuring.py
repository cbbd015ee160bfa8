"""Functions that the benchmarks share: taking turns on a clock, the device's rates, tables, and results as JSON.

A benchmark is a script with three things: `main` measures and has an option --output DIR, `render` makes Markdown of
the results, `plot` a picture. Results are a dictionary with an "environment" and whatever else JSON keeps as it is, so
that tables.py renders the file as the script rendered what it had measured.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from flash_stu.files import write_text
from flash_stu.ops.backends import why_not


def environment(device: torch.device) -> dict:
    """Where figures come from: versions, device, threads."""
    cuda = device.type == "cuda"
    packages = [name for name in ("triton", "flashfftconv", "flash_attn", "liger") if why_not(name) is None]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "packages": packages,
    }


def describe(environment: dict) -> str:
    """One line of it."""
    threads = f"{environment['threads']} threads" if environment["threads"] > 1 else "1 thread"
    versions = [f"torch {environment['torch']}", f"Python {environment['python']}", *environment["packages"]]
    return ", ".join([*versions, environment["device"], threads])


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU ({capability})"


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def forward_and_backward(function: Callable, inputs: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Seconds of function(*inputs), and of that with the gradients of those inputs that want one."""
    device = inputs[0].device
    _wait(device)
    start = time.perf_counter()
    y = function(*inputs)
    _wait(device)
    forward = time.perf_counter() - start
    torch.autograd.grad(y, [t for t in inputs if t.requires_grad], torch.ones_like(y))
    _wait(device)
    return forward, time.perf_counter() - start


def take_turns(functions: Mapping[str, Callable[[], object]], repeats: int, limit: float) -> dict[str, list]:
    """Results of calling every function `repeats` times in turn, so that a drifting machine hits all alike.

    A first round warms up. One that has taken `limit` seconds in three calls or more is not called again.
    """
    results: dict[str, list] = {name: [] for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    for turn in range(repeats + 1):
        for name, function in functions.items():
            if spent[name] > limit and len(results[name]) >= 3:
                continue
            start = time.perf_counter()
            result = function()
            if turn:
                spent[name] += time.perf_counter() - start
                results[name].append(result)
    return results


def device_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product in `dtype` and bytes/s of a large copy, the best of several."""
    side, count = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: factors[0] @ factors[1], "copy": lambda: target.copy_(source)}
    taken = take_turns({name: lambda f=f: seconds(f, device) for name, f in calls.items()}, 9, 5.0)
    return {"flops": 2 * side**3 / min(taken["product"]), "bytes": 2 * count / min(taken["copy"])}


def spread(samples: list[float], scale: float = 1000) -> str:
    """Median (least-greatest) of the samples times `scale`: milliseconds, if those are seconds."""
    low, middle, high = (scale * value for value in (min(samples), statistics.median(samples), max(samples)))
    digits = 2 if middle < 1 else 1 if middle < 100 else 0
    if len(samples) == 1:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right; empty columns are left out."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in [header, *rows]
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def page(results: dict, *parts: str) -> str:
    """Returns a page as every `render` does: where the figures come from, then its parts."""
    return "\n\n".join([describe(results["environment"]), *filter(None, parts)])


def finish(name: str, results: dict, render: Callable, plot: Callable, output: str | None) -> None:
    """The end of every benchmark: print its tables; with an output folder, leave NAME.json and NAME.png there."""
    print("\n" + render(results), flush=True)
    if output is None:
        return
    path = Path(output) / f"{name}.json"
    write_text(path, as_json(results))
    plot(results, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png').name}")


def as_json(results: dict) -> str:
    """Results as JSON, of lists a line per item."""
    entries = []
    for key, value in results.items():
        shown = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            shown = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        entries.append(f" {json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
