"""Sliding-window attention: the choice of a back end, the reference, and the back ends."""

from flash_stu.ops.attention.choice import BACKENDS, sliding_window_attention
from flash_stu.ops.attention.dense import attend_to_window

__all__ = ["BACKENDS", "attend_to_window", "sliding_window_attention"]
