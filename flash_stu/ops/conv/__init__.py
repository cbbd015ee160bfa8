"""Causal convolutions: the choice of a back end, the reference, and the back ends."""

from flash_stu.ops.conv.choice import BACKENDS, causal_conv, spectral_conv

__all__ = ["BACKENDS", "causal_conv", "spectral_conv"]
