"""Spectral filters to linear dynamical systems: fitting, bounds, distilling a model, reports."""

from spectralds.bank import FilterBank
from spectralds.distill import distill
from spectralds.fit import LDSFit, fit_lds

__all__ = ["FilterBank", "LDSFit", "distill", "fit_lds"]
