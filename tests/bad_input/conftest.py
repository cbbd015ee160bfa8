"""Entry points called in this process, and the four things that each must do with bad input."""

import functools
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import run_settings

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM
from flash_stu.data import load_tokenizer
from flash_stu.errors import run_cli

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts" / "bench"


@functools.cache
def entry_point(name: str) -> Callable:
    """The main function of a script, such as scripts/export.py."""
    path, before = ROOT / name, dict(sys.modules)
    sys.path.insert(0, str(path.parent))  # as Python does for a script
    try:
        return runpy.run_path(str(path))["main"]
    finally:
        sys.path.remove(str(path.parent))
        for module in set(sys.modules) - set(before):  # benchmarks import each other by names that others have too
            if getattr(sys.modules[module], "__file__", None) and Path(sys.modules[module].__file__).parent == BENCH:
                del sys.modules[module]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the contents of files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refuses(monkeypatch, capfd, tmp_path):
    """Call an entry point in an empty folder's neighbourhood and check that it refuses.

    Exit status 2, one line on stderr that begins with "error: " and has the words given, and no file made, changed or
    deleted below tmp_path, which is the working directory.
    """
    monkeypatch.chdir(tmp_path)

    def check(script: str, arguments: list, *words: str) -> str:
        main, before = entry_point(script), tree(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        status = run_cli(main)
        error = capfd.readouterr().err
        assert status == 2, error
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
        assert "Traceback" not in error and len(error) < 1000
        for word in words:
            assert word in error
        assert tree(tmp_path) == before
        return error

    return check


@pytest.fixture
def config_file(tmp_path) -> Path:
    """The config of a run on the embedded corpus that would train in a second."""
    settings = run_settings(tmp_path / "run", Path("embedded"), tmp_path / "cache")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def model_dir(tmp_path) -> Path:
    """A tiny model on bytes, with its tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = FlashSTUConfig(vocab_size=257, sliding_window=7, max_position_embeddings=64, num_filters=4, **shape)
    FlashSTUForCausalLM(config).save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").to_transformers().save_pretrained(tmp_path / "model")
    return tmp_path / "model"
