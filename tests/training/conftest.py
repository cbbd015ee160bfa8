"""A corpus, a model and runs small enough to train in a second."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flash_stu.training import RunConfig, Trainer, join_world, load_config

REPOSITORY = Path(__file__).parents[2]
TEXT = "spectral filters observe linear systems through a fixed window of tokens and forget nothing"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with documents of random words."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(60):
            text = " ".join(generator.choices(TEXT.split(), k=generator.randint(5, 60)))
            file.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture
def settings(corpus, tmp_path) -> dict:
    """The settings of a tiny hybrid run: 6 steps of 4 sequences of 24 tokens."""
    return {
        "output_dir": str(tmp_path / "run"),
        "seed": 1,
        "model": {
            "vocab_size": 264,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "sliding_window": 7,
            "max_position_embeddings": 24,
            "num_filters": 4,
        },
        "data": {
            "dataset": str(corpus / "text.jsonl"),
            "tokenizer": "bytes",
            "cache_dir": str(corpus / "cache"),
            "validation_fraction": 0.2,
        },
        "train": {
            "sequence_length": 24,
            "global_batch_size": 96,
            "micro_batch_size": 2,
            "steps": 6,
            "dtype": "float32",
            "validation_every": 3,
            "validation_tokens": 240,
            "checkpoint_every": 2,
            "log_every": 1,
        },
        "optimizer": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 2},
        "wandb": {"mode": "disabled"},
    }


@pytest.fixture
def config_file(settings, tmp_path) -> Path:
    """The settings as a YAML file."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def load(config_file):
    """Load the tiny config with overrides."""
    return lambda *overrides: load_config(config_file, list(overrides))


@pytest.fixture
def fit():
    """Train in this process; returns whether the run finished."""

    def run(config: RunConfig) -> bool:
        with join_world(config) as world:
            return Trainer(config, world).fit()

    return run


@pytest.fixture
def train_py():
    """Run train.py with these arguments, under torchrun if processes are given."""

    def run(*arguments: str, processes: int | None = None) -> subprocess.CompletedProcess:
        launcher = [sys.executable]
        if processes is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return subprocess.run(
            [*launcher, str(REPOSITORY / "train.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return run
