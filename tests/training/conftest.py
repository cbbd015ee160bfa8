"""A corpus, a model and runs small enough to train in a second."""

import json
import os
import random
import runpy
import shutil
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


@pytest.fixture
def command(monkeypatch, capfd):
    """Run a script's command line in this process; returns exit status, stdout, lines of stderr."""

    def run(script: str, *arguments) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        out, err = capfd.readouterr()
        return end.value.code, out, err.splitlines()

    return run


@pytest.fixture
def start(command, config_file):
    """Start the run of the tiny config."""
    return lambda *overrides: command("train.py", "--config", config_file, "train.keep_checkpoints=9", *overrides)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The run that nothing happened to, with the checkpoints of the steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    settings = training_settings(folder / "run", corpus)
    settings["train"] |= {"keep_checkpoints": 9}
    (folder / "config.yaml").write_text(json.dumps(settings))
    config = load_config(folder / "config.yaml")
    with join_world(config) as world:
        assert Trainer(config, world).fit()
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """That run, stopped before it wrote its model."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run"


@pytest.fixture
def failing(monkeypatch):
    """Let a call of the operating system fail for paths that hold some words."""

    def fail(name: str, words: str, number: int) -> pytest.MonkeyPatch:
        call = getattr(os, name)

        def failed(target, *arguments, **options):
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            if words in path:
                raise OSError(number, os.strerror(number), path)
            return call(target, *arguments, **options)

        monkeypatch.setattr(os, name, failed)
        return monkeypatch

    return fail
