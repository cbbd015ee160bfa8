"""Functions on tensors: convolutions, recurrences, attention and the loss. No modules, no parameters.

`causal_conv` is imported when it is first used: the names of the back ends are known without it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash_stu.ops.conv.choice import causal_conv

__all__ = ["causal_conv"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flash_stu.ops.conv import choice

    return getattr(choice, name)
