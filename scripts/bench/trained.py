"""Trainings that benchmarks compare: the quickstart's config with a few things changed, on the embedded corpus."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from flash_stu.errors import UserError
from flash_stu.training.metrics import read_metrics

CONFIG = "configs/quickstart.yaml"
STRETCH = 20  # steps that a point of the loss curve is the mean of


def train(run: Path, steps: int, changes: dict) -> dict:
    """Train with train.py; a run that is finished is not trained again, one that was stopped goes on.

    Args:
        run: its directory.
        steps: how many, validated at the end.
        changes: of the config, section.key: value.

    Returns:
        the validation loss and the curve of the training loss, [step, mean of the steps up to it], in nats per byte.

    Raises:
        UserError: if the training fails.
    """
    every = {f"train.{key}": steps for key in ("steps", "validation_every", "checkpoint_every")}
    changes = {"output_dir": run, "wandb.mode": "disabled"} | every | changes
    words = [f"{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in changes.items()]
    print(f"\n{run}", flush=True)
    if subprocess.run([sys.executable, "train.py", "--config", CONFIG, *words]).returncode:
        raise UserError(f"training {run} failed; see above")
    records = list(read_metrics(run / "metrics.jsonl"))
    losses = [record["loss"] or math.nan for record in records if "loss" in record]
    ends = range(len(losses), 0, -STRETCH)
    return {
        "validation": [record["validation_loss"] for record in records if "validation_loss" in record][-1],
        "curve": [[end, statistics.mean(losses[max(0, end - STRETCH) : end])] for end in reversed(ends)],
    }
