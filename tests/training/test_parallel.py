"""Any number of processes and any strategy give the results of one process, from scratch and from each other's
checkpoints."""

import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from call_counter import CallCounter
from processes import ProcessError, run_processes
from safetensors.torch import load_file

from flash_stu import UserError
from flash_stu.training import Trainer, join_world
from flash_stu.training.initialization import build_model
from flash_stu.training.metrics import read_metrics
from flash_stu.training.parallel import parallelize, resolve_resharding, resolve_strategy, set_gradient_sync
from flash_stu.training.run_config import ParallelConfig, load_config

STEPS = 20


def train(config_file: str, *overrides: str) -> bool:
    """Train in this process, one of several."""
    config = load_config(config_file, list(overrides))
    with join_world(config) as world:
        return Trainer(config, world).fit()


def losses(folder: Path) -> dict[tuple[int, str], float]:
    return {
        (record["step"], key): record[key]
        for record in read_metrics(folder / "metrics.jsonl")
        for key in ("loss", "grad_norm", "validation_loss")
        if key in record
    }


def assert_same_results(folder: Path, reference: Path) -> None:
    expected = losses(reference)
    assert losses(folder) == pytest.approx(expected, abs=1e-5) and len(expected) == 2 * STEPS + 3
    weights = load_file(folder / "final" / "model.safetensors")
    for name, tensor in load_file(reference / "final" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def long_config(config_file, settings) -> Path:
    """20 steps; the 9 validation windows leave one of two processes idle once. The rate is low: AdamW divides by the
    gradient's size, and so makes rounding visible where that is next to nothing."""
    settings["train"] |= {"steps": STEPS, "validation_every": 10, "checkpoint_every": 8, "validation_tokens": 216}
    settings["train"] |= {"micro_batch_size": 1}
    settings["optimizer"] |= {"learning_rate": 2e-3, "min_learning_rate": 1e-4, "eps": 1e-6}
    config_file.write_text(yaml.safe_dump(settings))
    return config_file


@pytest.fixture
def alone(long_config, tmp_path) -> Path:
    """The run of a single process."""
    assert train(long_config, f"output_dir={tmp_path / 'alone'}")
    return tmp_path / "alone"


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ["parallel.strategy=fsdp"]),
        (1, ["parallel.strategy=ddp"]),
        (2, ["parallel.strategy=fsdp", "train.activation_checkpointing=full"]),
        (2, ["parallel.strategy=ddp", "train.micro_batch_size=2"]),
        (4, ["parallel.strategy=fsdp", "train.activation_checkpointing=selective"]),
        (4, ["parallel.strategy=ddp"]),
        (4, ["parallel.strategy=fsdp", "parallel.replicas=2"]),
        (2, ["parallel.strategy=fsdp", "parallel.reshard_after_forward=true"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_the_results_are_those_of_one_process(alone, long_config, tmp_path, processes, overrides):
    assert all(run_processes(processes, train, str(long_config), *overrides))
    assert_same_results(tmp_path / "run", alone)


def coefficients_in_use(config_file: str, *overrides: str) -> list[torch.dtype]:
    """Dtypes of a layer's taps of outputs and of its in_proj, while the model runs."""
    config = load_config(config_file, list(overrides))
    with join_world(config) as world:
        model = parallelize(build_model(config.architecture()), config, world)
        mixer, found = model.model.layers[0].mixer, []
        mixer.taps.register_forward_pre_hook(lambda taps, _: found.extend([taps.M_y.dtype, mixer.in_proj.weight.dtype]))
        model(torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss.backward()
        assert mixer.taps.M_y.grad.dtype == torch.float32
        return found


def test_a_recurrence_has_float32_coefficients_in_bfloat16(config_file):
    overrides = ["parallel.strategy=fsdp", "train.dtype=bfloat16", "model.stu_output_taps=2"]
    assert run_processes(1, coefficients_in_use, str(config_file), *overrides) == [[torch.float32, torch.bfloat16]]


def test_what_fsdp_does_not_recompute_is_refused(load, fit):
    with pytest.raises(UserError, match="'selective', which FSDP does not do for model.stu_output_taps"):
        fit(load("parallel.strategy=fsdp", "train.activation_checkpointing=selective", "model.stu_output_taps=2"))


def collectives(config_file: str, *overrides: str) -> Counter:
    """How often a step of four micro batches gathers parameters and reduces gradients."""
    config = load_config(config_file, list(overrides))
    with join_world(config) as world:
        model = parallelize(build_model(config.architecture()), config, world)
        ids = torch.arange(25)[None]
        with CallCounter() as counter:
            for micro_batch in range(4):
                set_gradient_sync(model, micro_batch == 3, config)
                model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], skip_logits=True).loss.backward()
    return Counter({name: count for name, count in counter.calls.items() if name.startswith("c10d::")})


def test_fsdp_communicates_no_more_than_ddp_where_parameters_stay_gathered(long_config):
    kept, freed = (
        run_processes(2, collectives, str(long_config), "parallel.strategy=fsdp", f"parallel.reshard_after_forward={x}")
        for x in ("false", "true")
    )
    groups = 3  # two blocks, and the embedding with the last norm
    assert set(kept[0].values()) == {groups}  # each is gathered once and reduced once in a step
    assert sum(freed[0].values()) > 2 * sum(kept[0].values())


def test_parameters_stay_gathered_where_memory_allows(load):
    config = load("train.dtype=bfloat16")
    assert not resolve_resharding(config, 2_600_000_000) and resolve_resharding(config, 7_000_000_000)
    assert resolve_resharding(load("parallel.reshard_after_forward=true"), 1)


def test_other_worlds_take_over_from_the_same_checkpoints(alone, long_config, tmp_path):
    run, final = tmp_path / "run", tmp_path / "run" / "final"
    assert all(run_processes(4, train, str(long_config), "parallel.replicas=2"))
    for processes, strategy in [(2, "ddp"), (1, "auto"), (2, "fsdp")]:
        shutil.rmtree(final)
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS}")
        assert all(run_processes(processes, train, str(long_config), f"parallel.strategy={strategy}"))
        assert_same_results(run, alone)


def train_with_accident(config_file: str, accident: Callable, *overrides: str) -> bool:
    """Train in this process; something happens to the second of two at step 3."""
    train_step = Trainer._train_step

    def step(self):
        if self.step == 3 and self.world.rank == 1:
            accident()
        train_step(self)

    Trainer._train_step = step
    with open(f"{config_file}.stderr", "a") as sys.stderr:
        return train(config_file, *overrides)


def get_signal() -> None:
    signal.raise_signal(signal.SIGUSR1)


def stand_still() -> None:
    time.sleep(600)


def test_a_signal_to_one_process_stops_all(long_config, tmp_path):
    assert run_processes(2, train_with_accident, str(long_config), get_signal, "parallel.strategy=fsdp") == [False] * 2
    assert (tmp_path / "run" / "checkpoints" / "step-3").is_dir()


def test_a_stalled_process_ends_the_job_by_name(long_config):
    start = time.monotonic()
    with pytest.raises(ProcessError, match="exit code 3"):
        run_processes(2, train_with_accident, str(long_config), stand_still, "parallel.timeout_minutes=0.1")
    assert time.monotonic() - start < 300
    told = [line for line in Path(f"{long_config}.stderr").read_text().splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "stood still for 6 s" in told[0] and "process 1 of 2" in told[0] and "step 2" in told[0]


def test_torchrun_trains_with_several_processes(config_file, train_py, tmp_path):
    run = train_py("--config", config_file, processes=2)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step 6/6") == 1  # only one process prints
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


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


def backward(config_file: str, *overrides: str) -> tuple[set[torch.dtype], float, dict[str, torch.Tensor]]:
    """The dtypes of the residual stream between the blocks, and loss and gradients of a batch."""
    config = load_config(config_file, list(overrides))
    ids = torch.arange(2 * 25).view(2, 25) * 7 % 61
    with join_world(config) as world:
        model = parallelize(build_model(config.architecture()), config, world)
        inner, dtypes = getattr(model, "module", model), set()
        for block in inner.model.layers:
            block.register_forward_hook(lambda _block, inputs, y: dtypes.update([inputs[0].dtype, y.dtype]))
        loss = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], skip_logits=True).loss
        loss.backward()
        grads = {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}
        whole = {name: getattr(g, "full_tensor", lambda g=g: g)().clone() for name, g in grads.items()}
        return dtypes, loss.item(), whole


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model.stu_type=full", "model.stu_branches=separate"],
        ["model.stu_input_taps=2", "model.stu_output_taps=1"],
        ["model.lds_state_dim=8", "model.lds_trainable=true"],
    ],
)
def test_the_residual_stream_is_bfloat16_with_every_strategy(config_file, changes):
    exact = backward(str(config_file), *changes)
    assert exact[0] == {torch.float32}
    found = [
        run_processes(1, backward, str(config_file), f"parallel.strategy={name}", "train.dtype=bfloat16", *changes)[0]
        for name in ("none", "ddp", "fsdp")
    ]
    for dtypes, loss, grads in found:
        assert dtypes == {torch.bfloat16}
        assert loss == pytest.approx(exact[1], rel=2**-8)
        assert grads.keys() == exact[2].keys() == found[2][2].keys()
        for name, grad in grads.items():  # a few roundings to 8 bits in a row
            assert (grad - found[2][2][name]).norm() <= 0.05 * exact[2][name].norm(), name
    assert found[0][1] == found[1][1]
    assert all(torch.equal(found[0][2][name], found[1][2][name]) for name in found[0][2])


def test_strategy_of_auto():
    auto = ParallelConfig()
    assert resolve_strategy(auto, 1, 10**10) == "none"
    assert resolve_strategy(auto, 8, 550_000_000) == "ddp"
    assert resolve_strategy(auto, 8, 2_600_000_000) == "fsdp"
    assert resolve_strategy(ParallelConfig(replicas=2), 8, 1) == "fsdp"
    assert resolve_strategy(ParallelConfig(strategy="fsdp"), 1, 1) == "fsdp"


def test_replicas_divide_the_processes(load, fit):
    with pytest.raises(UserError, match="parallel.replicas is 2; it must divide the 1 processes"):
        fit(load("parallel.replicas=2"))
    with pytest.raises(UserError, match="parallel.replicas is 2, parallel.strategy 'ddp'"):
        load("parallel.replicas=2", "parallel.strategy=ddp")


def test_several_processes_need_a_strategy(load, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="'none' for 2 processes"), join_world(load("parallel.strategy=none")):
        pass
