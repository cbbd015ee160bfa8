"""Log-likelihoods of continuations under a causal language model: what is run, and what is scored in it.

Four things make this cheaper than one forward pass with full logits per request. Requests whose model input is the
same, such as the one-letter answers to a question, share one forward pass. A beginning that several inputs have in
common is run once and carried on from its state (flash_stu.evaluation.sharing). Only positions whose next token is
scored meet the vocabulary, a bounded number at a time: the logits of one sequence of 8192 tokens and 200,064 words
would be 6.6 GB. Batches hold sequences of similar length, as many as a budget of tokens allows.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.evaluation.resume import Journal
from flash_stu.evaluation.sharing import Family, deal, plan_families
from flash_stu.model.cache import FlashSTUCache
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.progress import Progress

_LOGITS_AT_ONCE = 2**25  # float32 values held while projecting onto the vocabulary: 128 MiB
_CPU_TOKENS = 4096  # in a forward pass; more gains nothing on a CPU
_GPU_TOKENS = 65536  # halved until it fits
_PAST_SHARE = 4  # tokens of state in a batch weigh this many times less than tokens to run

Item = TypeVar("Item")


@dataclass(frozen=True)
class Window:
    """One forward pass and what to score in it: the targets follow the last len(targets) inputs."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The probabilities of a window's targets."""

    log_probs: np.ndarray  # of every target in nats, float32; or only their sum, in float64
    greedy: bool  # whether greedy decoding would have produced them

    @property
    def log_likelihood(self) -> float:
        """Their sum, in float64."""
        return float(self.log_probs.sum(dtype=np.float64))


@dataclass
class Counters:
    """Work done for some requests, and what was left out."""

    requests: int = 0
    forward_tokens: int = 0  # run through the model, padding not counted
    forward_tokens_unshared: int = 0  # what one forward pass per request would have run
    truncated: int = 0  # requests whose context was cut from the left
    truncated_tokens: int = 0  # how much was cut off
    beyond_trained_length: int = 0  # longer requests that the model's state could take


@dataclass
class Budget:
    """Tokens in a forward pass, padding included, and optionally sequences; less where a GPU's memory is too small."""

    tokens: int  # at most, unless a single sequence is longer
    rows: int | None = None  # sequences at most; None for any number

    @classmethod
    def automatic(cls, device: torch.device, rows: int | None = None) -> "Budget":
        """Returns the budget to begin with on a device."""
        return cls(_GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS, rows)

    def run(
        self, items: Sequence[Item], weight: Callable[[Item], int], function: Callable[[Sequence[Item]], object]
    ) -> None:
        """Call a function with batches of items, in order; a batch that the GPU's memory does not hold is halved.

        Args:
            items: heaviest first, so that the first of a batch says how wide it is.
            weight: tokens of an item.
            function: called with every batch; again with smaller ones where it ran out of memory.

        Raises:
            UserError: if there is no memory for a single item.
        """
        start = 0
        while start < len(items):
            widest = max(1, weight(items[start]))
            count = max(1, min(len(items) - start, self.tokens // widest, self.rows or len(items)))
            with suppress(torch.OutOfMemoryError):
                function(items[start : start + count])
                start += count
                continue
            torch.cuda.empty_cache()  # here, where no traceback holds on to tensors any more
            if count == 1:
                raise UserError(f"the GPU's memory does not hold one sequence of {widest} tokens")
            self.tokens = max(1, min(self.tokens, count * widest) // 2)


def split_windows(context: Sequence[int], continuation: Sequence[int], max_length: int | None) -> list[Window]:
    """Cut a request into windows that fit the model, each token of the continuation scored exactly once.

    A continuation that fits is one window with as much of the context, at least one token, before it as fits. A longer
    one is cut into disjoint stretches of max_length tokens (None for no limit), the last window reaching back as far as
    it can, as the harness's rolling windows do.
    """
    stream = (*context, *continuation)
    longest = max_length or max(1, len(stream))
    windows = []
    for start in range(0, len(continuation), longest):
        stop = min(start + longest, len(continuation))
        last = len(context) + stop - 1
        windows.append(Window(stream[max(0, last - longest) : last], tuple(continuation[start:stop])))
    return windows


def score_windows(
    model: torch.nn.Module,
    windows: Sequence[Window],
    budget: Budget,
    counters: Counters,
    progress: Progress | None = None,
    world: World | None = None,
    journal: Journal | None = None,
) -> list[Score]:
    """Score every window.

    Args:
        model: a causal language model of transformers.
        windows: what to score.
        budget: how much to run at a time; no effect on the result beyond rounding.
        counters: the tokens run are added.
        progress: told how many tokens there are for this process, and how many are done.
        world: the processes that share the work; each has all the windows, and gets all the scores.
        journal: scores that it holds are not computed again, new ones are added; of the former only the sum is known.

    Returns:
        a score per window.

    Raises:
        UserError: if the GPU's memory does not hold a single sequence.
    """
    progress, world = progress or Progress(enabled=False), world or World()
    sharing: dict[tuple[int, ...], list[int]] = {}  # inputs -> indices of the windows that have them
    for index, window in enumerate(windows):
        sharing.setdefault(window.inputs, []).append(index)
    inputs, members = list(sharing), list(sharing.values())
    lengths = [len(ids) for ids in inputs]
    if isinstance(model, FlashSTUForCausalLM):
        scored = [max(len(windows[index].targets) for index in group) for group in members]
        families = plan_families(inputs, [length - count for length, count in zip(lengths, scored, strict=True)])
    else:  # only our own models can continue from a state whatever their layers are
        families = [Family(0, (row,)) for row in range(len(inputs))]

    counters.forward_tokens += sum(family.tokens(lengths) for family in families)
    counters.forward_tokens_unshared += sum(len(window.inputs) for window in windows)
    noted = {} if journal is None else journal.known()
    known = {row: [Score(np.array([total]), greedy) for total, greedy in some] for row, some in noted.items()}
    left = [Family(f.prefix, tuple(row for row in f.members if row not in known)) for f in families]
    mine = deal([family for family in left if family.members], lengths, world.size)[world.rank]
    progress.start(sum(family.tokens(lengths) for family in mine))
    run = _Run(model, inputs, [[windows[i].targets for i in group] for group in members], budget, progress, journal)
    with torch.inference_mode(), _cheapest_state(model):
        found = run.score(mine)
    progress.close()

    scores: dict[int, Score] = {}
    for part in [known, *world.gather(found)]:
        for row, row_scores in part.items():
            scores |= zip(members[row], row_scores, strict=True)
    return [scores[index] for index in range(len(windows))]


@contextmanager
def _cheapest_state(model: torch.nn.Module) -> Iterator[None]:
    """Let STU layers keep their inputs and nothing else: what FutureFill prepares is for single steps."""
    if not (isinstance(model, FlashSTUForCausalLM) and model.config.uses_stu):
        yield
        return
    before, model.config.decode_backend = model.config.decode_backend, "naive"
    try:
        yield
    finally:
        model.config.decode_backend = before


class _Run:
    """One process's forward passes over distinct inputs ("rows"), each with the continuations to score after it."""

    def __init__(
        self,
        model: Any,
        inputs: Sequence[tuple[int, ...]],
        targets: Sequence[Sequence[tuple[int, ...]]],
        budget: Budget,
        progress: Progress,
        journal: Journal | None,
    ) -> None:
        self.model, self.inputs, self.targets = model, inputs, targets
        self.budget, self.progress, self.journal = budget, progress, journal
        self.scores: dict[int, list[Score]] = {}

    def score(self, families: Sequence[Family]) -> dict[int, list[Score]]:
        """Returns the scores of the families' rows, by row."""
        self._score_rows({row: 0 for family in families if not family.prefix for row in family.members})
        by_prefix: dict[int, list[Family]] = {}
        for family in families:
            if family.prefix:
                by_prefix.setdefault(family.prefix, []).append(family)
        # Prefixes in a batch are equally long: no padding in front of anything, so no masks.
        for prefix in sorted(by_prefix, reverse=True):
            self.budget.run(by_prefix[prefix], lambda family: family.prefix, self._score_families)
        return self.scores

    def _score_families(self, families: Sequence[Family]) -> None:
        prefix = families[0].prefix
        ids = torch.tensor([self.inputs[family.members[0]][:prefix] for family in families])
        cache = FlashSTUCache(self.model.config.num_hidden_layers)
        self._hidden(ids, cache)
        self.progress.update(ids.numel())
        places = {row: place for place, family in enumerate(families) for row in family.members}
        self._score_rows(places, prefix, cache)

    def _score_rows(self, places: Mapping[int, int], prefix: int = 0, cache: FlashSTUCache | None = None) -> None:
        """Score rows, after the states in a cache that hold the first `prefix` tokens of each at its place."""

        def run(batch: Sequence[int]) -> None:
            past = None
            if cache is not None:
                past = copy.copy(cache)  # selecting makes new states, and leaves the cache to the next batch
                past.batch_select_indices(torch.tensor([places[row] for row in batch], device=self.model.device))
            self._score_batch(batch, prefix, past)
            self.progress.update(sum(len(self.inputs[row]) - prefix for row in batch))

        ordered = sorted(places, key=lambda row: len(self.inputs[row]), reverse=True)
        self.budget.run(ordered, lambda row: len(self.inputs[row]) - prefix + prefix // _PAST_SHARE, run)

    def _score_batch(self, batch: Sequence[int], prefix: int, past: FlashSTUCache | None) -> None:
        device = self.model.device
        rests = [self.inputs[row][prefix:] for row in batch]
        width = len(rests[0])
        ids = torch.zeros(len(batch), width, dtype=torch.long)  # a causal model does not see padding on the right
        for place, rest in enumerate(rests):
            ids[place, : len(rest)] = torch.tensor(rest)

        # One entry per scored token, and the distinct positions that have one.
        continuations = [(place, targets) for place, row in enumerate(batch) for targets in self.targets[row]]
        lengths = [len(targets) for _, targets in continuations]
        ends = [place * width + len(rests[place]) for place, _ in continuations]
        scored = [torch.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        tokens = torch.tensor([token for _, targets in continuations for token in targets], device=device)
        positions, entry_position = torch.unique(torch.cat(scored), return_inverse=True)

        states, head = self._hidden(ids, past)
        states = states.flatten(0, 1)[positions.to(device)]
        log_probs, greedy = _project(states, head, self.model.config.vocab_size, entry_position, tokens)

        parts = zip(continuations, log_probs.cpu().split(lengths), greedy.cpu().split(lengths), strict=True)
        found: dict[int, list[Score]] = {row: [] for row in batch}
        for (place, _), some, matches in parts:
            found[batch[place]].append(Score(some.numpy(), bool(matches.all())))
        self.scores |= found
        if self.journal is not None:
            self.journal.add({row: [(s.log_likelihood, s.greedy) for s in some] for row, some in found.items()})

    def _hidden(self, ids: torch.Tensor, cache: FlashSTUCache | None) -> tuple[torch.Tensor, Callable]:
        """Run the model up to the vocabulary projection, where that projection is known to be all that follows.

        Other architectures may scale or cap their logits after the projection; they compute them themselves.
        The cache's states are carried on from and extended.

        Returns:
            states (rows, width, channels) of ids (rows, width), and the function from states to logits.
        """
        ids = ids.to(self.model.device)
        if not isinstance(self.model, FlashSTUForCausalLM):
            return self.model(input_ids=ids, use_cache=False).logits, lambda logits: logits
        run, head = self.model.model, self.model.lm_head
        piece = ids.shape[1]
        if not self.model.config.uses_stu:  # an input of any length, in pieces that fit
            piece = max(1, self.budget.tokens // len(ids))
            if cache is None and piece < ids.shape[1]:
                cache = FlashSTUCache(self.model.config.num_hidden_layers)
        parts = [run(input_ids=part, past_key_values=cache).last_hidden_state for part in ids.split(piece, dim=1)]
        return torch.cat(parts, dim=1), head


def _project(
    states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    entry_position: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probability of every entry's target and whether it is the likeliest token.

    The head takes states (positions, channels) to logits, some positions at a time; an entry has a position and a
    target.

    Args:
        entry_position: (entries,), on the CPU, where choosing some waits for no GPU.
        targets: (entries,), where the states are.
    """
    log_probs = torch.empty(len(targets), device=states.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=states.device)
    step = max(1, _LOGITS_AT_ONCE // vocab_size)
    for start in range(0, len(states), step):
        logits = head(states[start : start + step]).float()
        here = ((entry_position >= start) & (entry_position < start + step)).nonzero().squeeze(1)
        local = (entry_position[here] - start).to(states.device)
        here = here.to(states.device)
        log_probs[here] = logits[local, targets[here]] - logits.logsumexp(-1)[local]
        greedy[here] = logits.argmax(-1)[local] == targets[here]
    return log_probs, greedy
