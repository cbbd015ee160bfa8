"""Why an accelerator cannot be used, case by case, on a machine that need not have any."""

import importlib.metadata
import importlib.util

import pytest
import torch

from flash_stu import UserError
from flash_stu.ops.backends import require, why_not


@pytest.fixture
def machine(monkeypatch):
    """Pretend to a GPU and to installed packages {module: release}."""

    def pretend(gpu: bool, **releases: str) -> None:
        why_not.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda module: releases.get(module))
        monkeypatch.setattr(importlib.metadata, "version", releases.__getitem__)

    yield pretend
    why_not.cache_clear()


ALL = ["flash_attn", "flashfftconv", "flex_attention", "liger"]


@pytest.mark.parametrize("name", ALL)
def test_nothing_works_without_a_gpu(machine, name):
    machine(gpu=False, flash_attn="2.8", flashfftconv="0", liger_kernel="0.8.5")
    assert "needs a CUDA GPU" in why_not(name)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("flash_attn", "pip install flash-attn"),
        ("flashfftconv", "HazyResearch"),
        ("liger", "pip install 'liger-kernel"),
    ],
)
def test_a_missing_package_comes_with_how_to_get_it(machine, name, how):
    machine(gpu=True)
    assert "not installed" in why_not(name) and how in why_not(name)
    with pytest.raises(UserError, match=f"loss back end '{name}' is not available: .*; use 'auto'"):
        require("loss", name)


def test_an_old_release_is_refused_by_number(machine):
    machine(gpu=True, liger_kernel="0.7.0")
    assert "0.7.0 is too old (pip install 'liger-kernel>=0.8.5')" in why_not("liger")


@pytest.mark.parametrize("name", ALL)
def test_what_is_there_is_used(machine, name):
    machine(gpu=True, flash_attn="2.8", flashfftconv="0", liger_kernel="0.10.0rc1")
    assert why_not(name) is None
    require("loss", name)
