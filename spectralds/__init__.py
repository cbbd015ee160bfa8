"""Linear dynamical systems from spectral filters and from data: fitting, bounds, distilling a model, identification.

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectralds.bank import FilterBank
    from spectralds.distillation import distill
    from spectralds.fit import LDSFit, fit_lds
    from spectralds.identification.select import identify
    from spectralds.identification.system import SymmetricLDS

__all__ = ["FilterBank", "LDSFit", "SymmetricLDS", "distill", "fit_lds", "identify"]
_MODULES = {
    "FilterBank": "bank",
    "LDSFit": "fit",
    "SymmetricLDS": "identification.system",
    "distill": "distillation",
    "fit_lds": "fit",
    "identify": "identification.select",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
