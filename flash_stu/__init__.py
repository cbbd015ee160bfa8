"""Flash STU: hybrid language models of Spectral Transform Units and sliding-window attention."""

from flash_stu import orphans as orphans  # first: it looks at the parent process
from flash_stu.cache import FlashSTUCache
from flash_stu.config import FlashSTUConfig
from flash_stu.errors import UserError
from flash_stu.filters import spectral_filters
from flash_stu.model import FlashSTUForCausalLM, FlashSTUModel

__version__ = "0.1.0"
__all__ = [
    "FlashSTUCache",
    "FlashSTUConfig",
    "FlashSTUForCausalLM",
    "FlashSTUModel",
    "UserError",
    "spectral_filters",
]
