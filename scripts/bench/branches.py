"""Shared against separate STU branches at equal steps, in the hybrid and in an STU-only model.

    python scripts/bench/branches.py [--steps 400] [--output runs/branches]

A shared-branch STU sees even lags only (flash_stu/layers/stu.py): this trains the four models of that question on the
embedded corpus, with the quickstart's settings and data order, and prints their losses.
"""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from flash_stu.errors import ArgumentParser, UserError, run_cli

CONFIG = "configs/quickstart.yaml"


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", default="runs/branches")
    args = parser.parse_args()
    layers = yaml.safe_load(Path(CONFIG).read_text())["model"]["num_hidden_layers"]
    kinds = {"hybrid": ["linear_attention", "sliding_attention"], "STU only": ["linear_attention"]}

    rows = []
    for kind, pattern in kinds.items():
        for branches in ("shared", "separate"):
            run = Path(args.output) / f"{kind.replace(' ', '-').lower()}-{branches}"
            layer_types = [pattern[i % len(pattern)] for i in range(layers)]
            train(run, args.steps, branches, layer_types)
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            validation = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
            training = [r["loss"] for r in records if "loss" in r]
            rows.append((kind, branches, validation, sum(training[-20:]) / len(training[-20:])))

    print(f"\nafter {args.steps} steps on the embedded corpus, nats per byte")
    print("| model    | branches | validation loss | training loss, last 20 steps |")
    print("|----------|----------|----------------:|-----------------------------:|")
    for kind, branches, validation, training in rows:
        print(f"| {kind:8} | {branches:8} | {validation:15.4f} | {training:28.4f} |")


def train(run: Path, steps: int, branches: str, layer_types: list[str]) -> None:
    """Train one variant with train.py; a finished one is not trained again."""
    overrides = {
        "output_dir": str(run),
        "train.steps": steps,
        "model.stu_branches": branches,
        "model.layer_types": json.dumps(layer_types),
    }
    print(f"\n{run}", flush=True)
    command = [sys.executable, "train.py", "--config", CONFIG, *(f"{k}={v}" for k, v in overrides.items())]
    if subprocess.run(command).returncode:
        raise UserError(f"training {run} failed; see above")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
