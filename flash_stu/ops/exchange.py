"""What the ranks of a context-parallel group send each other, as functions with gradients.

The backward pass of each is the same exchange in reverse, and every rank takes part in it, whatever it got: the ranks'
graphs are alike, so that their autograd engines come to the exchanges in one order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def halo(x: torch.Tensor, size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the last `size` tokens before this rank's, from as many ranks before it as have them.

    Args:
        x: this rank's tokens, (batch, tokens, ...); of one shape on all ranks.
        size: how many; fewer come where the sequence begins.
        group: the ranks.

    Returns:
        (batch, min(size, tokens before), ...), oldest first.
    """
    return _Halo.apply(x, size, group)


def gather(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns every rank's tensor, (ranks, *shape)."""
    return _Gather.apply(own, group)


def receive(zero: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns what the rank before passes to `hand_on`; the first rank gets `zero`, of the same shape."""
    return _Receive.apply(zero, group)


def hand_on(y: torch.Tensor, last: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send `last` to the next rank's `receive`; returns y."""
    return _HandOn.apply(y, last, group)


def _shares(tokens: int, size: int, group: dist.ProcessGroup) -> list[int]:
    """Returns how many tokens of a halo are from the rank 1, 2, ... before."""
    hops = min(-(-size // tokens), dist.get_world_size(group) - 1)
    return [min(tokens, size - hop * tokens) for hop in range(hops)]


def _swap(sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor], group: dist.ProcessGroup) -> None:
    """Send and receive at once, by rank in the group."""
    operations = [
        dist.P2POp(call, tensor, group=group, group_peer=rank)
        for call, tensors in ((dist.isend, sent), (dist.irecv, received))
        for rank, tensor in tensors.items()
    ]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: int, group: dist.ProcessGroup) -> torch.Tensor:
        rank, ranks, tokens = dist.get_rank(group), dist.get_world_size(group), x.shape[1]
        ctx.shares, ctx.group, ctx.shape = _shares(tokens, size, group), group, x.shape
        sent, received = {}, {}
        for hop, share in enumerate(ctx.shares, start=1):
            if rank + hop < ranks:
                sent[rank + hop] = x[:, tokens - share :].contiguous()
            if rank >= hop:
                received[rank - hop] = x.new_empty((x.shape[0], share, *x.shape[2:]))
        _swap(sent, received, group)
        return torch.cat([*reversed(received.values()), x[:, :0]], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rank, ranks, end = dist.get_rank(ctx.group), dist.get_world_size(ctx.group), grad.shape[1]
        to_x = grad.new_zeros(ctx.shape)
        sent, received = {}, {}
        for hop, share in enumerate(ctx.shares, start=1):
            if rank >= hop:
                sent[rank - hop] = grad[:, end - share : end].contiguous()
                end -= share
            if rank + hop < ranks:
                received[rank + hop] = grad.new_empty((ctx.shape[0], share, *ctx.shape[2:]))
        _swap(sent, received, ctx.group)
        for part in received.values():
            to_x[:, ctx.shape[1] - part.shape[1] :] += part
        return to_x, None, None


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
        _swap({}, {before: result} if before >= 0 else {}, group)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        before = dist.get_rank(ctx.group) - 1
        _swap({before: grad.contiguous()} if before >= 0 else {}, {}, ctx.group)
        return torch.zeros_like(grad), None


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, last: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.like = group, (last.shape, last.dtype)
        after = dist.get_rank(group) + 1
        _swap({after: last.contiguous()} if after < dist.get_world_size(group) else {}, {}, group)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        shape, dtype = ctx.like
        to_last = grad.new_zeros(shape, dtype=dtype)
        after = dist.get_rank(ctx.group) + 1
        _swap({}, {after: to_last} if after < dist.get_world_size(ctx.group) else {}, ctx.group)
        return grad, to_last, None
