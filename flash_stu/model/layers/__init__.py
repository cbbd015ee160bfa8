"""The layers of a block. Every sequence mixer has `whole` for a whole sequence, `prefill` for a sequence that leaves
a state behind, and `step` for one more token; a test holds the three together."""

from flash_stu.model.layers.attention import SlidingWindowAttention
from flash_stu.model.layers.bidirectional import Bidirectional
from flash_stu.model.layers.lds import LDS
from flash_stu.model.layers.mlp import GatedMLP
from flash_stu.model.layers.stu import STU
from flash_stu.model.layers.taps import InputOutputTaps

__all__ = ["LDS", "STU", "Bidirectional", "GatedMLP", "InputOutputTaps", "SlidingWindowAttention"]
