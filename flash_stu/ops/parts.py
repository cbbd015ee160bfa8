"""A sequence in parts: what every layer has to know of the parts before the one it is called with.

A causal layer reads the past through a *halo*, the last few tokens before its part, and through *states*, decayed sums
over all of it. The parts are either pieces that follow each other on one device (`Piece`), or shards that the ranks of
a context-parallel group work on at the same time (`Shard`). A layer is written once for both: it asks a `Past` for what
it needs, and hands over what its own part adds.

Parts begin at even positions, so that the two phases of a layer of dilation 2 are the same in all of them. Everything
here is differentiable. What goes from part to part has a size that does not depend on the sequence's length.

Source: halo exchange as in any domain decomposition; states as in Gu & Dao 2024 (arXiv 2405.21060), section 8.2.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from flash_stu.filters.exponentials import powers
from flash_stu.ops import exchange


def part_size(length: int, parts: int) -> int:
    """Returns the tokens in each of so many parts of a sequence, an even number; the last one may have fewer."""
    return 2 * -(-length // (2 * parts))


class Part(ABC):
    """One part of a sequence.

    Args:
        start: tokens before it.
        length: tokens of the whole sequence.
    """

    def __init__(self, start: int, length: int) -> None:
        self.start, self.length = start, length

    @abstractmethod
    def before(self, layer: int) -> "Past":
        """Returns what one layer of the model can ask about the parts before."""


class Arriving(Protocol):
    """A tensor on its way."""

    def wait(self) -> torch.Tensor:
        """Returns it once it is there."""
        ...


class Past(ABC):
    """The parts before one, seen from a layer, which calls the methods in the same order in every part."""

    @abstractmethod
    def begin_halo(self, x: torch.Tensor, size: int) -> "Arriving":
        """Begin to fetch the last `size` tokens before this part, fewer where the sequence begins.

        Args:
            x: those of this part, (batch, tokens, ...).
            size: the same in all parts.

        Returns:
            what can be waited for: what a layer computes before that is computed meanwhile.
        """

    def halo(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Returns the tokens that `begin_halo` fetches."""
        return self.begin_halo(x, size).wait()

    @abstractmethod
    def states(self, own: torch.Tensor, decay: torch.Tensor, steps: int) -> torch.Tensor:
        """Returns the states before this part: the sums of `own` over the parts before, each decayed by its distance.

        Args:
            own: states after this part, from zero before it, (..., states).
            decay: per step, (states,).
            steps: in this part.
        """

    @abstractmethod
    def receive(self, zero: torch.Tensor) -> torch.Tensor:
        """Returns what the part before handed on, waiting for it; `zero`, which requires a gradient, in the first."""

    @abstractmethod
    def hand_on(self, y: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Hand `last` to the next part; returns y, through which the gradient of `last` is to come."""


class Piece(Part):
    """A part that is run after the ones before it, in the same process.

    Args:
        start, length: see Part.
        carried: by layer, what the piece before has `left`; empty for the first.

    Attributes:
        left: by layer, what this piece leaves to the next.
    """

    def __init__(self, start: int, length: int, carried: dict[int, list[torch.Tensor]]) -> None:
        super().__init__(start, length)
        self.carried, self.left = carried, {}

    @torch.compiler.disable(recursive=True)
    def before(self, layer: int) -> Past:
        self.left[layer] = []  # begun anew when a layer is recomputed
        return _CarriedPast(self.carried.get(layer, []), self.left[layer])


class _Here:
    """A tensor that need not be waited for."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    @torch.compiler.disable(recursive=True)
    def wait(self) -> torch.Tensor:
        return self.value


class _CarriedPast(Past):
    """What was left behind, value by value in the order in which the layer asks."""

    def __init__(self, carried: list[torch.Tensor], left: list[torch.Tensor]) -> None:
        self.carried, self.left = carried, left

    def _take(self, zero: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.carried[len(self.left)] if self.carried else zero()

    @torch.compiler.disable(recursive=True)
    def begin_halo(self, x: torch.Tensor, size: int) -> Arriving:
        known = self._take(lambda: x[:, :0])
        kept = max(size - x.shape[1], 0)
        last = torch.cat([known[:, max(known.shape[1] - kept, 0) :], x[:, max(x.shape[1] - size, 0) :]], dim=1)
        self.left.append(last)
        return _Here(known)

    @torch.compiler.disable(recursive=True)
    def states(self, own: torch.Tensor, decay: torch.Tensor, steps: int) -> torch.Tensor:
        known = self._take(lambda: torch.zeros_like(own))
        over = powers(decay, decay.new_tensor([steps], dtype=torch.float64))[0]
        self.left.append(over.to(own.dtype) * known + own)
        return known

    def receive(self, zero: torch.Tensor) -> torch.Tensor:
        return self._take(lambda: zero)

    @torch.compiler.disable(recursive=True)
    def hand_on(self, y: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        self.left.append(last.clone())  # not a view that keeps all of y
        return y


class Shard(Part):
    """The part of one rank of a context-parallel group, which all run at the same time.

    Args:
        size: tokens of a shard, the same for all: the sequence is filled up at its end.
        length: tokens of the sequence.
        group: the ranks, in the order of their shards.
    """

    def __init__(self, size: int, length: int, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group) * size, length)
        self._past = _PastOfRank(group)

    def before(self, layer: int) -> Past:  # noqa: ARG002 - all layers ask the same ranks
        return self._past


class _PastOfRank(Past):
    """The ranks before this one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.group = dist.get_rank(group), group

    @torch.compiler.disable(recursive=True)
    def begin_halo(self, x: torch.Tensor, size: int) -> Arriving:
        return exchange.Halo(x, size, self.group)

    @torch.compiler.disable(recursive=True)
    def states(self, own: torch.Tensor, decay: torch.Tensor, steps: int) -> torch.Tensor:
        earlier = exchange.gather(own, self.group)[: self.rank]
        distance = steps * torch.arange(self.rank - 1, -1, -1, dtype=torch.float64, device=own.device)
        factors = powers(decay, distance).to(own.dtype)
        with torch.autocast(own.device.type, enabled=False):
            return torch.einsum("r...s,rs->...s", earlier, factors)

    @torch.compiler.disable(recursive=True)
    def receive(self, zero: torch.Tensor) -> torch.Tensor:
        return exchange.receive(zero, self.group)

    @torch.compiler.disable(recursive=True)
    def hand_on(self, y: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return exchange.hand_on(y, last, self.group)
