"""Sliding-window attention: the choice of a back end, the reference, and the back ends."""
