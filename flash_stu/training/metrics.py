"""Reports of a run: metrics.jsonl, wandb beside it, a progress bar on a terminal or plain lines elsewhere."""

import importlib.util
import json
import math
import os
import resource
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import requests
import torch

from flash_stu import files, reading
from flash_stu.errors import UserError, writing
from flash_stu.network import is_reachable
from flash_stu.progress import Progress
from flash_stu.training.run_config import RunConfig

if TYPE_CHECKING:
    import wandb

# Differ between two equal runs; all else is the same to the last bit on a CPU.
MEASURED = ("tokens_per_second", "mfu", "memory_gib", "data_wait", "time")
_LARGEST = 1 << 63  # integers from here on are no values of ours, and too large for a float or a plot
_SERVER = "https://api.wandb.ai"
_INIT_SECONDS = 60
_CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
_WINDOW = 100  # steps that say what a usual loss is
_FEWEST = 20
_SPIKE = 6.0  # standard deviations


@dataclass(frozen=True)
class StepRecord:
    """The line of one optimizer step in metrics.jsonl.

    Besides, there is one line per validation, {"step", "validation_loss" (nats per token),
    "validation_bits_per_byte"}, and one per loss spike, {"step", "loss_spike" (the loss), "usual_loss" (the mean of the
    100 before)}. Where tasks are run during training, {"step", "evaluation/<task>/<metric>", ...}.
    """

    step: int  # 1 for the first
    loss: float  # nats per token; null in the file where it was not finite
    learning_rate: float  # of this step
    grad_norm: float  # before clipping; null in the file where it was not finite
    skipped: int  # steps of the run so far that were left out because loss or gradient was not finite
    tokens_per_second: float  # of all processes
    mfu: float | None  # model FLOPs (flash_stu.training.flops) over the GPUs' peak; None where that is not known
    memory_gib: float  # the most this process has held: of GPU memory, or resident on the CPU
    data_wait: float  # seconds this process waited for its batch
    time: float  # seconds of training so far


class Metrics:
    """The log of a run, in its directory, written by the main process alone; a context manager."""

    def __init__(self, config: RunConfig, folder: Path, steps: int, enabled: bool) -> None:
        self.config, self.path = config, folder / "metrics.jsonl"
        self.steps, self.every, self.enabled = steps, config.train.log_every, enabled
        self.file: FileIO | None = None
        self.progress = Progress("training", "step", unit_scale=False, enabled=enabled, line_every=math.inf)
        self.wandb: wandb.Run | None = None
        self.spikes = SpikeDetector()
        self.failure: OSError | None = None  # of the first line that could not be written; all later ones are dropped

    def open(self, start: int, run_id: str) -> None:
        """Open the log on the main process; lines after step `start`, which are trained again, are dropped.

        Raises:
            UserError: if it cannot be written, or wandb, whose name for the run is run_id, does not start.
        """
        keep_lines_up_to(self.path, start)
        self.spikes = SpikeDetector(record["loss"] for record in read_metrics(self.path) if "loss" in record)
        with writing(self.path):
            self.file = self.path.open("ab", buffering=0)
        self.wandb = start_wandb(self.config, self.path.parent, run_id)
        self.progress.start(self.steps, start)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        self.progress.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(kind is not None))

    def log_step(self, record: StepRecord) -> None:
        """Log one optimizer step, and its loss again if it is a spike."""
        if not self.enabled:
            return
        self._write(**asdict(record))
        rate = f"{record.tokens_per_second:,.0f} tokens/s" + ("" if record.mfu is None else f", MFU {record.mfu:.1%}")
        self.progress.update(1, f"loss {record.loss:.3f}, {rate}")
        if self.progress.bar is None and (record.step % self.every == 0 or record.step in (1, self.steps)):
            print(
                f"step {record.step:>{len(str(self.steps))}}/{self.steps}  loss {record.loss:.4f}  "
                f"learning rate {record.learning_rate:.2e}  gradient norm {record.grad_norm:.2f}  {rate}",
                flush=True,
            )
        if usual := self.spikes.check(record.loss):
            self._write(record.step, loss_spike=record.loss, usual_loss=usual)
            self.progress.say(f"step {record.step}: loss spike, {record.loss:.4f} where {usual:.4f} is usual")

    def log_validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Log one validation."""
        if self.enabled:
            self._write(step, validation_loss=loss, validation_bits_per_byte=bits_per_byte)
            losses = f"{loss:.4f} nats per token, {bits_per_byte:.4f} bits per byte"
            self.progress.say(f"step {step}: validation loss {losses}")

    def log_tasks(self, step: int, scores: dict[str, float]) -> None:
        """Log the scores of tasks of the harness, {"evaluation/<task>/<metric>": value}."""
        if self.enabled:
            self._write(step, **scores)
            listed = ", ".join(f"{name.removeprefix('evaluation/')} {value:.4f}" for name, value in scores.items())
            self.progress.say(f"step {step}: {listed}")

    def sync(self) -> None:
        """Put all lines of the main process on disk: before a checkpoint, since a resumed run relies on them.

        Raises:
            UserError: if one could not be written.
        """
        with writing(self.path):
            if self.failure:
                raise self.failure
            if self.file is not None:
                os.fsync(self.file.fileno())

    def _write(self, step: int, **values: float | None) -> None:
        # JSON has no NaN
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        if self.file is not None and self.failure is None:
            try:
                line = (json.dumps({"step": step} | finite) + "\n").encode()
                while line:
                    line = line[self.file.write(line) :]
            except OSError as error:
                self.failure = error
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in values.items() if v is not None}, step=step)


class SpikeDetector:
    """Notices losses far above those of the last 100 steps: more than 6 standard deviations."""

    def __init__(self, losses: Iterable[float | None] = ()) -> None:
        self.recent = deque((loss for loss in losses if loss is not None), maxlen=_WINDOW)

    def check(self, loss: float) -> float | None:
        """Take in the next step's loss; returns the usual one, the mean of the last 100, if this one is a spike."""
        if not math.isfinite(loss):
            return None
        usual = None
        if len(self.recent) >= _FEWEST:
            mean = statistics.fmean(self.recent)
            if loss > mean + _SPIKE * statistics.pstdev(self.recent, mean):
                usual = mean
        self.recent.append(loss)
        return usual


def peak_memory(device: torch.device) -> float:
    """Returns the most memory this process has held, in GiB: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def check_wandb(mode: str) -> Literal["online", "offline", "disabled"]:
    """Returns the mode to use: "auto" is offline where wandb is installed, else disabled.

    Raises:
        UserError: if wandb is asked for by name and not installed, or "online" without a key or a network.
    """
    installed = importlib.util.find_spec("wandb") is not None
    if mode == "disabled" or (mode == "auto" and not installed):
        return "disabled"
    if not installed:
        raise UserError(f"wandb.mode is {mode!r}, but wandb is not installed (pip install wandb); or use 'disabled'")
    if mode != "online":
        return "offline"
    server = os.environ.get("WANDB_BASE_URL") or _SERVER
    if not any(os.environ.get(name) for name in _CREDENTIALS) and not requests.utils.get_netrc_auth(server):
        raise UserError(f"wandb.mode is 'online', but there is no key for {server}: wandb login, or use 'offline'")
    if not is_reachable(server):
        raise UserError(f"wandb.mode is 'online', but {server} cannot be reached; or use 'offline'")
    return "online"


def start_wandb(config: RunConfig, folder: Path, run_id: str) -> "wandb.Run | None":
    """Start a wandb run, whose files go to the run directory; returns None where it is disabled.

    Raises:
        UserError: if wandb refuses, for example a key.
    """
    mode = check_wandb(config.wandb.mode)
    if mode == "disabled":
        return None
    import wandb  # optional, and slow to import

    try:
        return wandb.init(
            mode=mode,
            project=config.wandb.project,
            name=config.wandb.name or folder.name,
            dir=str(folder),
            id=run_id,
            resume="allow" if mode == "online" else None,  # an offline run cannot be resumed; sync appends by id
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", init_timeout=_INIT_SECONDS),
        )
    except (wandb.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"wandb.mode is {mode!r}, but a run cannot be started: {reason}; or use 'disabled'") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl, each with its step, if there is one; other lines are left out."""
    return reading.read_records(path, _is_record)[0]


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the records of later steps from a metrics.jsonl; of all, if step is 0.

    A last line that was cut short is dropped. With any other unreadable line the file is kept as metrics.jsonl.damaged,
    and a line says so.

    Raises:
        UserError: if that is not possible.
    """
    with writing(path):
        records, unreadable = reading.read_records(path, _is_record)
        if unreadable and unreadable != [len(path.read_bytes().split(b"\n"))]:
            copy = files.damaged_name(path)
            with files.replacing_file(copy) as temporary:
                shutil.copyfile(path, temporary)
            print(f"{path}: {len(unreadable)} lines cannot be read; the file as it was is {copy.name}", flush=True)
        kept = [json.dumps(record) + "\n" for record in records if 0 < step >= record["step"]]
        files.write_text(path, "".join(kept))


def _is_record(record: dict[str, Any]) -> bool:
    """Returns whether something is a record of metrics.jsonl: a step, and numbers or null."""
    step = record.get("step")
    return type(step) is int and step >= 0 and all(map(_is_value, record.values()))


def _is_value(value: object) -> bool:
    if type(value) is int:
        return abs(value) < _LARGEST
    return value is None or (isinstance(value, float) and math.isfinite(value))
