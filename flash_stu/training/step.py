"""One optimizer step: micro batches forward and backward, clipping, and the update of the weights."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from flash_stu.distributed import World
from flash_stu.training.parallel import clip_gradients, set_gradient_sync
from flash_stu.training.run_config import RunConfig
from flash_stu.training.sequence_parts import backward_in_pieces, loss_in_pieces, shard_loss


class StepResult(NamedTuple):
    """Results of one step, the same on every process.

    A step whose loss or gradient is not finite is skipped: it uses up its batch and its place in the schedule, and
    leaves weights and moments as they were.
    """

    loss: float  # nats per token, the mean over the global batch
    grad_norm: float  # norm of all gradients before clipping
    taken: bool  # whether the weights were updated
    sums: list[float]  # of the values that the processes passed to `train_step`


def unwatched(_mark: str) -> None:
    """Ignore a mark; the default without a watchdog."""


def train_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: torch.Tensor,
    config: RunConfig,
    world: World,
    values: Iterable[float] = (),
    mark: Callable[[str], object] = unwatched,
    end_of_text: int | None = None,
) -> StepResult:
    """Take one optimizer step; to be called by all processes alike.

    Args:
        model: as `parallelize` returned it.
        optimizers: of its parameters; left without gradients.
        batch: this process's part of the global batch, (sequences, sequence_length + 1), token ids.
        config: the run's.
        world: the processes.
        values: summed over all processes in the same exchange as the loss.
        mark: called with the name of each micro batch before it begins.
        end_of_text: see `token_loss`.
    """
    loss = accumulate_gradients(model, batch, config, world, mark, end_of_text)
    norm = clip_gradients(model, config.train.max_grad_norm)
    mean_loss, *sums = world.sum(loss / world.size, *values)
    taken = math.isfinite(mean_loss) and math.isfinite(norm)
    for optimizer in optimizers:
        if taken:
            optimizer.step()
        optimizer.zero_grad()
    return StepResult(mean_loss, norm, taken, sums)


def accumulate_gradients(
    model: nn.Module,
    batch: torch.Tensor,
    config: RunConfig,
    world: World,
    mark: Callable[[str], object] = unwatched,
    end_of_text: int | None = None,
) -> torch.Tensor:
    """Add up the gradients of this process's part of a global batch; returns its mean loss in nats per token."""
    model.train()
    # all at once: between micro batches a copy from pageable memory would wait for the one before
    micro_batches = batch.to(world.device).split(config.train.micro_batch_size)
    chunks, total = config.train.sequence_chunks, torch.zeros((), device=world.device)
    for index, windows in enumerate(micro_batches):
        name, last = f"micro batch {index + 1} of {len(micro_batches)}", index == len(micro_batches) - 1
        mark(name)
        if chunks > 1:

            def before(piece: int, name: str = name, last: bool = last) -> None:
                mark(f"{name}, piece {piece + 1} of {chunks}")
                set_gradient_sync(model, last and piece == 0, config)

            inputs, labels = _shifted(windows, world.device)
            total += backward_in_pieces(model, inputs, labels, chunks, 1 / len(micro_batches), before)
        else:
            set_gradient_sync(model, last, config)
            loss = token_loss(model, windows, world, None, end_of_text) / len(micro_batches)
            loss.backward()
            total += loss.detach()
    return total


def token_loss(
    model: nn.Module,
    windows: torch.Tensor,
    world: World,
    counted: int | None = None,
    end_of_text: int | None = None,
    chunks: int = 1,
) -> torch.Tensor:
    """Returns the mean nats per token of windows of text; where processes share them, what shard_loss does.

    Args:
        model: as `parallelize` returned it.
        windows: (sequences, sequence_length + 1), token ids.
        world: the processes.
        counted: how many sequences count, the first; None for all.
        end_of_text: the token at which a document begins that is to see nothing before it; None if all see all. That
            token ends the document before it too: as the label of its last position.
        chunks: pieces in which the sequences are run; several give no gradient.
    """
    inputs, labels = _shifted(windows, world.device)
    if counted is not None:
        labels = labels.clone()
        labels[counted:] = -100
    if world.context > 1:
        return shard_loss(model, inputs, labels, world)
    if chunks > 1:
        return loss_in_pieces(model, inputs, labels, chunks)
    documents = None if end_of_text is None else (inputs == end_of_text).cumsum(dim=1)
    return model(input_ids=inputs, seq_idx=documents, shift_labels=labels, skip_logits=True, use_cache=False).loss


def _shifted(windows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns inputs and labels."""
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Returns a seed for the random numbers of one step on one process, so that no generator's state is saved."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
