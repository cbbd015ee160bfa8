"""A run killed with SIGKILL again and again is, in the end, the run that nobody disturbed."""

import os
import random
import signal
import time
from pathlib import Path

import torch
from processes import Child
from safetensors.torch import load_file

from flash_stu.training import Trainer, join_world, load_config
from flash_stu.training.metrics import MEASURED, read_metrics

STEPS = 40


def train(config_file: Path, overrides: list[str]) -> bool:
    """Train on a slow disk, so that there is time to be killed while something is written, renamed or deleted."""
    for name in ("fsync", "rename", "unlink"):
        setattr(os, name, delayed(getattr(os, name)))
    config = load_config(config_file, overrides)
    with join_world(config) as world:
        return Trainer(config, world).fit()


def delayed(function):
    def run(*arguments, **options):
        time.sleep(0.004)
        return function(*arguments, **options)

    return run


class Assassin:
    """Waits for the moment to strike."""

    def __init__(self, run: Path) -> None:
        self.run, self.random = run, random.Random(0)

    def wait(self, moment: str, child: Child) -> None:
        """Until the process is in the midst of something, and a little longer."""
        if moment == "starting":
            time.sleep(self.random.uniform(0.1, 0.7))
        elif moment == "training":
            lines = self.lines() + self.random.randint(2, 5)
            self.until(lambda: self.lines() >= lines, child)
            time.sleep(self.random.uniform(0, 0.05))
        elif moment == "writing":
            lines = self.lines() + 1
            self.until(lambda: self.lines() >= lines, child)
            self.until(lambda: self.stops(child, "checkpoints/.step-*.tmp"), child)
        elif moment == "deleting":
            self.until(lambda: self.sees("checkpoints/.step-*.deleted"), child)
        elif moment == "exporting":
            self.until(lambda: self.sees(".final.flash_stu-*.tmp"), child)

    def stops(self, child: Child, pattern: str) -> bool:
        """Stop the process at some moment of the writing of such a file, if it is still being written then."""
        if not self.sees(pattern):
            return False
        time.sleep(self.random.uniform(0, 0.015))
        os.kill(child.process.pid, signal.SIGSTOP)
        time.sleep(0.01)  # until it is delivered
        if self.sees(pattern):
            return True
        os.kill(child.process.pid, signal.SIGCONT)
        return False

    def until(self, happened, child: Child) -> None:
        while not happened():
            assert child.process.is_alive(), "the run ended before it could be killed"
            time.sleep(0.0005)

    def sees(self, pattern: str) -> bool:
        return next(self.run.glob(pattern), None) is not None

    def lines(self) -> int:
        file = self.run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0


def results(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in read_metrics(run / "metrics.jsonl")]


def test_a_run_killed_ten_times_equals_one_that_never_was(config_file, tmp_path):
    overrides = [
        f"train.steps={STEPS}",
        "train.checkpoint_every=1",
        "train.keep_every=16",
        "train.validation_every=7",
        "model.dropout=0.1",
        "optimizer.amsgrad=true",
    ]
    whole = Child(train, config_file, [*overrides, f"output_dir={tmp_path / 'whole'}"])
    assert whole.result()

    killed, overrides = tmp_path / "run", [*overrides, f"output_dir={tmp_path / 'run'}"]
    assassin = Assassin(killed)
    moments = ["starting", "writing", "training", "deleting", "writing", "starting", "writing", "training", "writing"]
    half_written = 0
    for moment in [*moments, "exporting"]:
        child = Child(train, config_file, overrides)
        assassin.wait(moment, child)
        assert child.process.is_alive()
        child.kill()
        half_written += assassin.sees("checkpoints/.step-*.tmp")
    assert half_written >= moments.count("writing")
    assert Child(train, config_file, overrides).result()

    assert len(results(killed)) == STEPS + 1 + STEPS // 7 + 1
    assert results(killed) == results(tmp_path / "whole")
    weights, expected = (load_file(run / "final" / "model.safetensors") for run in (killed, tmp_path / "whole"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert sorted(os.listdir(killed / "checkpoints")) == ["step-16", "step-32", "step-39", "step-40"]  # none is damaged
    assert sorted(os.listdir(killed)) == sorted(os.listdir(tmp_path / "whole"))
