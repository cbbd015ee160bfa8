"""Cross entropy of a linear head: the choice of a back end, and the back ends."""

BACKENDS = ("auto", "chunked", "triton", "liger")
IGNORED = -100  # the label of a position that does not count
