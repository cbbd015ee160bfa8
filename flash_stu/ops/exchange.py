"""What the ranks of a context-parallel group send each other, as functions with gradients.

The backward pass of each is the same exchange in reverse, and every rank takes part in it, whatever it got: the ranks'
graphs are alike, so that their autograd engines come to the exchanges in one order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


class Halo:
    """The last `size` tokens before this rank's, on their way from as many ranks before it as have them.

    They are sent for when this is made, and their gradients as soon as these are known. Whatever is computed between
    that and `wait` runs meanwhile, and so does its backward pass while the gradients are on their way.

    Args:
        x: this rank's tokens, (batch, tokens, ...); of one shape on all ranks.
        size: how many; fewer come where the sequence begins.
        group: the ranks.
    """

    def __init__(self, x: torch.Tensor, size: int, group: dist.ProcessGroup) -> None:
        self.group, self.shape = group, x.shape
        tokens, rank, ranks = x.shape[1], dist.get_rank(group), dist.get_world_size(group)
        hops = range(1, min(-(-size // tokens), ranks - 1) + 1)
        share = {hop: min(tokens, size - (hop - 1) * tokens) for hop in hops}  # of the tokens of the rank that far away
        self.before = {rank - hop: share[hop] for hop in hops if rank >= hop}
        self.after = {rank + hop: share[hop] for hop in hops if rank + hop < ranks}
        self.like = x.new_empty(0)
        self.moving = _Moving({}, {}, group)
        self.token = _Depart.apply(x, self)

    @torch.compiler.disable(recursive=True)
    def wait(self) -> torch.Tensor:
        """Returns (batch, min(size, tokens before), ...), oldest first."""
        token, self.token = self.token, None  # the graph refers to this, so this not to the graph
        return _Arrive.apply(token, self)

    def place(self, tokens: int) -> torch.Tensor:
        """Returns memory for so many."""
        return self.like.new_empty((self.shape[0], tokens, *self.shape[2:]))


def gather(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns every rank's tensor, (ranks, *shape)."""
    return _Gather.apply(own, group)


def receive(zero: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns what the rank before passes to `hand_on`; the first rank gets `zero`, of the same shape."""
    return _Receive.apply(zero, group)


def hand_on(y: torch.Tensor, last: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send `last` to the next rank's `receive`; returns y."""
    return _HandOn.apply(y, last, group)


class _Moving:
    """Tensors by rank in the group, sent and received at once; `wait` returns the latter."""

    def __init__(
        self, sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor], group: dist.ProcessGroup
    ) -> None:
        operations = [
            dist.P2POp(call, tensor, group=group, group_peer=rank)
            for call, tensors in ((dist.isend, sent), (dist.irecv, received))
            for rank, tensor in tensors.items()
        ]
        self.works = dist.batch_isend_irecv(operations) if operations else []
        self.sent, self.received = sent, received

    def wait(self) -> dict[int, torch.Tensor]:
        for work in self.works:
            work.wait()
        received = self.received
        self.works, self.sent, self.received = [], {}, {}  # memory to keep until here, and no longer
        return received


class _Depart(torch.autograd.Function):
    """Send tokens off; the result, nothing, holds `_Arrive` behind it in the graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, halo: Halo) -> torch.Tensor:
        ctx.halo = halo
        sent = {rank: x[:, x.shape[1] - share :].contiguous() for rank, share in halo.after.items()}
        received = {rank: halo.place(share) for rank, share in halo.before.items()}
        halo.moving = _Moving(sent, received, halo.group)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        to_x = grad.new_zeros(ctx.halo.shape)
        for part in ctx.halo.moving.wait().values():
            to_x[:, to_x.shape[1] - part.shape[1] :] += part
        return to_x, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, halo: Halo) -> torch.Tensor:  # noqa: ARG004 - for its gradient
        ctx.halo = halo
        received = halo.moving.wait()
        return torch.cat([*reversed(received.values()), halo.place(0)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        halo, end, sent = ctx.halo, grad.shape[1], {}
        for rank, share in halo.before.items():
            sent[rank] = grad[:, end - share : end].contiguous()
            end -= share
        received = {rank: halo.place(share) for rank, share in halo.after.items()}
        halo.moving = _Moving(sent, received, halo.group)
        return grad.new_empty(0), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        result = own.new_empty((dist.get_world_size(group), *own.shape))
        dist.all_gather(list(result), own.contiguous(), group=group)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        to_own = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter(to_own, list(grad.contiguous()), group=ctx.group)
        return to_own, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zero: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        result = torch.zeros_like(zero, memory_format=torch.contiguous_format)
        before = dist.get_rank(group) - 1
        _Moving({}, {before: result} if before >= 0 else {}, group).wait()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        before = dist.get_rank(ctx.group) - 1
        _Moving({before: grad.contiguous()} if before >= 0 else {}, {}, ctx.group).wait()
        return torch.zeros_like(grad), None


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, last: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.like = group, (last.shape, last.dtype)
        after = dist.get_rank(group) + 1
        _Moving({after: last.contiguous()} if after < dist.get_world_size(group) else {}, {}, group).wait()
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, dtype = ctx.like
        to_last = grad.new_zeros(shape, dtype=dtype)
        after = dist.get_rank(ctx.group) + 1
        _Moving({}, {after: to_last} if after < dist.get_world_size(ctx.group) else {}, ctx.group).wait()
        return grad, to_last, None
