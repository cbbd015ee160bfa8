"""The generation cache: one state per layer and the number of tokens seen.

The only file that touches transformers' Cache, whose own layers assume keys and values, or states of a fixed shape.
Ours are defined by the layers (flash_stu.model.layers.state): the cache only stores them and picks rows of the batch.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import MappingKey, register_pytree_node
from transformers import Cache


class FlashSTUCache(Cache):
    """States of all layers after `seq_length` tokens.

    Attributes:
        states: per layer the state it returned last, or None before the first token.
        seq_length: tokens seen, padding included.
        mask: (batch, length) of the first call, False at its padding; None if there was none.
        padding: how many tokens of padding each row begins with since they were aligned, (batch, 1); None as the mask.
    """

    # constants where transformers computes properties from its layers
    is_compileable = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    is_initialized = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    is_croppable = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    is_sliding = (False,)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.states: list[Any] = [None] * num_layers
        self.seq_length = 0
        self.mask: torch.Tensor | None = None
        self.padding: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self.seq_length

    def get_max_length(self, *_: Any, **__: Any) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        return self.seq_length + query_length, 0

    def reset(self) -> None:
        self.states = [None] * len(self.states)
        self.seq_length = 0
        self.mask = self.padding = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.states = [None if state is None else state.select(indices) for state in self.states]
        if self.mask is not None and self.padding is not None:
            self.mask, self.padding = self.mask.index_select(0, indices), self.padding.index_select(0, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        size = self.batch_size
        self.batch_select_indices(torch.arange(size, device=self._tensor().device).repeat_interleave(repeats))

    def crop(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a recurrent state cannot be rolled back; speculative decoding is not supported")

    @property
    def batch_size(self) -> int:
        return -1 if self.states[0] is None else self._tensor().shape[0]

    def _tensor(self) -> torch.Tensor:
        return next(state_tensors(self.states[0]))


def _flatten(cache: FlashSTUCache) -> tuple[list[Any], int]:
    return [cache.states, cache.mask, cache.padding], cache.seq_length


def _flatten_with_keys(cache: FlashSTUCache) -> tuple[list[tuple[Any, Any]], int]:
    return [(MappingKey(name), getattr(cache, name)) for name in ("states", "mask", "padding")], cache.seq_length


def _unflatten(parts: Iterable[Any], seq_length: int) -> FlashSTUCache:
    states, mask, padding = parts
    cache = FlashSTUCache(len(states))
    cache.states, cache.mask, cache.padding, cache.seq_length = list(states), mask, padding, seq_length
    return cache


# so that torch.export and FSDP's hooks find the tensors in a cache
register_pytree_node(
    FlashSTUCache,
    _flatten,
    _unflatten,
    serialized_type_name="flash_stu.FlashSTUCache",
    flatten_with_keys_fn=_flatten_with_keys,
)


def state_tensors(state: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    """Yields all tensors in one layer's state, and in the states in it, in the order of the fields."""
    for field in state:
        if isinstance(field, torch.Tensor):
            yield field
        elif isinstance(field, tuple):
            yield from state_tensors(field)
