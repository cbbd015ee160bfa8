"""The options of a distillation, without heavy imports, for the command line."""

METHODS, AUTO = ("quadrature", "balanced", "sampled"), "auto"
TOLERANCE = 1e-5  # near what float32 arithmetic adds over 8192 steps, however exact the fit
MAX_STATE_DIM, MAX_AUTO_DIM = 1024, 256
DTYPES = ("float32", "bfloat16")  # of the weights written
VERIFY_TOLERANCE = 1e-3  # relative difference of the logits
