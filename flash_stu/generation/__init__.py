"""Generation: the decoding loop, sampling, streaming text, and a step that a CUDA graph can replay."""
