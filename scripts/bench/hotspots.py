"""Where a training step's time goes: the ten operations that take most of it.

    python scripts/bench/hotspots.py [--config configs/quickstart.yaml] [--output results/cpu] [section.key=value ...]

One optimizer step of a run config, its micro batches forward and backward, clipping and optimizer, on random tokens,
under torch.profiler. An operation's time is its own, without those it calls; what custom operations call inside is
listed under its own name. Runs on a GPU if there is one.
"""

from pathlib import Path

import torch
from measuring import environment, finish, page, table
from plots import bars
from torch.profiler import ProfilerActivity, profile

from flash_stu import FlashSTUForCausalLM
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.loading import default_device
from flash_stu.training import load_config
from flash_stu.training.optimizer import build_optimizers

TOP = 10


def hotspots(path: str, overrides: list[str], device: torch.device, steps: int) -> dict:
    """Milliseconds a step of the operations that take longest, and of all."""
    config = load_config(path, overrides)
    torch.manual_seed(0)
    model = FlashSTUForCausalLM(config.architecture()).to(device).train()
    optimizers = build_optimizers(model, config.optimizer)
    batch, length = config.train.micro_batch_size, config.train.sequence_length
    micro_batches = config.sequences_per_step(1) // batch
    tokens = torch.randint(0, config.model["vocab_size"], (micro_batches, batch, length + 1), device=device)
    dtype = getattr(torch, config.train.dtype)

    def step() -> None:
        for windows in tokens:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = model(input_ids=windows[:, :-1], shift_labels=windows[:, 1:], skip_logits=True)
            (output.loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm or torch.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(2):
        step()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))
    milliseconds = {event.key: getattr(event, own) / 1000 / steps for event in events}
    calls = {event.key: event.count / steps for event in events}
    total = sum(milliseconds.values())
    rows = [{"operation": key, "ms": ms, "calls": calls[key]} for key, ms in list(milliseconds.items())[:TOP]]
    shape = {"config": path, "dtype": config.train.dtype, "tokens": micro_batches * batch * length}
    return shape | {"milliseconds": total, "rows": rows}


def render(results: dict) -> str:
    """A table of the operations that take longest."""
    whole = results["milliseconds"]
    rows = [[f"`{row['operation']}`", f"{row['calls']:,.0f}", f"{row['ms']:,.1f}", f"{row['ms'] / whole:.1%}"]
            for row in results["rows"]]  # fmt: skip
    step = (
        f"A step of {results['config']}, {results['dtype']}, is {results['tokens']:,} tokens; it took {whole:,.0f} ms."
    )
    return page(results, step, table(["operation", "calls", "ms", "share"], rows))


def plot(results: dict, path: Path) -> None:
    bars({"ms of a step": {row["operation"]: [row["ms"]] for row in results["rows"]}}, path)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", metavar="DIR", help="write hotspots.json and .png there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    device = default_device()
    results = {"environment": environment(device), **hotspots(args.config, args.overrides, device, args.steps)}
    finish("hotspots", results, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
