"""What PEFT adapts in a Flash STU model if it is not told: the linear maps of attention, STU and LDS layers."""

from importlib import import_module

from flash_stu.model.config import FlashSTUConfig

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj"]

_constants = import_module("peft.utils.constants")
_constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[FlashSTUConfig.model_type] = TARGET_MODULES
