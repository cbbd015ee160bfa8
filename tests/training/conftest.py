"""A corpus, a model and runs small enough to train in a second."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import training_settings

from flash_stu.training import RunConfig, Trainer, join_world, load_config

REPOSITORY = Path(__file__).parents[2]
TEXT = "spectral filters observe linear systems through a fixed window of tokens and forget nothing"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Train on the CPU, here and in processes of their own, where FLASH_STU_GPU_TESTS=1 shows a GPU too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


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
    """The settings of a tiny hybrid run with validations and checkpoints."""
    return training_settings(tmp_path / "run", corpus)


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
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return run
