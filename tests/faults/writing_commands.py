"""The commands that write, and what a refusal looks like."""

import errno
import os

import distill as distill_py
import evaluate as evaluate_py
from scripts import convert_checkpoint, fetch_eval_data, plot_run, prepare_data

MODEL, TEXT = "INPUTS/model", "INPUTS/text.txt"
COMMANDS = {
    "distill": (distill_py, ["--checkpoint", MODEL, "--state-dim", "4", "--output", "OUTPUT"]),
    "convert": (
        convert_checkpoint,
        ["--checkpoint", "INPUTS/published/model.safetensors", "--config", "INPUTS/published/config.json"]
        + ["--tokenizer", "bytes", "--output", "OUTPUT"],
    ),
    "evaluate": (evaluate_py, ["--model", MODEL, "--text", TEXT, "--device", "cpu", "--output", "OUTPUT"]),
    "fetch": (fetch_eval_data, ["--tasks", "colours", "--include-path", "INPUTS/tasks", "--output", "OUTPUT"]),
    "plot": (plot_run, ["INPUTS/run", "--output", "OUTPUT/loss.png"]),
    "prepare": (prepare_data, ["--config", "INPUTS/run/config.yaml", "data.cache_dir=OUTPUT"]),
}
WRITERS_OF_DIRECTORIES = ["distill", "convert", "evaluate", "fetch"]


def refused(result, *words) -> bool:
    status, stderr = result
    lines = [line for line in stderr.splitlines() if not line.startswith("tokenising ")]  # what is going on
    assert (status, len(lines)) == (2, 1), stderr
    assert lines[0].startswith("error: ") and all(str(word) in lines[0] for word in words), stderr
    return True


def files_of(folder) -> dict[str, bytes]:
    """All files, hidden ones too, but for the cache of filters."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "cache/flash_stu/filters" not in str(path)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def failing(monkeypatch, folder, names, number):
    """Let functions of os report an error for paths in a folder, and for open files."""
    for name in names:
        original = getattr(os, name)

        def function(path, *args, original=original, **kwargs):
            if isinstance(path, int) or str(path).startswith(str(folder)):
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(os, name, function)


FAULTS = {
    "disk full": (["fsync"], errno.ENOSPC, "No space left on device"),
    "read-only file system": (["mkdir"], errno.EROFS, "Read-only file system"),
    "no permission": (["mkdir", "open"], errno.EACCES, "Permission denied"),
    "broken disk": (["replace", "rename"], errno.EIO, "Input/output error"),
    "quota": ("limit", 1000, "File too large"),
}
