"""Model directories that load where nothing of ours has been imported.

transformers finds the classes of an unknown model type through `auto_map` in config.json and a module beside it; ours
only imports the installed package, so there is one implementation and no copied code to go stale.
"""

import json
import os
from pathlib import Path

_MODULE = "modeling_flash_stu"
_SOURCE = '''"""Loads this directory with trust_remote_code=True; the flash_stu package must be installed."""

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM, FlashSTUModel  # noqa: F401
from flash_stu import FlashSTUForSequenceClassification, FlashSTUForTokenClassification  # noqa: F401
from flash_stu import FlashSTUForTimeSeriesPrediction  # noqa: F401
'''
_AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.FlashSTUConfig",
    "AutoModel": f"{_MODULE}.FlashSTUModel",
    "AutoModelForCausalLM": f"{_MODULE}.FlashSTUForCausalLM",
    "AutoModelForSequenceClassification": f"{_MODULE}.FlashSTUForSequenceClassification",
    "AutoModelForTokenClassification": f"{_MODULE}.FlashSTUForTokenClassification",
    "AutoModelForTimeSeriesPrediction": f"{_MODULE}.FlashSTUForTimeSeriesPrediction",
}


def add_remote_code(directory: str | os.PathLike) -> None:
    """Add the module and the auto_map to a saved model directory, and give its weights the permissions of its config.

    (safetensors writes its files for their owner alone.)
    """
    directory = Path(directory)
    (directory / f"{_MODULE}.py").write_text(_SOURCE)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = _AUTO_MAP
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for weights in directory.glob("*.safetensors"):
        weights.chmod(path.stat().st_mode)
