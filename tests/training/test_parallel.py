"""Several processes give the results of one, from scratch and from each other's checkpoints."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flash_stu import UserError
from flash_stu.training import Trainer, join_world
from flash_stu.training.metrics import read_metrics
from flash_stu.training.parallel import resolve_strategy


def losses(folder: Path) -> dict[tuple[int, str], float]:
    return {
        (record["step"], key): record[key]
        for record in read_metrics(folder / "metrics.jsonl")
        for key in ("loss", "grad_norm", "validation_loss")
        if key in record
    }


def assert_same_results(folder: Path, reference: Path) -> None:
    expected = losses(reference)
    assert losses(folder) == pytest.approx(expected, abs=1e-5) and len(expected) == 15
    for name, tensor in load_file(reference / "final" / "model.safetensors").items():
        torch.testing.assert_close(
            load_file(folder / "final" / "model.safetensors")[name], tensor, rtol=1e-3, atol=2e-5, msg=name
        )


@pytest.fixture
def alone(load, fit, tmp_path) -> Path:
    """The run of a single process. Its 9 validation windows leave one of two processes idle once."""
    assert fit(load(f"output_dir={tmp_path / 'alone'}", "train.validation_tokens=216"))
    return tmp_path / "alone"


def test_fsdp_equals_one_process_which_can_take_over(alone, load, fit, train_py, config_file, tmp_path):
    run = train_py(
        "--config", config_file, "parallel.strategy=fsdp", "train.validation_tokens=216",
        "train.activation_checkpointing=full", processes=2,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step 6/6") == 1  # only one process prints
    assert_same_results(tmp_path / "run", alone)

    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    assert fit(load("train.validation_tokens=216"))  # from step 4
    assert_same_results(tmp_path / "run", alone)


def test_ddp_takes_over_from_one_process(alone, load, fit, train_py, config_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        train_step = Trainer._train_step

        def interrupted(self):
            if self.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(self)

        patch.setattr(Trainer, "_train_step", interrupted)
        assert not fit(load("train.validation_tokens=216"))
    run = train_py(
        "--config", config_file, "parallel.strategy=ddp", "train.validation_tokens=216",
        "train.micro_batch_size=1", processes=2,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "after step 1 of 6" in run.stdout
    assert_same_results(tmp_path / "run", alone)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_strategies_work_in_a_single_process(alone, load, fit, tmp_path, strategy):
    assert fit(load(f"parallel.strategy={strategy}", "train.validation_tokens=216"))
    assert_same_results(tmp_path / "run", alone)


def test_bfloat16_fsdp_keeps_float32_weights(load, fit, tmp_path):
    for strategy in ("none", "fsdp"):
        overrides = [
            f"parallel.strategy={strategy}",
            f"output_dir={tmp_path / strategy}",
            "train.dtype=bfloat16",
        ]
        assert fit(load(*overrides))
    autocast, fsdp = losses(tmp_path / "none"), losses(tmp_path / "fsdp")
    assert fsdp[6, "validation_loss"] == pytest.approx(autocast[6, "validation_loss"], abs=0.02)
    weights = load_file(tmp_path / "fsdp" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_strategy_of_auto():
    assert resolve_strategy("auto", 1, 10**10) == "none"
    assert resolve_strategy("auto", 8, 550_000_000) == "ddp"
    assert resolve_strategy("auto", 8, 2_600_000_000) == "fsdp"
    assert resolve_strategy("fsdp", 1, 1) == "fsdp"


def test_several_processes_need_a_strategy(load, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="'none' for 2 processes"), join_world(load("parallel.strategy=none")):
        pass
