"""Spectral filters and the sums of decaying exponentials that they are."""

from flash_stu.filters.spectral import spectral_filters

__all__ = ["spectral_filters"]
