"""Fixtures that several packages' tests share."""

import importlib
import os
import sys
from pathlib import Path

# Tests of the CPU behave alike where a GPU is visible; those of a GPU ask for it: FLASH_STU_GPU_TESTS=1.
if os.environ.get("FLASH_STU_GPU_TESTS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM

# Small tensors gain nothing from threads, and a busy machine loses a lot to them.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture
def extra_data() -> Path:
    """The folder of larger data sets that FLASH_STU_EXTRA_DATA names; tests that want it skip without it."""
    folder = os.environ.get("FLASH_STU_EXTRA_DATA")
    if not folder:
        pytest.skip("FLASH_STU_EXTRA_DATA is not set: it names a folder with text/, tiktoken/ and eval_data/")
    return Path(folder)


@pytest.fixture
def tiny_config():
    """Make a small configuration with odd sizes; keyword arguments override its entries."""

    def make(**changes) -> FlashSTUConfig:
        sizes = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "sliding_window": 7,
            "max_position_embeddings": 65,
            "num_filters": 8,
        }
        return FlashSTUConfig(**(sizes | changes))

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """Make a small model in eval mode with weights drawn from a fixed seed."""

    def make(seed: int = 0, **changes) -> FlashSTUForCausalLM:
        torch.manual_seed(seed)
        return FlashSTUForCausalLM(tiny_config(**changes)).eval()

    return make


@pytest.fixture(scope="module")
def scripts():
    """The modules of scripts/bench and scripts/experiments by name; others of their names come back afterwards."""
    folders = [Path(__file__).parents[1] / "scripts" / name for name in ("bench", "experiments")]
    names = [path.stem for folder in folders for path in folder.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path[:0] = map(str, folders)
    yield {name: importlib.import_module(name) for name in names}
    del sys.path[: len(folders)]
    for name in names:
        del sys.modules[name]
    sys.modules.update(others)
