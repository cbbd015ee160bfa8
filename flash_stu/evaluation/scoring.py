"""Log-likelihoods of continuations under a causal language model.

Three things make this cheaper than one forward pass with full logits per request. Only positions whose next
token is scored meet the vocabulary, a bounded number at a time: the logits of one sequence of 8192 tokens and
200,064 words would be 6.6 GB. Requests whose model input is the same, such as the one-letter answers to a
question, share one forward pass. Sequences run longest first in batches of similar length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flash_stu.model import FlashSTUForCausalLM

_LOGITS_AT_ONCE = 2**25  # float32 values held while projecting onto the vocabulary: 128 MiB


@dataclass(frozen=True)
class Window:
    """One forward pass and what to score in it: the targets follow the last len(targets) inputs."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass
class Counters:
    """What scoring cost and what it had to leave out."""

    requests: int = 0
    forward_tokens: int = 0  # padding not counted
    truncated: int = 0  # requests whose context was cut from the left


def split_windows(context: Sequence[int], continuation: Sequence[int], max_length: int) -> list[Window]:
    """Cut a request into windows that fit the model, each token of the continuation scored exactly once.

    A continuation that fits is one window with as much of the context before it as fits. A longer one is cut
    into disjoint stretches of max_length tokens, the last window reaching back as far as it can, as the
    harness's rolling windows do.

    Args:
        context: at least one token id.
        continuation: token ids to score.
        max_length: the longest input, in tokens.
    """
    stream = (*context, *continuation)
    windows = []
    for start in range(0, len(continuation), max_length):
        stop = min(start + max_length, len(continuation))
        last = len(context) + stop - 1
        windows.append(Window(stream[max(0, last - max_length) : last], tuple(continuation[start:stop])))
    return windows


@torch.inference_mode()
def score_windows(
    model: torch.nn.Module,
    windows: Sequence[Window],
    batch_size: int,
    counters: Counters,
    on_progress: Callable[[int], object] = lambda windows_done: None,
) -> list[tuple[float, bool]]:
    """Score every window.

    Args:
        model: a causal language model of transformers.
        windows: what to score.
        batch_size: sequences per forward pass; no effect on the result beyond rounding.
        counters: forward_tokens is added to.
        on_progress: called after each batch with the number of windows it finished.

    Returns:
        per window: the log-likelihood of its targets in nats (summed in float64), and whether greedy decoding
        would have produced them.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}  # inputs -> indices of the windows that have them
    for index, window in enumerate(windows):
        sharing.setdefault(window.inputs, []).append(index)
    rows = sorted(sharing, key=len, reverse=True)

    scores: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        members = [(row, index) for row, inputs in enumerate(batch) for index in sharing[inputs]]
        batch_scores = _score_batch(model, batch, [(row, windows[index].targets) for row, index in members])
        for (_, index), score in zip(members, batch_scores, strict=True):
            scores[index] = score
        counters.forward_tokens += sum(len(inputs) for inputs in batch)
        on_progress(len(members))
    return scores


def _score_batch(model, batch, members) -> list[tuple[float, bool]]:
    """Score the members (row of the batch, targets) of one batch of input sequences (longest first)."""
    device = model.device
    width = len(batch[0])
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # a causal model does not see padding on the right
    for row, inputs in enumerate(batch):
        ids[row, : len(inputs)] = torch.tensor(inputs)

    # One entry per scored token, and the distinct positions that have one.
    lengths = [len(targets) for _, targets in members]
    ends = [row * width + len(batch[row]) for row, _ in members]
    scored = [torch.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    targets = torch.tensor([token for _, targets in members for token in targets], device=device)
    positions, entry_position = torch.unique(torch.cat(scored), return_inverse=True)

    states, head = _states_and_head(model, ids.to(device))
    states = states.flatten(0, 1)[positions.to(device)]
    log_probs, greedy = _project(states, head, model.config.vocab_size, entry_position.to(device), targets)

    sums = [part.sum().item() for part in log_probs.double().cpu().split(lengths)]
    matches = [part.all().item() for part in greedy.cpu().split(lengths)]
    return list(zip(sums, matches, strict=True))


def _project(states, head, vocab_size, entry_position, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of every entry's target and whether it is the likeliest token, piece by piece."""
    log_probs = torch.empty(len(targets), device=states.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=states.device)
    step = max(1, _LOGITS_AT_ONCE // vocab_size)
    for start in range(0, len(states), step):
        logits = head(states[start : start + step]).float()
        here = ((entry_position >= start) & (entry_position < start + step)).nonzero().squeeze(1)
        local = entry_position[here] - start
        log_probs[here] = logits[local, targets[here]] - logits.logsumexp(-1)[local]
        greedy[here] = logits.argmax(-1)[local] == targets[here]
    return log_probs, greedy


def _states_and_head(model, ids: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Run the model up to the vocabulary projection, where that projection is known to be all that follows.

    Other architectures may scale or cap their logits after the projection; they compute them themselves.
    """
    if isinstance(model, FlashSTUForCausalLM):
        return model.model(input_ids=ids, use_cache=False).last_hidden_state, model.get_output_embeddings()
    return model(input_ids=ids, use_cache=False).logits, lambda logits: logits
