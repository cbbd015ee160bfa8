"""metrics.jsonl, the record of a run: its lines, and how they are read back."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_stu import files, reading
from flash_stu.errors import writing

# Differ between two equal runs; all else is the same to the last bit on a CPU.
MEASURED = ("tokens_per_second", "mfu", "memory_gib", "data_wait", "time")
_LARGEST = 1 << 63  # integers from here on are no values of ours, and too large for a float or a plot


@dataclass(frozen=True)
class StepRecord:
    """The line of one optimizer step.

    Besides, there is one line per validation, {"step", "validation_loss" (nats per token),
    "validation_bits_per_byte"}, and one per loss spike, {"step", "loss_spike" (the loss), "usual_loss" (the mean of the
    100 before)}. Where tasks are run during training, {"step", "evaluation/<task>/<metric>", ...}.

    Attributes:
        step: 1 for the first.
        loss: nats per token; null in the file where it was not finite.
        learning_rate: of this step.
        grad_norm: before clipping; null in the file where it was not finite.
        skipped: steps of the run so far that were left out because loss or gradient was not finite.
        tokens_per_second: of all processes.
        mfu: model FLOPs (flash_stu.training.flops) over the GPUs' peak; None where that is not known.
        memory_gib: the most this process has held: of GPU memory, or resident on the CPU.
        data_wait: seconds this process waited for its batch.
        time: seconds of training so far.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    skipped: int
    tokens_per_second: float
    mfu: float | None
    memory_gib: float
    data_wait: float
    time: float


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl, each with its step; lines that hold none are left out.

    There are none if there is no file.
    """
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
        if unreadable:
            lines = path.read_bytes().split(b"\n")
            if unreadable != [len(lines)]:
                copy = files.damaged_name(path)
                with files.replacing_file(copy) as temporary:
                    shutil.copyfile(path, temporary)
                print(f"{path}: {len(unreadable)} lines cannot be read; the file as it was is {copy.name}", flush=True)
        kept = [json.dumps(record) + "\n" for record in records if 0 < step >= record["step"]]
        files.write_text(path, "".join(kept))


def _is_record(record: dict[str, Any]) -> bool:
    """Returns whether something is a record of metrics.jsonl: a step, and numbers or null."""
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
