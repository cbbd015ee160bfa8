"""Flash STU: hybrid language and sequence models of Spectral Transform Units and sliding-window attention.

Names are imported when they are first used. Importing the package makes the model known to transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from flash_stu import registration

if TYPE_CHECKING:
    from flash_stu.errors import UserError
    from flash_stu.evaluation.runner import evaluate
    from flash_stu.filters.spectral import spectral_filters
    from flash_stu.generation.loop import generate_text
    from flash_stu.generation.sampling import Sampling
    from flash_stu.model.cache import FlashSTUCache
    from flash_stu.model.classification import FlashSTUForSequenceClassification, FlashSTUForTokenClassification
    from flash_stu.model.config import FlashSTUConfig
    from flash_stu.model.loading import load_model
    from flash_stu.model.modeling import FlashSTUForCausalLM, FlashSTUModel
    from flash_stu.model.prediction import FlashSTUForTimeSeriesPrediction

__version__ = "0.3.0.dev0"
__all__ = [
    "FlashSTUCache",
    "FlashSTUConfig",
    "FlashSTUForCausalLM",
    "FlashSTUForSequenceClassification",
    "FlashSTUForTimeSeriesPrediction",
    "FlashSTUForTokenClassification",
    "FlashSTUModel",
    "Sampling",
    "UserError",
    "evaluate",
    "generate_text",
    "load_model",
    "spectral_filters",
]
_MODULES = {
    "FlashSTUCache": "model.cache",
    "FlashSTUConfig": "model.config",
    "FlashSTUForCausalLM": "model.modeling",
    "FlashSTUForSequenceClassification": "model.classification",
    "FlashSTUForTimeSeriesPrediction": "model.prediction",
    "FlashSTUForTokenClassification": "model.classification",
    "FlashSTUModel": "model.modeling",
    "Sampling": "generation.sampling",
    "UserError": "errors",
    "evaluate": "evaluation.runner",
    "generate_text": "generation.loop",
    "load_model": "model.loading",
    "spectral_filters": "filters.spectral",
}

registration.install()


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
