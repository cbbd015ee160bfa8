"""What the tests of broken runs compare."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from toy_checkpoints import alter, truncate

from flash_stu import files, reading
from flash_stu.training.metrics import MEASURED, read_metrics


def results(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in read_metrics(run / "metrics.jsonl")]


def assert_same(run: Path, whole: Path) -> None:
    assert results(run) == results(whole)
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (run, whole))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert hidden(run) == []


def hidden(folder: Path) -> list[str]:
    """Temporary files that writers have left."""
    return [path.name for path in folder.rglob(".*") if path.name not in (files.MANIFEST, ".lock")]


def one_error(outcome: tuple[int, str, list[str]], *words: str) -> None:
    code, _, lines = outcome
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), outcome
    assert all(word in lines[0] for word in words), lines


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(name: str, change: Callable[[str], str]):
    return lambda step: (step / name).write_text(change((step / name).read_text()))


def replace(name: str, content: bytes):
    return lambda step: (step / name).write_bytes(content)


def to_tensors(change: Callable[[Path], object]):
    return lambda step: change(next(step.glob("*.safetensors")))


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def resealed(kind: str = "checkpoint", leave_out: str = "", **changes):
    """Change the run state and give the directory a manifest that agrees with it."""

    def damage(step: Path) -> None:
        state = json.loads((step / "state.json").read_text())
        (step / "state.json").write_text(json.dumps(state | changes))
        (step / files.MANIFEST).unlink()
        entries = {path.name: reading.describe(path) for path in step.iterdir() if path.name != leave_out}
        files.seal(step, kind, entries)

    return damage


DAMAGES = {
    "another step": (rewrite("state.json", lambda text: text.replace('"step": 6', '"step": 5')), "state.json"),
    "state cut short": (lambda step: truncate(step / "state.json"), "state.json"),
    "state empty": (replace("state.json", b""), "state.json"),
    "state a list": (replace("state.json", b"[]"), "state.json"),
    "state not UTF-8": (replace("state.json", b"\xff\xfe"), "state.json"),
    "state missing": (lambda step: (step / "state.json").unlink(), "state.json"),
    "state a directory": (lambda step: to_directory(step / "state.json"), "state.json"),
    "state a pipe": (lambda step: to_pipe(step / "state.json"), "state.json"),
    "manifest missing": (lambda step: (step / files.MANIFEST).unlink(), files.MANIFEST),
    "manifest empty": (replace(files.MANIFEST, b""), files.MANIFEST),
    "manifest a list": (replace(files.MANIFEST, b"[1]"), files.MANIFEST),
    "manifest a number": (replace(files.MANIFEST, b"7"), files.MANIFEST),
    "manifest nested": (replace(files.MANIFEST, b"[" * 20_000), files.MANIFEST),
    "manifest not UTF-8": (replace(files.MANIFEST, b"\xff{}"), files.MANIFEST),
    "manifest a pipe": (lambda step: to_pipe(step / files.MANIFEST), files.MANIFEST),
    "manifest without files": (rewrite(files.MANIFEST, lambda text: text.replace('"files"', '"other"')), "damaged"),
    "manifest with another size": (rewrite(files.MANIFEST, lambda text: text.replace('"bytes": ', '"bytes": 1')), ""),
    "manifest of nothing": (resealed(leave_out="state.json"), "does not name state.json"),
    "manifest of a model": (resealed(kind="model"), "is of a model"),
    "tensors cut short": (to_tensors(truncate), "bytes instead of"),
    "tensors one bit off": (to_tensors(alter), "checksum"),
    "tensors missing": (to_tensors(Path.unlink), ".safetensors cannot be read"),
    "tensors a directory": (to_tensors(to_directory), "not a regular file"),
    "step a string": (resealed(step="6"), "step"),
    "step negative": (resealed(step=-6), "step"),
    "step of another": (resealed(step=4), "of step 4"),
    "skipped a float": (resealed(skipped=0.5), "skipped"),
    "seconds not finite": (resealed(seconds=float("inf")), "seconds"),
    "run_id missing": (resealed(run_id=None), "run_id"),
    "unknown key": (resealed(stepp=6), "stepp"),
}  # fmt: skip
