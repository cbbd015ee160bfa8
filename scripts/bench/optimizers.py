"""AdamW against Muon at equal steps on the embedded corpus, each at its best learning rate of a few.

    python scripts/bench/optimizers.py [--steps 400] [--sweep-steps 150] [--rates 1e-3 3e-3 1e-2 3e-2]

The quickstart's model, settings and data order; only the optimizer and its peak learning rate differ. Both sweep the
same rates in short runs, then train the full number of steps at the best one; the speed shown is those last runs'.
"""

import statistics
import subprocess
import sys
from pathlib import Path

from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.training.metrics import read_metrics

CONFIG = "configs/quickstart.yaml"
OPTIMIZERS = ("adamw", "muon")


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sweep-steps", type=int, default=150)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2], help="peak learning rates")
    parser.add_argument("--output", default="runs/optimizers")
    args = parser.parse_args()

    sweep = {
        name: {rate: train(args.output, name, rate, args.sweep_steps)[0] for rate in args.rates} for name in OPTIMIZERS
    }
    best = {name: min(losses, key=losses.get) for name, losses in sweep.items()}
    final = {name: train(args.output, name, best[name], args.steps) for name in OPTIMIZERS}

    print("\nvalidation loss on the embedded corpus, nats per byte\n")
    columns = [f"{rate:g}, {args.sweep_steps} steps" for rate in args.rates]
    columns += ["best rate", f"{args.steps} steps at it", "tokens/s"]
    print("| optimizer | " + " | ".join(columns) + " |")
    print("|-----------|" + "|".join("-" * (len(column) + 1) + ":" for column in columns) + "|")
    for name in OPTIMIZERS:
        loss, speed = final[name]
        cells = [*(f"{loss:.4f}" for loss in sweep[name].values()), f"{best[name]:g}", f"{loss:.4f}", f"{speed:.0f}"]
        row = " | ".join(f"{cell:>{len(column)}}" for cell, column in zip(cells, columns, strict=True))
        print(f"| {name:9} | {row} |")


def train(output: str, name: str, rate: float, steps: int) -> tuple[float, float]:
    """Train with train.py; a finished run is not trained again.

    Returns:
        the last validation loss, and the median of the steps' tokens per second.
    """
    run = Path(output) / f"{name}-{rate:g}-{steps}"
    overrides = {
        "output_dir": run,
        "train.steps": steps,
        "train.checkpoint_every": steps,
        "train.validation_every": steps,
        "optimizer.name": name,
        "optimizer.learning_rate": rate,
        "wandb.mode": "disabled",
    }
    print(f"\n{run}", flush=True)
    command = [sys.executable, "train.py", "--config", CONFIG, *(f"{k}={v}" for k, v in overrides.items())]
    if subprocess.run(command).returncode:
        raise UserError(f"training {run} failed; see above")
    records = list(read_metrics(run / "metrics.jsonl"))
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    return losses[-1], statistics.median(r["tokens_per_second"] for r in records if "tokens_per_second" in r)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
