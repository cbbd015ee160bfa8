"""A model directory with its tokenizer, as users and tools meet it: pipeline, generate script, damaged directories."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from flash_stu import FlashSTUForCausalLM, UserError
from flash_stu.data import load_tokenizer
from flash_stu.model.loading import load_model, load_model_tokenizer, resolve_model_dir


@pytest.fixture
def directory(tiny_config, tmp_path):
    torch.manual_seed(0)
    model = FlashSTUForCausalLM(tiny_config(vocab_size=257, max_position_embeddings=200))
    model.generation_config.eos_token_id = model.config.eos_token_id = 256
    model.save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").to_transformers().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_text_generation_pipeline_with_a_batch(directory):
    generate = pipeline("text-generation", str(directory), device="cpu")
    generate.tokenizer.padding_side = "left"
    prompts = ["Return a list", "é"]
    settings = {"max_new_tokens": 9, "do_sample": False, "return_full_text": False}
    together = generate(prompts, batch_size=2, **settings)
    alone = [generate(prompt, **settings) for prompt in prompts]
    assert [t[0]["generated_text"] for t in together] == [a[0]["generated_text"] for a in alone]
    assert len(together[0][0]["generated_text"]) > 0


def test_generate_script(directory):
    command = [sys.executable, "scripts/generate.py", "--model", str(directory), "--prompt", "abc", "--seed", "1"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, "--max-new-tokens", "20"], capture_output=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"abc")
    tokens = re.match(rb"\[(\d+) tokens, ", done.stderr)
    assert tokens and 1 <= int(tokens[1]) <= 20  # fewer where the end of the text is drawn
    done = subprocess.run([*command, "--max-new-tokens", "500"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2
    assert "prompt and new tokens are 503 together" in done.stderr
    assert "Traceback" not in done.stderr


def test_damaged_directories_are_refused_by_name(directory, tmp_path):
    def message(path):
        with pytest.raises(UserError) as error:
            load_model(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "absent: no such directory" in message(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "empty: not a model directory (no config.json" in message(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "has no final/ yet" in message(tmp_path / "run")

    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged or truncated" in message(directory)
    weights.unlink()
    assert "model.safetensors, a .safetensors file with weights, is missing" in message(directory)
    weights.write_bytes(whole)
    shutil.copytree(directory, tmp_path / "wide")
    config = tmp_path / "wide" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 64'))
    assert "wide: " in message(tmp_path / "wide")

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_model_tokenizer(directory)


def test_a_run_means_its_final_model(directory, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    directory.rename(run / "final")
    assert resolve_model_dir(run) == run / "final"
