"""Spectral filters to linear dynamical systems: fitting, bounds, distilling a model, reports.

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectralds.bank import FilterBank
    from spectralds.distillation import distill
    from spectralds.fit import LDSFit, fit_lds

__all__ = ["FilterBank", "LDSFit", "distill", "fit_lds"]
_MODULES = {"FilterBank": "bank", "LDSFit": "fit", "distill": "distillation", "fit_lds": "fit"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
