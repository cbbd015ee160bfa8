"""Training in one process: resuming, accumulation, validation, and the run directory."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_stu import UserError
from flash_stu.training import Trainer, join_world, step
from flash_stu.training.metrics import MEASURED, read_metrics
from flash_stu.training.model_source import load_checkpoint
from flash_stu.training.step import accumulate_gradients, dropout_seed


def losses(folder: str | Path) -> list[dict]:
    """The metrics of a run, without what depends on the clock or the memory."""
    return [
        {k: v for k, v in record.items() if k not in MEASURED}
        for record in read_metrics(Path(folder) / "metrics.jsonl")
    ]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "final" / "model.safetensors")


@pytest.fixture
def finished(load, fit, tmp_path):
    """A run that was never interrupted."""
    config = load(f"output_dir={tmp_path / 'whole'}", "model.dropout=0.1")
    assert fit(config)
    return config.output_dir


def test_run_directory_of_a_finished_run(finished, fit, load, capsys):
    assert sorted(os.listdir(finished)) == ["checkpoints", "config.yaml", "final", "metrics.jsonl"]
    assert sorted(os.listdir(Path(finished) / "checkpoints")) == ["step-4", "step-6"]  # two are kept
    records = read_metrics(Path(finished) / "metrics.jsonl")
    assert [(r["step"], "loss" in r) for r in records] == [
        (0, False), (1, True), (2, True), (3, True), (3, False), (4, True), (5, True), (6, True), (6, False),
    ]  # fmt: skip
    assert records[-1]["validation_loss"] < records[0]["validation_loss"] - 0.4
    assert records[0]["validation_loss"] == pytest.approx(math.log(264), abs=0.3)
    before = os.stat(Path(finished) / "final" / "model.safetensors").st_mtime_ns
    assert fit(load(f"output_dir={finished}", "model.dropout=0.1"))
    assert "is finished: 6 steps" in capsys.readouterr().out
    assert os.stat(Path(finished) / "final" / "model.safetensors").st_mtime_ns == before


def test_final_is_a_transformers_directory(finished):
    model = AutoModelForCausalLM.from_pretrained(Path(finished) / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(Path(finished) / "final")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    ids = tokenizer("fixed window", return_tensors="pt").input_ids
    assert ids.tolist() == [list(b"fixed window")]
    saved, _ = load_checkpoint(Path(finished) / "checkpoints" / "step-6")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(("stop_at", "number"), [(1, signal.SIGTERM), (3, signal.SIGUSR1), (4, signal.SIGTERM)])
def test_a_signal_and_restart_give_the_same_run_bit_for_bit(finished, load, fit, stop_at, number, monkeypatch, capsys):
    config = load("model.dropout=0.1")
    train_step = Trainer._train_step

    def interrupted(self):
        if self.step == stop_at:
            os.kill(os.getpid(), number)
        train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    assert not fit(config)
    assert f"stopped at step {stop_at} of 6" in capsys.readouterr().out
    assert not (Path(config.output_dir) / "final").exists()
    monkeypatch.setattr(Trainer, "_train_step", train_step)
    assert fit(config)
    assert f"after step {stop_at} of 6" in capsys.readouterr().out
    assert_same_run(config.output_dir, finished)


def test_crash_between_checkpoints_loses_nothing(finished, load, fit, monkeypatch):
    config = load("model.dropout=0.1")
    validate = Trainer._validate

    def crash(self):
        if self.step == 3:
            raise RuntimeError("power cut")
        return validate(self)

    monkeypatch.setattr(Trainer, "_validate", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(config)
    with (Path(config.output_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "valid')  # and a line cut short
    monkeypatch.setattr(Trainer, "_validate", validate)
    assert fit(config)  # from step 2
    assert_same_run(config.output_dir, finished)


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_results_do_not_depend_on_the_micro_batch(load, tmp_path):
    def gradients(micro_batch_size):
        config = load(f"train.micro_batch_size={micro_batch_size}", f"output_dir={tmp_path / str(micro_batch_size)}")
        with join_world(config) as world:
            trainer = Trainer(config, world)
            loss = accumulate_gradients(trainer.model, trainer.loader.batch(0), config, world)
            return loss.item(), [p.grad for p in trainer.model.parameters()]

    (one, one_gradients), (four, four_gradients) = gradients(1), gradients(4)
    assert one == pytest.approx(four, rel=1e-6)
    for a, b in zip(one_gradients, four_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_activation_checkpointing_changes_nothing_but_memory(load, fit, tmp_path):
    for mode in ("none", "selective", "full"):
        assert fit(
            load(
                f"train.activation_checkpointing={mode}",
                f"output_dir={tmp_path / mode}",
                "train.steps=2",
                "model.dropout=0.1",
            )  # fmt: skip
        )
    assert losses(tmp_path / "none") == losses(tmp_path / "selective") == losses(tmp_path / "full")


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_give_the_same_losses(load, fit, tmp_path, monkeypatch, checkpointing):
    overrides = [
        "train.steps=2",
        "train.validation_tokens=216",
        f"train.activation_checkpointing={checkpointing}",
    ]
    assert fit(load(*overrides, f"output_dir={tmp_path / 'eager'}"))
    counters.clear()
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # as traced, without C++
    assert fit(load(*overrides, f"output_dir={tmp_path / 'compiled'}", "train.compile=true"))
    assert counters["stats"]["unique_graphs"] == 4  # two kinds of blocks, with and without gradients
    assert not counters["graph_break"]
    for eager, compiled in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert {k for k, v in compiled.items() if v != pytest.approx(eager[k], rel=1e-5)} == set()


def test_bfloat16_autocast_trains_float32_weights(load, fit, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert fit(load(f"train.dtype={dtype}", f"output_dir={tmp_path / dtype}"))
    exact, rounded = losses(tmp_path / "float32")[-1], losses(tmp_path / "bfloat16")[-1]
    assert exact["validation_loss"] != rounded["validation_loss"]
    assert exact["validation_loss"] == pytest.approx(rounded["validation_loss"], abs=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "bfloat16").values())


def test_validation_is_the_mean_over_fixed_windows(load):
    config = load("train.validation_tokens=130", "train.micro_batch_size=2")  # 5 windows of 24: a batch is cut short
    with join_world(config) as world:
        trainer = Trainer(config, world)
        data, starts = trainer.validation.dataset, trainer.validation.starts
        assert len(starts) == 5 and starts == sorted(set(starts)) and all(start % 24 == 0 for start in starts)
        assert starts[-1] > len(data) / 2  # spread over the split
        loss, bits_per_byte = trainer.validation.losses(trainer.model, world)
        nats = []
        with torch.no_grad():
            for start in starts:
                window = torch.from_numpy(data.window(start, 25).astype("int64"))[None]
                logits = trainer.model.eval()(input_ids=window[:, :-1]).logits.double()
                nats.append(torch.nn.functional.cross_entropy(logits[0], window[0, 1:]).item())
    assert loss == pytest.approx(sum(nats) / 5, rel=1e-6)
    assert bits_per_byte == pytest.approx(loss / math.log(2) * len(data) / data.num_bytes)


def test_epochs_count_the_windows_of_the_corpus(load):
    config = load("train.steps=null", "train.epochs=1.5")
    with join_world(config) as world:
        trainer = Trainer(config, world)
        assert trainer.steps == int(1.5 * trainer.loader.num_windows / 4) > 6


def test_another_configs_directory_is_refused(finished, load, fit):
    for override, key in [
        ("seed=2", "seed"),
        ("train.steps=9", "train.steps"),
        ("model.num_filters=5", "num_filters"),
    ]:
        with pytest.raises(UserError, match=f"other settings .*{key}"):
            fit(load(f"output_dir={finished}", "model.dropout=0.1", override))


def test_a_directory_with_something_else_in_it_is_refused(load, fit, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run directory"):
        fit(load())


def test_a_run_with_a_constant_learning_rate_can_be_made_longer(load, fit, tmp_path):
    constant = "optimizer.schedule=constant"
    assert fit(load(constant))
    assert fit(load(constant, "train.steps=8"))
    assert fit(load(constant, "train.steps=8", f"output_dir={tmp_path / 'whole'}"))
    extended = [record for record in losses(tmp_path / "run") if "loss" in record]
    assert extended == [record for record in losses(tmp_path / "whole") if "loss" in record]


def test_other_text_in_the_same_place_is_refused(load, fit, tmp_path, corpus):
    text = tmp_path / "text.jsonl"
    text.write_text((corpus / "text.jsonl").read_text())
    config = load(f"data.dataset={text}", f"data.cache_dir={tmp_path / 'cache'}")
    assert fit(config)
    (tmp_path / "run" / "checkpoints" / "step-6").rename(tmp_path / "gone")
    (tmp_path / "run" / "final").rename(tmp_path / "final")
    with text.open("a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    with pytest.raises(UserError, match="not what .* was trained on"):
        fit(config)


def test_vocabulary_and_validation_split_must_fit(load, fit):
    with pytest.raises(UserError, match="model.vocab_size is 256; at least 257"):
        fit(load("model.vocab_size=256"))
    with pytest.raises(UserError, match="sequence_length"):
        fit(
            load(
                "model.max_position_embeddings=9999",
                "train.sequence_length=9000",
                "train.global_batch_size=18000",
            )
        )


@pytest.fixture
def not_finite_at(monkeypatch):
    """Spoil the loss, and so the gradient, of some steps."""

    def spoil(*steps):
        train_step, token_loss, current = Trainer._train_step, step.token_loss, []

        def noting(self):
            current.append(self.step)
            train_step(self)

        def spoiled(*arguments):
            return token_loss(*arguments) * (math.nan if current[-1] in steps else 1)

        monkeypatch.setattr(Trainer, "_train_step", noting)
        monkeypatch.setattr(step, "token_loss", spoiled)

    return spoil


def test_steps_that_are_not_finite_are_skipped_and_counted(load, fit, not_finite_at, tmp_path):
    not_finite_at(2, 3, 5)
    assert fit(load("train.max_skipped_steps=2"))
    steps = [record for record in losses(tmp_path / "run") if "loss" in record]
    assert [record["skipped"] for record in steps] == [0, 1, 2, 2, 3, 3]
    assert [record["loss"] is None for record in steps] == [False, True, True, False, True, False]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_too_many_in_a_row_end_the_run_with_the_last_good_weights(load, fit, not_finite_at, tmp_path):
    not_finite_at(3, 4, 5)
    words = "3 steps in a row, the last of them step 5 .*max_skipped_steps is 2.*step-5 has the weights"
    with pytest.raises(UserError, match=words):
        fit(load("train.max_skipped_steps=2", "train.keep_checkpoints=9"))
    good, _ = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-2")
    kept, _ = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-5")
    for name, tensor in good.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor), name
    assert fit(load("train.max_skipped_steps=2"))  # step 6 is fine


def test_training_starts_from_given_weights(finished, load, fit, tmp_path):
    config = load(f"train.initial_weights={finished}", "train.validation_tokens=240")
    assert fit(config)
    assert losses(tmp_path / "run")[0]["validation_loss"] == losses(finished)[-1]["validation_loss"]
    with pytest.raises(UserError, match="initial_weights.* shape .*, the model's"):
        fit(load(f"train.initial_weights={finished}", "model.num_filters=5", f"output_dir={tmp_path / 'other'}"))


def test_dropout_seeds_differ_between_steps_ranks_and_runs():
    seeds = {dropout_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)
