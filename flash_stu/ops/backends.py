"""Optional accelerators: which are usable here, and if one is not, why and how to get it."""

import importlib.metadata
import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch
from packaging.version import Version

from flash_stu.errors import UserError


class Package(NamedTuple):
    """An optional package: what is imported, how it is got, and the oldest release that will do."""

    module: str
    how_to_install: str
    oldest: str | None = None


_PACKAGES = {
    "flash_attn": Package("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flashfftconv": Package(
        "flashfftconv", "see https://github.com/HazyResearch/flash-fft-conv (two CUDA extensions, built from source)"
    ),
    "triton": Package("triton", "it comes with the CUDA builds of torch; else pip install triton"),
    "liger": Package("liger_kernel", "pip install 'liger-kernel>=0.8.5'", oldest="0.8.5"),
}


@cache
def why_not(name: str) -> str | None:
    """Find out why an optional accelerator cannot be used.

    Args:
        name: "flash_attn", "flashfftconv", "flex_attention", "liger" or "triton".

    Returns:
        a clause that completes "... is not available: ", or None if it can be used.
    """
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: on the CPU
    if not torch.cuda.is_available() and not interpreted:
        return "it needs a CUDA GPU, and none is visible"
    package = _PACKAGES.get(name)
    if package is None:
        return None
    if importlib.util.find_spec(package.module) is None:
        return f"the package is not installed ({package.how_to_install})"
    if package.oldest is not None:
        installed = importlib.metadata.version(package.module)
        if Version(installed) < Version(package.oldest):
            return f"release {installed} is too old ({package.how_to_install})"
    return None


def require(kind: str, name: str) -> None:
    """Refuse an explicitly chosen accelerator that cannot run.

    Raises:
        UserError: naming the kind of back end, the choice, and the reason.
    """
    reason = why_not(name)
    if reason is not None:
        raise UserError(f"{kind} back end {name!r} is not available: {reason}; use 'auto'")
