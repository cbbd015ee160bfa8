"""Tokens per second of generation at given context lengths, batch 1, greedy.

    python scripts/bench/decode.py --model runs/quickstart/final --model runs/quickstart-lds --contexts 256 3840

The models take turns, so that a drifting machine hits all alike; the figure is the median over the repeats.
"""

import json
import platform
import statistics
import time
from pathlib import Path

import torch

from flash_stu import FlashSTUCache
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.loading import default_device, default_dtype, load_model


@torch.inference_mode()
def seconds_per_token(model, context: int, tokens: int) -> float:
    """Prefill `context` random tokens, then time `tokens` greedy steps; mean seconds of a step."""
    device = model.device
    ids = torch.randint(0, 256, (1, context), generator=torch.Generator().manual_seed(0)).to(device)
    cache = FlashSTUCache(model.config.num_hidden_layers)
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    start = time.perf_counter()
    for _ in range(tokens):
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / tokens


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="model directory or training run")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 3840])
    parser.add_argument("--tokens", type=int, default=128, help="steps timed after each context")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    device = default_device()
    models = {path: load_model(path, device, default_dtype(device)) for path in args.model}
    for path, model in models.items():
        longest = max(args.contexts) + args.tokens
        if model.config.uses_stu and longest > model.config.max_position_embeddings:
            raise UserError(
                f"{path}: --contexts and --tokens reach {longest}; "
                f"its filters end at {model.config.max_position_embeddings}"
            )

    rates: dict[str, dict[int, float]] = {path: {} for path in models}
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {device}, {torch.get_num_threads()} threads")
    print(f"tokens/s, median of {args.repeats} (min-max), {args.tokens} tokens after the context")
    for context in args.contexts:
        samples: dict[str, list[float]] = {path: [] for path in models}
        for repeat in range(args.repeats + 1):
            for path, model in models.items():
                seconds = seconds_per_token(model, context, args.tokens)
                if repeat:  # the first round warms up
                    samples[path].append(1 / seconds)
        for path, values in samples.items():
            rates[path][context] = statistics.median(values)
            print(f"{path}  context {context}: {rates[path][context]:.0f} ({min(values):.0f}-{max(values):.0f})")
    if args.json:
        Path(args.json).write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
