"""Optional accelerators: which are usable here, and if one is not, why and how to get it."""

import importlib.util
from functools import cache

import torch

from flash_stu.errors import UserError

_HOW_TO_INSTALL = {
    "flash_attn": "pip install flash-attn --no-build-isolation",
    "flashfftconv": "see https://github.com/HazyResearch/flash-fft-conv (two CUDA extensions, built from source)",
}


@cache
def why_not(name: str) -> str | None:
    """Say why an optional accelerator cannot be used, or None if it can.

    Args:
        name: "flash_attn", "flashfftconv" or "flex_attention".

    Returns:
        a clause that completes "... is not available: ", or None.
    """
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU, and none is visible"
    if name in _HOW_TO_INSTALL and importlib.util.find_spec(name) is None:
        return f"the package is not installed ({_HOW_TO_INSTALL[name]})"
    return None


def require(kind: str, name: str) -> None:
    """Refuse an explicitly chosen accelerator that cannot run.

    Raises:
        UserError: naming the kind of back end, the choice, and the reason.
    """
    reason = why_not(name)
    if reason is not None:
        raise UserError(f"{kind} back end {name!r} is not available: {reason}; use 'auto'")
