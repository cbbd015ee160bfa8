"""Flash STU: hybrid language models of Spectral Transform Units and sliding-window attention."""

from flash_stu import orphans as orphans  # first: it looks at the parent process
from flash_stu.errors import UserError
from flash_stu.filters.spectral import spectral_filters
from flash_stu.model.cache import FlashSTUCache
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.modeling import FlashSTUForCausalLM, FlashSTUModel

__version__ = "0.1.0"
__all__ = [
    "FlashSTUCache",
    "FlashSTUConfig",
    "FlashSTUForCausalLM",
    "FlashSTUModel",
    "UserError",
    "spectral_filters",
]
