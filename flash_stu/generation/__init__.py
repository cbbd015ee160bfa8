"""Generation: the decoding loop, sampling, streaming text, and a step that a CUDA graph can replay."""

from flash_stu.generation.loop import generate_text, generate_tokens
from flash_stu.generation.sampling import Sampling

__all__ = ["Sampling", "generate_text", "generate_tokens"]
