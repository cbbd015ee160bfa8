"""Causal convolutions: the choice of a back end, the reference, and the back ends."""

ANY_FILTER_BACKENDS = ("auto", "direct", "fft", "flashfftconv")
BACKENDS = (*ANY_FILTER_BACKENDS, "chunked", "triton")
PARTIAL_BACKENDS = ("auto", "chunked", "triton")  # of a sequence in parts, see flash_stu.ops.parts
