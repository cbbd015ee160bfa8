"""One of several trainings that a script compares: a config with settings of its own, and the losses it comes to."""

import math
import statistics
from pathlib import Path

from flash_stu.errors import UserError
from flash_stu.training.metrics import read_metrics
from flash_stu.training.parallel import join_world
from flash_stu.training.run_config import load_config
from flash_stu.training.trainer import Trainer

STRETCH = 20  # steps that a point of the loss curve is the mean of


def run_trial(config: str, run: Path, steps: int, settings: list[str]) -> dict:
    """Train, without wandb; a run that is finished is not trained again, one that was stopped resumes.

    Args:
        config: a YAML file.
        run: the run directory.
        steps: how many, validated and saved at the end.
        settings: that replace the config's, section.key=value.

    Returns:
        validation: the loss in nats per byte. curve: of the training loss in nats per token, [step, mean of the
        `STRETCH` steps up to it]. tokens: trained on. seconds: of the steps alone.

    Raises:
        UserError: if the settings do not fit each other, or a signal stopped the run.
    """
    every = [f"train.{key}={steps}" for key in ("steps", "validation_every", "checkpoint_every")]
    loaded = load_config(config, [f"output_dir={run}", "wandb.mode=disabled", *every, *settings])
    with join_world(loaded) as world:
        if not Trainer(loaded, world).fit():
            raise UserError(f"the training of {run} was stopped; the same command continues")
    records = read_metrics(run / "metrics.jsonl")
    losses = [record["loss"] or math.nan for record in records if "loss" in record]
    ends = range(len(losses), 0, -STRETCH)
    batch = loaded.train.global_batch_size
    bits = [record["validation_bits_per_byte"] for record in records if "validation_bits_per_byte" in record]
    return {
        "validation": bits[-1] * math.log(2),
        "curve": [[end, statistics.mean(losses[max(0, end - STRETCH) : end])] for end in reversed(ends)],
        "tokens": steps * batch,
        "seconds": sum(batch / record["tokens_per_second"] for record in records if "tokens_per_second" in record),
    }
