"""metrics.jsonl after a restart, and wandb beside it."""

import importlib.util
import json

import pytest

from flash_stu import UserError
from flash_stu.training.metrics import check_wandb, keep_lines_up_to, read_metrics


def test_lines_of_steps_that_are_trained_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"step": 0, "validation_loss": 5.5},
        *({"step": step, "loss": 1 / step} for step in range(1, 6)),
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 6, "lo')
    assert read_metrics(path) == records
    keep_lines_up_to(path, 3)
    assert read_metrics(path) == records[:4]
    assert path.read_text().endswith("}\n")
    keep_lines_up_to(path, 0)  # a run that starts again from nothing
    assert path.read_text() == ""


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_wandb_is_optional(monkeypatch):
    assert check_wandb("disabled") == "disabled"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert check_wandb("auto") == "disabled"
    with pytest.raises(UserError, match="wandb.mode is 'online', but wandb is not installed"):
        check_wandb("online")


def test_wandb_offline_goes_to_the_run_directory_under_one_id(load, fit, tmp_path):
    pytest.importorskip("wandb")
    longer = "optimizer.schedule=constant", "wandb.mode=offline"
    assert fit(load(*longer, "train.steps=2"))
    assert fit(load(*longer, "train.steps=4"))
    runs = [folder.name for folder in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert runs and len({name.rpartition("-")[2] for name in runs}) == 1
