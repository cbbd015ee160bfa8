"""The loss of sequences that no single forward pass holds whole, and its exact gradients.

In pieces on one device (train.sequence_chunks): a first sweep over them keeps nothing but what each hands to the next;
then they are run again from the last to the first, each with its graph, and the gradient of what a piece took over is
handed to the piece before. So activations are those of one piece, for one more forward pass.

In shards over the ranks of a group (parallel.context): each rank has the loss of its own tokens. What the layers need
of the other ranks they exchange themselves, forward and backward.

Source: Pieces with recomputation are Chen et al. 2016 (arXiv 1604.06174) along the sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from flash_stu.distributed import World
from flash_stu.ops.cross_entropy import IGNORED
from flash_stu.ops.parts import Piece, Shard, part_size


def shard_loss(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, world: World) -> torch.Tensor:
    """Returns this rank's share of the mean loss, times the ranks that share a sequence.

    The mean over all processes, of the loss as of its gradients, then is that over the sequences.

    Args:
        model: as `parallelize` returned it.
        inputs, labels: whole sequences, (batch, length).
        world: whose group has this sequence.
    """
    length, group = inputs.shape[1], world.sequence_group
    size, items = part_size(length, world.context), _count(labels)
    part = Shard(size, length, group)
    own, missing = slice(part.start, part.start + size), max(part.start + size - length, 0)
    inputs = pad(inputs[:, own], (0, min(missing, size)))  # at the end of the sequence, where nothing sees it
    labels = pad(labels[:, own], (0, min(missing, size)), value=IGNORED)
    return _call(model, inputs, part, shift_labels=labels, num_items_in_batch=items).loss * world.context


def loss_in_pieces(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, chunks: int) -> torch.Tensor:
    """Returns the mean loss, without a graph.

    Args:
        model: as `parallelize` returned it.
        inputs, labels: whole sequences, (batch, length).
        chunks: pieces.
    """
    total, carried = torch.zeros((), device=inputs.device), {}
    items = _count(labels)
    with torch.no_grad():
        for place in _places(inputs.shape[1], chunks):
            piece = Piece(place.start, inputs.shape[1], carried)
            named = {"shift_labels": labels[:, place], "num_items_in_batch": items}
            total = total + _call(model, inputs[:, place], piece, **named).loss
            carried = piece.left
    return total


def backward_in_pieces(
    model: nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    chunks: int,
    scale: float,
    before: Callable[[int], object],
) -> torch.Tensor:
    """Add to the gradients those of the mean loss times `scale`; returns that.

    Args:
        model: as `parallelize` returned it.
        inputs, labels: whole sequences, (batch, length).
        chunks: pieces.
        scale: see above.
        before: called before a piece is run with its graph, with the number of those that come after it.
    """
    length, items = inputs.shape[1], _count(labels)
    places = _places(length, chunks)
    seeds = torch.randint(2**62, (len(places),)).tolist()  # the second sweep drops what the first has dropped
    carried: list[dict[int, list[torch.Tensor]]] = [{}]
    with torch.no_grad():
        for place, seed in zip(places[:-1], seeds, strict=False):
            torch.manual_seed(seed)
            piece = Piece(place.start, length, carried[-1])
            _call(model, inputs[:, place], piece)
            carried.append(piece.left)
    total, gradients = torch.zeros((), device=inputs.device), {}
    for number in reversed(range(len(places))):
        before(number)
        torch.manual_seed(seeds[number])
        taken = {layer: [x.detach().requires_grad_() for x in values] for layer, values in carried.pop().items()}
        piece = Piece(places[number].start, length, taken)
        named = {"shift_labels": labels[:, places[number]], "num_items_in_batch": items}
        loss = _call(model, inputs[:, places[number]], piece, **named).loss * scale
        left = [
            (value, gradient)
            for layer, asked in gradients.items()
            for value, gradient in zip(piece.left[layer], asked, strict=True)
            if gradient is not None and value.requires_grad
        ]
        torch.autograd.backward([loss, *(value for value, _ in left)], [None, *(gradient for _, gradient in left)])
        gradients = {layer: [x.grad for x in values] for layer, values in taken.items()}
        total += loss.detach()
    return total


def _call(model: nn.Module, inputs: torch.Tensor, part: Any, **named: Any) -> Any:
    return model(input_ids=inputs, part=part, skip_logits=True, use_cache=False, **named)


def _count(labels: torch.Tensor) -> torch.Tensor:
    return (labels != IGNORED).sum()


def _places(length: int, chunks: int) -> list[slice]:
    size = part_size(length, chunks)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
