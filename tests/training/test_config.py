"""The run config: what it accepts, and the line it answers everything else with."""

from pathlib import Path

import pytest
import torch
import yaml

from flash_stu import FlashSTUForCausalLM, UserError
from flash_stu.training import load_config
from flash_stu.training.run_config import changed_keys

CONFIGS = Path(__file__).parents[2] / "configs"


def test_overrides_are_yaml_and_later_ones_win(load):
    config = load("optimizer.learning_rate=3e-3", "train.steps=7", "train.steps=8", "data.subset=null", "seed=5")
    assert config.optimizer.learning_rate == 3e-3
    assert (config.train.steps, config.data.subset, config.seed) == (8, None, 5)


def test_a_section_can_come_from_overrides_alone(load):
    assert load("parallel.strategy=none").parallel.strategy == "none"


def test_resolved_config_reads_back_equal(load, tmp_path):
    config = load("optimizer.eps=1e-9", "optimizer.betas=[0.8, 0.99]")
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    again = load_config(path)
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert again.model["layer_types"] == ["linear_attention", "sliding_attention"]  # defaults are written out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz", "did you mean train.steps?"]),
        ("train.learning_rate=3", ["train.learning_rate", "did you mean optimizer.learning_rate?"]),
        ("optimizer.q=3", ["optimizer.q", "allowed: ", "optimizer.betas"]),
        ("banana=3", ["banana", "allowed: ", "output_dir"]),
        ("model.hidden=3", ["model.hidden", "did you mean"]),
        ("data.tokeniser=bytes", ["data.tokeniser", "did you mean data.tokenizer?"]),
        ("train.steps=many", ["train.steps", "'many'", "integer"]),
        ("train.steps=true", ["train.steps", "True", "integer"]),
        ("train.steps=2.5", ["train.steps", "2.5", "integer"]),
        ("train.steps=0", ["train.steps", "0", "greater than or equal to 1"]),
        ("train.steps=null", ["train.steps", "train.epochs", "exactly one"]),
        ("train.epochs=1", ["train.steps", "train.epochs", "exactly one"]),
        ("train.dtype=float16", ["train.dtype", "'float16'", "'float32' or 'bfloat16'"]),
        ("parallel.strategy=zero", ["parallel.strategy", "'zero'", "'fsdp'"]),
        ("train.compile=maybe", ["train.compile", "'maybe'", "boolean"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "-1"]),
        ("optimizer.min_learning_rate=1", ["optimizer.min_learning_rate", "optimizer.learning_rate, 0.01"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "2"]),
        ("optimizer.betas=[0.9, 1.5]", ["optimizer.betas is 1.5", "less than 1"]),
        ("optimizer.warmup_steps=7", ["optimizer.warmup_steps", "at most train.steps, 6"]),
        ("optimizer.fused=maybe", ["optimizer.fused", "'maybe'"]),
        ("train.sequence_length=48", ["train.sequence_length is 48", "longer than the filters", "24"]),
        (
            "train.global_batch_size=100",
            ["train.global_batch_size is 100", "multiple of 48", "nearest: 96 or 144"],
        ),
        ("train.global_batch_size=5", ["train.global_batch_size is 5", "nearest: 48"]),
        ("model.num_attention_heads=3", ["hidden_size", "num_attention_heads 3"]),
        ("model.hidden_size=big", ["model", "hidden_size", "big"]),
        ("train=3", ["train is 3", "section"]),
        ("train", ["'train'", "section.key=value"]),
        ("train..steps=3", ["'train..steps=3'", "section.key=value"]),
        ("seed.x=3", ["'seed.x=3'", "seed is a single value"]),
        ("seed=[1", ["'seed=[1'", "not valid YAML"]),
    ],
)
def test_bad_settings_are_one_line_that_names_them(load, override, words):
    with pytest.raises(UserError) as error:
        load(override)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_batch_must_divide_over_the_processes(load):
    config = load()
    assert config.sequences_per_step(2) == 4
    with pytest.raises(UserError, match=r"multiple of 192 .*4 processes.*nearest: 192"):
        config.sequences_per_step(4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a mapping"),
        ("- 1", "not a mapping"),
        ("a: [", "not valid YAML at line"),
        ("a: 1\na: 2", "repeated key 'a'"),
        ("seed: 1", "missing setting output_dir"),
    ],
)
def test_bad_files(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"--config .*nothing.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml")


def test_changed_keys(load):
    assert changed_keys(load(), load("train.steps=9", "model.dropout=0.5")) == [
        "model.dropout",
        "train.steps",
    ]


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("flash_stu_340m", 340.3, 0.05),
        ("flash_stu_340m_best", 340.4, 0.1),
        ("transformer_340m", 340.3, 0.005 * 340.3),
        ("flash_stu_550m", 550.3, 0.05),
        ("flash_stu_2.6b", 2669.5, 0.05),
    ],
)
def test_sizes_of_the_published_models(name, millions, tolerance):
    config = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        parameters = FlashSTUForCausalLM(config.architecture()).num_parameters()
    assert parameters / 1e6 == pytest.approx(millions, abs=tolerance)
    assert config.train.global_batch_size == 524_288
    assert config.train.steps * config.train.global_batch_size == pytest.approx(10e9, rel=1e-3)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_names_its_run(path):
    assert load_config(path).output_dir == f"runs/{path.stem}"


def test_the_baseline_differs_from_the_hybrid_only_in_its_layers():
    hybrid, baseline = (load_config(CONFIGS / f"{name}_340m.yaml") for name in ("flash_stu", "transformer"))
    assert changed_keys(hybrid, baseline) == ["model.intermediate_size", "model.layer_types", "output_dir"]


def test_the_best_recipe_differs_from_the_published_one_in_branches_and_optimizer():
    published, best = (load_config(CONFIGS / f"flash_stu_340m{suffix}.yaml") for suffix in ("", "_best"))
    assert changed_keys(published, best) == ["model.stu_branches", "optimizer.name", "output_dir"]


def test_written_floats_stay_numbers(load):
    settings = yaml.safe_load(load("optimizer.eps=1e-8").to_yaml())
    assert float(settings["optimizer"]["eps"]) == 1e-8
