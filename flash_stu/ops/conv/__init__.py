"""Causal convolutions: the choice of a back end, the reference, and the back ends."""
