"""What a run says: metrics.jsonl, wandb beside it, a progress bar on a terminal or plain lines elsewhere."""

import json
import math
import os
import resource
import shutil
import sys
from pathlib import Path
from types import TracebackType

import torch

from flash_stu import files
from flash_stu.progress import Progress
from flash_stu.training.config import RunConfig
from flash_stu.training.tracking import start_wandb

# What differs between two equal runs; all else is the same to the last bit on a CPU.
MEASURED = ("tokens_per_second", "mfu", "memory_gib", "data_wait", "time")
_LARGEST = 1 << 63  # integers from here on are no values of ours, and too large for a float or a plot


class Metrics:
    """The log of one process's stretch of a run; a context manager. Only the main process's says anything.

    metrics.jsonl has one line per optimizer step,

        step
        loss                nats per token; null where it was not finite
        learning_rate
        grad_norm           before clipping
        skipped             steps of the run so far that were left out because loss or gradient was not finite
        tokens_per_second   of all processes
        mfu                 model FLOPs (flash_stu.training.flops) over the GPUs' peak; null where that is not known
        memory_gib          the most this process has held: of GPU memory, or resident on the CPU
        data_wait           seconds this process waited for its batch
        time                seconds of training so far

    one per validation, {"step", "validation_loss" (nats per token), "validation_bits_per_byte"}, and one per loss
    spike, {"step", "loss_spike" (the loss), "usual_loss" (the mean of the 100 before)}. Where tasks are run during
    training, {"step", "evaluation/<task>/<metric>", ...}.
    """

    def __init__(self, config: RunConfig, folder: Path, steps: int, start: int, run_id: str, enabled: bool) -> None:
        """Prepare; nothing is written yet.

        Args:
            config: the run's.
            folder: the run directory.
            steps: length of the run.
            start: steps done before; later lines, of steps that are trained again, are dropped.
            run_id: wandb's name for the run, the same after a restart.
            enabled: whether this is the main process.
        """
        self.config, self.path, self.start, self.run_id = config, folder / "metrics.jsonl", start, run_id
        self.steps, self.every, self.enabled = steps, config.train.log_every, enabled
        self.progress = Progress("training", "step", unit_scale=False, enabled=enabled, line_every=math.inf)
        self.file = self.wandb = None
        self.failure: OSError | None = None  # of the first line that could not be written; all later ones are dropped

    def open(self) -> None:
        """Open the log on the main process.

        Raises:
            UserError: if it cannot be written, or wandb does not start.
        """
        keep_lines_up_to(self.path, self.start)
        with files.writing(self.path):
            self.file = self.path.open("ab", buffering=0)
        self.wandb = start_wandb(self.config, self.path.parent, self.run_id)
        self.progress.start(self.steps, self.start)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file is not None:
            self.file.close()
        self.progress.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(kind is not None))

    def train(self, step: int, values: dict[str, float]) -> None:
        """Log one optimizer step."""
        if not self.enabled:
            return
        self._write({"step": step, **values})
        rate = values["tokens_per_second"]
        self.progress.update(1, f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s{_percent(values['mfu'])}")
        if self.progress.bar is None and (step % self.every == 0 or step in (1, self.steps)):
            print(
                f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {values['loss']:.4f}  "
                f"learning rate {values['learning_rate']:.2e}  gradient norm {values['grad_norm']:.2f}  "
                f"{rate:,.0f} tokens/s{_percent(values['mfu'])}",
                flush=True,
            )

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Log one validation."""
        if self.enabled:
            self._write({"step": step, "validation_loss": loss, "validation_bits_per_byte": bits_per_byte})
            self.say(f"step {step}: validation loss {loss:.4f} nats per token, {bits_per_byte:.4f} bits per byte")

    def tasks(self, step: int, scores: dict[str, float]) -> None:
        """Log what tasks of the harness gave, {"evaluation/<task>/<metric>": value}."""
        if self.enabled:
            self._write({"step": step, **scores})
            listed = ", ".join(f"{name.removeprefix('evaluation/')} {value:.4f}" for name, value in scores.items())
            self.say(f"step {step}: {listed}")

    def loss_spike(self, step: int, loss: float, usual: float) -> None:
        """Log a loss that stands out."""
        if self.enabled:
            self._write({"step": step, "loss_spike": loss, "usual_loss": usual})
            self.say(f"step {step}: loss spike, {loss:.4f} where {usual:.4f} is usual")

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.enabled:
            self.progress.say(text)

    def sync(self) -> None:
        """Put all lines of the main process on disk: before a checkpoint, since a resumed run relies on them.

        Raises:
            UserError: if one could not be written.
        """
        with files.writing(self.path):
            if self.failure:
                raise self.failure
            os.fsync(self.file.fileno())

    def _write(self, record: dict[str, float]) -> None:
        # JSON has no NaN
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}
        if self.failure is None:
            try:
                line = (json.dumps(finite) + "\n").encode()
                while line:
                    line = line[self.file.write(line) :]
            except OSError as error:
                self.failure = error
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in record.items() if k != "step" and v is not None}, step=record["step"])


def peak_memory(device: torch.device) -> float:
    """GiB of memory this process has held at most: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _percent(mfu: float | None) -> str:
    return "" if mfu is None else f", MFU {mfu:.1%}"


def read_metrics(path: Path) -> list[dict[str, int | float | None]]:
    """Returns the records of a metrics.jsonl, each with its step; lines that hold none are left out.

    There are none if there is no file.
    """
    return files.read_records(path, _is_record)[0]


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the records of later steps from a metrics.jsonl; of all, if step is 0.

    A last line that was cut short is dropped. With any other unreadable line the file is kept as metrics.jsonl.damaged,
    and a line says so.

    Raises:
        UserError: if that is not possible.
    """
    with files.writing(path):
        records, unreadable = files.read_records(path, _is_record)
        if unreadable:
            lines = path.read_bytes().split(b"\n")
            if unreadable != [len(lines)]:
                copy = files.damaged_name(path)
                with files.replacing_file(copy) as temporary:
                    shutil.copyfile(path, temporary)
                print(f"{path}: {len(unreadable)} lines cannot be read; the file as it was is {copy.name}", flush=True)
        kept = [json.dumps(record) + "\n" for record in records if 0 < step >= record["step"]]
        files.write_text(path, "".join(kept))


def _is_record(record: dict) -> bool:
    """Whether something is a record of metrics.jsonl: a step, and numbers or null."""
    step = record.get("step")
    return type(step) is int and 0 <= step < _LARGEST and all(map(_is_value, record.values()))


def _is_value(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return (
        value is None
        or (isinstance(value, int) and abs(value) < _LARGEST)
        or (isinstance(value, float) and math.isfinite(value))
    )
