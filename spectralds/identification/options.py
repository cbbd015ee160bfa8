"""The options of an identification, without heavy imports, for the command line."""

METHODS, AUTO = ("spectral", "grid", "refine"), "auto"
STATES, MAX_STATES = 512, 4096
