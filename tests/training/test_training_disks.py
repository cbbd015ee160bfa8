"""Disks that take nothing more in the middle of a run: one line, and nothing is lost."""

import errno
import os
from pathlib import Path

import pytest
from broken_runs import assert_same, hidden, one_error, results

from flash_stu import files
from flash_stu.training import metrics

REPOSITORY = Path(__file__).parents[2]


DISKS = {
    "config full": ("fsync", ".config.yaml.flash", errno.ENOSPC, "config.yaml", False),
    "config in a read-only file system": ("mkdir", ".config.yaml.flash", errno.EROFS, "config.yaml", False),
    "lock refused": ("open", "run/.lock", errno.EACCES, "output_dir", False),
    "run directory read-only": ("mkdir", "run", errno.EROFS, "output_dir", False),
    "metrics full at the start": ("fsync", ".metrics.jsonl.flash", errno.ENOSPC, "metrics.jsonl", False),
    "metrics over quota at a checkpoint": ("fsync", "run/metrics.jsonl", errno.EDQUOT, "metrics.jsonl", True),
    "checkpoint directory read-only": ("mkdir", ".step-4.flash", errno.EROFS, "step-4", True),
    "tensors full": ("fsync", "step-4.flash", errno.ENOSPC, "step-4", True),
    "tensors broken": ("fsync", ".safetensors", errno.EIO, "step-2", True),
    "state full": ("fsync", "state.json", errno.EDQUOT, "step-2", True),
    "rename refused": ("rename", ".step-4.flash", errno.EACCES, "step-4", True),
    "final full": ("fsync", ".final.flash", errno.ENOSPC, "final", True),
    "final read-only": ("mkdir", ".final.flash", errno.EROFS, "final", True),
}  # fmt: skip


@pytest.mark.parametrize("name", DISKS)
def test_a_failing_disk_is_one_line_and_nothing_is_lost(start, tmp_path, whole, failing, name):
    call, words, number, named, begun = DISKS[name]
    run = tmp_path / "run"
    patch = failing(call, words, number)
    one_error(start(), named, os.strerror(number))
    patch.undo()
    assert run.exists() == begun
    if begun:
        assert hidden(run) == []
        assert all(not files.foreign_files(path) for path in (run / "checkpoints").glob("*"))
        assert not (run / "final").exists()
    assert start()[0] == 0
    assert_same(run, whole)


@pytest.mark.parametrize(
    ("lines", "number"), [(0, errno.ENOSPC), (1, errno.EIO), (2, errno.EDQUOT), (5, errno.ENOSPC), (8, errno.EIO)]
)
def test_metrics_that_can_no_longer_be_written(start, tmp_path, whole, monkeypatch, lines, number):
    class Full:
        """A file that takes so many lines, and half of another."""

        def __init__(self, file):
            self.file, self.left = file, lines

        def write(self, line):
            self.left -= 1
            if self.left < -1:
                raise OSError(number, os.strerror(number))
            return self.file.write(line if self.left >= 0 else line[: len(line) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = metrics.Metrics.open

    def open_full(self, *arguments):
        opened(self, *arguments)
        self.file = Full(self.file)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "open", open_full)
        one_error(start(), str(run / "metrics.jsonl"), os.strerror(number))
    assert results(run) == results(whole)[: lines if lines > 1 else 0]  # a directory without a step is removed again
    code, out, _ = start()
    assert code == 0 and "cannot be read" not in out
    assert_same(run, whole)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), "error of wandb"])
def test_wandb_that_does_not_start_leaves_nothing(start, whole, tmp_path, monkeypatch, error):
    wandb = pytest.importorskip("wandb")

    def fail(dir, **_):
        Path(dir, "wandb").mkdir()
        raise wandb.Error(f"{error}\nand more lines") if isinstance(error, str) else error

    monkeypatch.setattr(wandb, "init", fail)
    one_error(start("wandb.mode=offline", f"output_dir={tmp_path / 'some' / 'where'}"), "a run cannot be started")
    assert not (tmp_path / "some").exists()
