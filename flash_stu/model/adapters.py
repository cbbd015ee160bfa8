"""The linear maps that PEFT adapts in a Flash STU model if it is not told: those of attention, STU and LDS layers.

And a check: PEFT leaves out what an adapter has for modules that the model has not.
"""

import re
from functools import wraps
from importlib import import_module
from typing import Any

from flash_stu.errors import UserError
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.layers.linear import join

TARGET_MODULES = ["qkv_proj", "o_proj", "in_proj"]

_constants = import_module("peft.utils.constants")
_constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[FlashSTUConfig.model_type] = TARGET_MODULES
_tuner: Any = import_module("peft.tuners.tuners_utils").BaseTuner
_inject = _tuner.inject_adapter


@wraps(_inject)
def _inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    if isinstance(getattr(model, "config", None), FlashSTUConfig):
        _check_targets(self.peft_config[adapter_name].target_modules)
    return _inject(self, model, adapter_name, *args, **kwargs)


def _check_targets(targets: Any) -> None:
    """Refuse names, or a pattern, of layers that are parts of fused ones."""
    for target in [targets] if isinstance(targets, str) else targets or []:
        for word in re.findall(r"\w+", target):
            if joined := join(word):
                raise UserError(
                    f"target_modules names {word}, which is a part of {joined[0]} since version 0.3.0: adapt that, or "
                    "merge an older adapter into its model with the version that trained it"
                )


_tuner.inject_adapter = _inject_adapter
