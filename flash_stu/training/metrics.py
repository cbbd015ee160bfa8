"""What a run says: metrics.jsonl, wandb beside it, a progress bar on a terminal or plain lines elsewhere."""

import json
import math
import os
import resource
import sys
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from flash_stu.training.config import RunConfig
from flash_stu.training.tracking import start_wandb

# What differs between two equal runs; all else is the same to the last bit on a CPU.
MEASURED = ("tokens_per_second", "mfu", "memory_gib", "data_wait", "time")


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
        """Open the log.

        Args:
            config: the run's.
            folder: the run directory.
            steps: length of the run.
            start: steps done before; later lines, of steps that are trained again, are dropped.
            run_id: wandb's name for the run, the same after a restart.
            enabled: whether this is the main process.
        """
        self.steps, self.every, self.enabled = steps, config.train.log_every, enabled
        self.file = self.bar = self.wandb = None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        keep_lines_up_to(path, start)
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.wandb = start_wandb(config, folder, run_id)
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=steps, initial=start, unit="step", desc="training", dynamic_ncols=True, smoothing=0.05
            )

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.enabled:
            return
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(kind is not None))

    def train(self, step: int, values: dict[str, float]) -> None:
        """Log one optimizer step."""
        if not self.enabled:
            return
        self._write({"step": step, **values})
        rate = values["tokens_per_second"]
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s{_percent(values['mfu'])}", refresh=False
            )
            self.bar.update()
        elif step % self.every == 0 or step in (1, self.steps):
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
            tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def sync(self) -> None:
        """Put all lines on disk: before a checkpoint, since a resumed run relies on them."""
        if self.enabled:
            os.fsync(self.file.fileno())

    def _write(self, record: dict[str, float]) -> None:
        # JSON has no NaN
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}
        self.file.write(json.dumps(finite) + "\n")
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


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, without a last line that was cut short; none if there is no file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the records of later steps from a metrics.jsonl; of all, if step is 0."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if 0 < step >= record["step"]]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
