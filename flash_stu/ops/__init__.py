"""Functions on tensors: convolutions, recurrences, attention and the loss. No modules, no parameters."""

from flash_stu.ops.conv import causal_conv

__all__ = ["causal_conv"]
