"""The directory of a run: whose it is, whether it is finished, and what may change between two starts.

- config.yaml: the resolved config
- metrics.jsonl: one record per step and per validation
- checkpoints/step-N/: see flash_stu.training.checkpoint
- final/: the trained model, a transformers directory
"""

import os
from pathlib import Path

from flash_stu.arguments import why_not_writable
from flash_stu.errors import UserError
from flash_stu.training.config import RunConfig, changed_keys, load_config
from flash_stu.training.metrics import read_metrics

# Settings that do not change what is computed, up to rounding; a run may be continued with others.
_FREE = {
    "output_dir",
    "model.attention_backend",
    "model.conv_backend",
    "model.decode_backend",
    "model.loss_backend",
    "model.lds_state_dtype",
    "data.cache_dir",
    "train.micro_batch_size",
    "train.compile",
    "train.activation_checkpointing",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.max_skipped_steps",
    "train.log_every",
    "train.validation_every",
    "optimizer.fused",
}
_FREE_SECTIONS = ("evaluation.", "parallel.", "wandb.")


class RunDirectory:
    """Paths of a run, and the check that the directory is this run's.

    Continuing needs the same config, but for settings that change nothing but speed and bookkeeping. The
    length may change too where the schedule is "constant", since only then are the steps done those of the
    new length.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.output_dir)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"

    def check(self) -> None:
        """Refuse a directory that is something else's.

        Raises:
            UserError: if it is not empty and holds no run, or a run with other settings, which are named.
        """
        if problem := why_not_writable(self.path):
            raise UserError(f"output_dir {self.path} cannot be written: {problem}")
        if not self.config_file.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"output_dir {self.path} exists and is not a run directory; choose another")
            return
        try:
            before = load_config(self.config_file)
        except UserError as error:
            raise UserError(f"output_dir {self.path} holds a run of another version: {error}") from None
        free = _FREE | ({"train.steps", "train.epochs"} if self.config.optimizer.schedule == "constant" else set())
        changed = [
            key for key in changed_keys(before, self.config) if key not in free and not key.startswith(_FREE_SECTIONS)
        ]
        if changed:
            raise UserError(
                f"output_dir {self.path} holds a run with other settings ({', '.join(changed)}); "
                f"choose another output_dir, or remove it"
            )

    def is_finished(self, steps: int) -> bool:
        """Whether the run's last step was trained and the model exported."""
        records = read_metrics(self.metrics_file)
        return self.final.is_dir() and bool(records) and records[-1]["step"] >= steps

    def create(self) -> None:
        """Make the directory and write the resolved config into it.

        Raises:
            UserError: if that is not possible.
        """
        temporary = self.path / ".config.yaml.tmp"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.config.to_yaml(), encoding="utf-8")
            os.replace(temporary, self.config_file)
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be written: {error.strerror or error}") from error
