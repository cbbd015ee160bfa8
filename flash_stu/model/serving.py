"""Support for `transformers serve`, which looks for a model's class in what it knows as the module transformers.

That may be another object than everybody else's: transformers executes itself a second time as it is loaded.
"""

from importlib import import_module

from flash_stu.model.classification import FlashSTUForSequenceClassification
from flash_stu.model.modeling import FlashSTUForCausalLM

for _model in (FlashSTUForCausalLM, FlashSTUForSequenceClassification):
    setattr(import_module("transformers.cli.serving.model_manager").transformers, _model.__name__, _model)
