"""Our model classes, as transformers' automatic classes find them: by the configuration, imported when one is wanted.

transformers' own modules are loaded in many orders, some of them in the midst of modules that ours need; so a class is
entered by name and imported when it is looked up.
"""

from importlib import import_module
from typing import Any

from flash_stu.model.config import FlashSTUConfig

CLASSES = {
    "FlashSTUModel": ("modeling", "MODEL_MAPPING"),
    "FlashSTUForCausalLM": ("modeling", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "FlashSTUForSequenceClassification": ("classification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "FlashSTUForTokenClassification": ("classification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    "FlashSTUForTimeSeriesPrediction": ("prediction", "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING"),
}


def model_class(name: str) -> Any:
    """Returns one of `CLASSES`."""
    return getattr(import_module(f"flash_stu.model.{CLASSES[name][0]}"), name)


class _ByName(dict):
    """A dictionary whose values may be names of `CLASSES`: reading gives the class."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        return model_class(value) if isinstance(value, str) else value

    def values(self) -> Any:
        return {key: self[key] for key in self}.values()

    def items(self) -> Any:
        return {key: self[key] for key in self}.items()


_auto: Any = import_module("transformers.models.auto.modeling_auto")
for _name, (_, _mapping) in CLASSES.items():
    _lazy = getattr(_auto, _mapping)
    _lazy._extra_content = _ByName(_lazy._extra_content)  # noqa: SLF001 - its register() takes classes only
    _lazy._extra_content[FlashSTUConfig] = _name  # noqa: SLF001
