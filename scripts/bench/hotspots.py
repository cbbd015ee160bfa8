"""Where a training step's time goes: the ten operations that take most of it.

    python scripts/bench/hotspots.py [--config configs/quickstart.yaml] [--output results/cpu] [section.key=value ...]

One optimizer step of a run config, its micro batches forward and backward, clipping and optimizer, on random tokens,
under torch.profiler. An operation's time is its own, without those it calls; what custom operations call inside is
listed under its own name. Runs on a GPU if there is one.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from plots import bars
from torch.profiler import ProfilerActivity, profile
from training import WARM_UP, Bench

from flash_stu.arguments import input_file, integer, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.results import environment, finish, page, table
from flash_stu.training import join_world, load_config

TOP = 10


def hotspots(path: str, overrides: list[str], device: torch.device, steps: int) -> dict:
    """Milliseconds a step of the operations that take longest, and of all."""
    config = load_config(path, [*overrides, "parallel.strategy=none"])
    with join_world(config) as world:
        bench = Bench(config, world, steps)
        model, optimizers = bench.build("as configured", {})
        for _ in range(WARM_UP):
            bench.step(model, optimizers)
        events = profiled(lambda: bench.step(model, optimizers), steps, device)
    shape = {"config": path, "dtype": config.train.dtype, "tokens": bench.tokens[:, 1:].numel()}
    return shape | {"milliseconds": sum(event["ms"] for event in events), "rows": events[:TOP]}


def profiled(function: Callable[[], None], times: int, device: torch.device) -> list[dict]:
    """Every operation's own time and its calls in one call of a function, the longest first."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(times):
            function()
        if cuda:
            torch.cuda.synchronize()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))
    return [
        {"operation": event.key, "ms": getattr(event, own) / 1000 / times, "calls": event.count / times}
        for event in events
    ]


def render(results: dict) -> str:
    """A table of the operations that take longest."""
    whole = results["milliseconds"]
    rows = [
        [f"`{row['operation']}`", f"{row['calls']:,.0f}", f"{row['ms']:,.1f}", f"{row['ms'] / whole:.1%}"]
        for row in results["rows"]
    ]
    step = (
        f"A step of {results['config']}, {results['dtype']}, is {results['tokens']:,} tokens; it took {whole:,.0f} ms."
    )
    return page(results, step, table(["operation", "calls", "ms", "share"], rows))


def plot(results: dict, path: Path) -> None:
    bars({"ms of a step": {row["operation"]: [row["ms"]] for row in results["rows"]}}, path)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--config", type=input_file, default="configs/quickstart.yaml")
    parser.add_argument("--steps", type=integer(1, 10000), default=5)
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write hotspots.json and .png there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    device = default_device()
    results = {"environment": environment(device), **hotspots(args.config, args.overrides, device, args.steps)}
    finish("hotspots", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
