"""The directory of a run: its files, whether it is finished, and what may change between two starts.

- config.yaml: the resolved config
- metrics.jsonl: one record per step and per validation, see flash_stu.training.metrics
- checkpoints/step-N/: see flash_stu.training.checkpoint_folder
- final/: the trained model, a transformers directory
- .lock: held by the main process as long as it trains
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flash_stu import files, reading
from flash_stu.arguments import why_not_writable
from flash_stu.errors import UserError, reason
from flash_stu.locks import holding
from flash_stu.training.metrics import read_metrics
from flash_stu.training.model_source import export_checkpoint
from flash_stu.training.run_config import RunConfig, changed_keys, load_config

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
    "train.sequence_chunks",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.max_skipped_steps",
    "train.log_every",
    "train.validation_every",
    "optimizer.fused",
}
_FREE_SECTIONS = ("evaluation.", "parallel.", "wandb.")
_FINAL_LABEL = "the run's model directory"


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
        """Compare the directory with the config; nothing is written.

        Raises:
            UserError: if it is not empty and holds no run, or holds a run with other settings, which are named.
        """
        if problem := why_not_writable(self.path):
            raise UserError(f"output_dir {self.path} cannot be written: {problem}")
        if not self.config_file.is_file():
            if self.path.exists() and (not self.path.is_dir() or not files.is_empty(self.path)):
                raise UserError(f"output_dir {self.path} exists and is not a run directory; choose another")
            return
        try:
            before = load_config(self.config_file)
        except ValueError as error:
            raise UserError(
                f"output_dir {self.path} holds a run whose config.yaml is damaged or of another version: "
                f"{reason(error)}"
            ) from None
        free = (*_FREE, "train.steps", "train.epochs") if self.config.optimizer.schedule == "constant" else _FREE
        changed = [key for key in changed_keys(before, self.config) if key not in free]
        fixed = ", ".join(key for key in changed if not key.startswith(_FREE_SECTIONS))
        if fixed:
            raise UserError(
                f"output_dir {self.path} holds a run with other settings ({fixed}); "
                f"choose another output_dir, or remove it"
            )

    def is_finished(self, steps: int) -> bool:
        """Returns whether the run's last step was trained, and the model exported and intact."""
        records = read_metrics(self.metrics_file)
        if not records or records[-1]["step"] < steps:
            return False
        try:
            files.verify(self.final)
        except (OSError, reading.DamagedError):
            return False
        return True

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold the directory for one start of the run, and write the resolved config into it.

        What this start has made is removed again if the block fails before the first step.

        Raises:
            UserError: if another process holds it, final/ was not created by this program, it cannot be written, or as
                `check`.
        """
        is_new = files.is_empty(self.path)
        with holding(self.path, "output_dir"):
            try:
                self.check()
                files.check_output(self.final, "model", _FINAL_LABEL)  # not after days of training
                files.sweep_directory(self.path)
                files.write_text(self.config_file, self.config.to_yaml())
                yield
            except BaseException:
                if is_new and not any(record["step"] for record in read_metrics(self.metrics_file)):
                    self._remove()
                raise

    def _remove(self) -> None:
        """Remove what a start writes before the first step."""
        shutil.rmtree(self.path / "wandb", ignore_errors=True)
        with suppress(OSError):
            self.config_file.unlink(missing_ok=True)
            self.metrics_file.unlink(missing_ok=True)
            self.checkpoints.rmdir()

    def export(self, checkpoint: Path) -> None:
        """Write the model of a checkpoint to final/.

        Raises:
            UserError: see export_checkpoint.
        """
        export_checkpoint(checkpoint, self.final, _FINAL_LABEL)
