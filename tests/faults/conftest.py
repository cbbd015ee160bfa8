"""Every command that writes, in this process, with inputs of its own and an empty cache."""

import json
import sys

import datasets
import pytest
import torch
import yaml
from published_weights import published_weights
from safetensors.torch import save_file
from writing_commands import COMMANDS

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM
from flash_stu.data import DataConfig, load_tokenizer, prepare
from flash_stu.errors import run_cli
from flash_stu.filters import spectral as filters

SIZES = {
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "sliding_window": 7,
    "max_position_embeddings": 33,
    "num_filters": 4,
}
PUBLISHED = {"dim": 16, "num_heads": 2, "num_layers": 2, "seq_len": 33, "window_size": 7, "vocab_size": 257}
PUBLISHED |= {"mlp_scale": 2, "num_eigh": 4, "use_hankel_L": False, "theta": 1e4, "use_alibi": False}
TASK = {
    "task": "colours",
    "dataset_path": "someone/colours",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "text",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The inputs of the commands."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    FlashSTUForCausalLM(FlashSTUConfig(**SIZES)).save_pretrained(folder / "model")
    load_tokenizer("bytes").to_transformers().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("some text to be scored. " * 20)
    for name in ("published", "run", "tasks"):
        (folder / name).mkdir()
    save_file(published_weights(layers=2, size=16, vocab=257, filters=4), folder / "published/model.safetensors")
    (folder / "published/config.json").write_text(json.dumps(PUBLISHED | {"softcap": 50.0, "weight_tying": True}))
    (folder / "tasks/colours.yaml").write_text(yaml.safe_dump(TASK))
    config = {"output_dir": str(folder / "run"), "model": SIZES, "data": {"dataset": str(folder / "corpus.jsonl")}}
    config["data"] |= {"tokenizer": "bytes", "validation_fraction": 0.3}
    config["train"] = {"sequence_length": 24, "global_batch_size": 24, "steps": 5}
    (folder / "run/config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run/metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": {5 / n}}}\n' for n in range(1, 30)))
    texts = [{"text": f"document {number} about filters " * 9} for number in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


@pytest.fixture(autouse=True)
def stand_ins(tmp_path, tmp_path_factory, monkeypatch):
    """An empty cache of the user's, a hub with one data set, and no figures, which take long."""
    monkeypatch.setattr(filters.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    rows = [{"text": f"pot {number}", "choices": ["red", "blue"], "label": number % 2} for number in range(99)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("spectralds.directory.plot_fit", lambda bank, fit, curve, path: path.write_bytes(b"x" * 9999))
    monkeypatch.setattr("flash_stu.evaluation.report.draw_positions", lambda *args: args[-1].write_bytes(b"x" * 9999))


@pytest.fixture
def tokens(inputs, tmp_path):
    config = DataConfig(
        dataset=str(inputs / "corpus.jsonl"), validation_fraction=0.3, cache_dir=str(tmp_path / "tokens")
    )
    return prepare(config, progress=False).directory / "train"


@pytest.fixture
def command(inputs, tmp_path, monkeypatch, capsys):
    """Run a command with an output; returns exit status and stderr."""

    def run(name, output=tmp_path / "output"):
        module, words = COMMANDS[name]
        words = [word.replace("INPUTS", str(inputs)).replace("OUTPUT", str(output)) for word in words]
        monkeypatch.setattr(sys, "argv", [name, *words])
        capsys.readouterr()
        return run_cli(module.main), capsys.readouterr().err

    return run
