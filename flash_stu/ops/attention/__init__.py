"""Sliding-window attention: the choice of a back end, the reference, and the back ends."""

BACKENDS = ("auto", "banded", "sdpa", "flex_attention", "flash_attn")
