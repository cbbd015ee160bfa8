"""From logits to the next token: the settings of sampling, and the sampler that applies them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flash_stu.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token, with the meanings and the order of transformers' generate.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores the next three.
        top_k: sample among the k most likely tokens only; None for all.
        top_p: sample among the fewest tokens whose probabilities add up to p; None for all.
        min_p: sample among the tokens at least p times as likely as the likeliest; None for all.
        repetition_penalty: positive logits of tokens already in the text are divided by it, negative ones multiplied.
        seed: of the sampling; None uses torch's global generator.

    Raises:
        UserError: for a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or positive")
        _check("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more")
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0, up to 1")
        _check("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "positive; 1 for no penalty")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "0 or more, below 2**63")


def _check(name: str, value: float | None, good: bool, allowed: str) -> None:
    if not good:
        raise UserError(f"{name} is {value}; allowed: {allowed}")


class Sampler:
    """Chooses tokens for a batch of texts; its cost and memory do not depend on how long they are.

    Args:
        sampling: the settings.
        prompt: (batch, length) tokens that count as already in the text.
        mask: (batch, length), False at padding.
        vocab_size: length of a row of logits.
    """

    def __init__(self, sampling: Sampling, prompt: torch.Tensor, mask: torch.Tensor, vocab_size: int) -> None:
        self.penalty = sampling.repetition_penalty
        self.seen = None
        if self.penalty != 1:
            self.seen = torch.zeros(len(prompt), vocab_size, dtype=torch.bool, device=prompt.device)
            self.seen[mask.nonzero()[:, 0], prompt[mask]] = True
        self.greedy = sampling.temperature == 0
        self.warp: Any = LogitsProcessorList()  # of processors that do not look at the text
        if sampling.temperature not in (0, 1):
            self.warp.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            self.warp.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None and sampling.top_p < 1:
            self.warp.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p:
            self.warp.append(MinPLogitsWarper(float(sampling.min_p)))
        self.generator = None
        if sampling.seed is not None:
            self.generator = torch.Generator(prompt.device).manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose one token per row of logits (batch, vocab_size) and remember it: (batch,)."""
        logits = logits.float()
        if self.seen is not None:
            # transformers' processor does this from all tokens so far, which costs more with every one of them
            penalised = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = torch.where(self.seen, penalised, logits)
        if self.greedy:
            token = logits.argmax(dim=-1)
        else:
            probabilities = self.warp(None, logits).softmax(dim=-1)
            token = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        return token
