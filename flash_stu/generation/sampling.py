"""From logits to the next token: the settings of sampling, and the sampler that applies them."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

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

    A row takes one uniform number: the token is where the cumulative sum of the probabilities passes it. Nothing here
    waits for a GPU.

    Args:
        sampling: the settings.
        prompt: (batch, length) tokens that count as already in the text.
        mask: (batch, length), False at padding.
        vocab_size: length of a row of logits.
    """

    def __init__(self, sampling: Sampling, prompt: torch.Tensor, mask: torch.Tensor, vocab_size: int) -> None:
        self.sampling = sampling
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompt), vocab_size, dtype=torch.bool, device=prompt.device)
            self.seen[mask.nonzero()[:, 0], prompt[mask]] = True
        self.generator = None
        if sampling.seed is not None:
            self.generator = torch.Generator(prompt.device).manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose one token per row of logits (batch, vocab_size) and remember it: (batch,)."""
        logits = logits.float()
        if self.seen is not None:
            # transformers' processor does this from all tokens so far, which costs more with every one of them
            penalty = self.sampling.repetition_penalty
            change = torch.minimum if penalty > 1 else torch.maximum  # a negative logit is multiplied, another divided
            logits = torch.where(self.seen, change(logits * penalty, logits / penalty), logits)
        if self.sampling.temperature == 0:
            token = logits.argmax(dim=-1)
        else:
            weights, tokens = candidates(logits, self.sampling)
            shape = len(logits), 1
            uniform = torch.rand(shape, dtype=torch.float64, device=logits.device, generator=self.generator)
            place = draw(weights, uniform)
            token = (place if tokens is None else tokens.gather(1, place))[:, 0]
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        return token


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the distribution that a token is drawn from.

    Args:
        logits: (batch, vocab_size) in float32; -inf for a token that must not come.
        sampling: temperature (not 0), top_k, top_p and min_p are applied, in this order.

    Returns:
        weights (batch, candidates), the likeliest token's 1, the others' in proportion to their probabilities, 0 for
        those left out; and the candidates' tokens, of the same shape, or None if they are the vocabulary in its order.
    """
    largest = logits.amax(dim=1, keepdim=True)
    if (sampling.top_k or math.inf) < logits.shape[1] or (sampling.top_p or 1) < 1:
        weights, tokens = _likeliest(logits, largest, sampling)
    else:
        weights, tokens = _weights(logits, largest, sampling), None
    if sampling.min_p:
        weights = torch.where(weights < sampling.min_p, 0, weights)
    return weights, tokens


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Returns places in rows of weights (batch, n): the inverse distribution functions at uniform (batch, draws).

    The numbers are float64 in [0, 1); weights are added up in float64. A place of weight 0 is never returned.
    """
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def _weights(logits: torch.Tensor, largest: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)  # 0 / 0 is no weight
    return (logits - largest).div_(temperature).exp_()


def _likeliest(logits: torch.Tensor, largest: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weights and tokens after top_k and top_p, the likeliest first, of equals that of the lowest number."""
    k, p = sampling.top_k or math.inf, sampling.top_p or 1
    mass = None
    if k < logits.shape[1]:
        least = logits.topk(int(k)).values[:, -1:]  # as likely as the last of the k is enough
        chosen = logits >= least.clamp(min=torch.finfo(torch.float32).min)
    else:
        weights = _weights(logits, largest, sampling)
        mass = p * weights.sum(dim=1, keepdim=True, dtype=torch.float64)
        chosen = weights > _level(weights, mass)
    found, tokens = _sorted(logits, chosen)
    weights = _weights(found, largest, sampling)
    if p < 1:
        cumulative = weights.cumsum(dim=1, dtype=torch.float64)
        weights = torch.where(cumulative - weights < (p * cumulative[:, -1:] if mass is None else mass), weights, 0)
    return weights, tokens


def _level(weights: torch.Tensor, mass: torch.Tensor) -> float:
    """Returns a high level above which the weights of every row add up to its mass and more than rounding beyond it.

    On a GPU, which would have to be waited for, it is 0; so it is where nothing higher is high enough.
    """
    level, low, high = 0.0, 32.0, 0.0  # in nats below the likeliest
    for _ in range(8 if weights.device.type == "cpu" else 0):
        middle = (low + high) / 2
        above = F.threshold(weights, math.exp(-middle), 0).sum(dim=1, keepdim=True)
        if bool((above > (1 + 1e-5) * mass).all()):
            level, low = math.exp(-middle), middle
        else:
            high = middle
    return level


def _sorted(logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the chosen logits of each row in falling order, -inf after them, and their tokens."""
    if logits.device.type != "cpu":  # how many are chosen is not known here
        found = torch.where(chosen, logits, -math.inf).sort(dim=1, descending=True, stable=True)
        return found.values, found.indices
    count = chosen.sum(dim=1)
    row, token = chosen.nonzero(as_tuple=True)
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    tokens = token.new_zeros(len(logits), int(count.max()))
    tokens[row, place] = token
    found = torch.full(tokens.shape, -math.inf)
    found[row, place] = logits[row, token]
    found, order = found.sort(dim=1, descending=True, stable=True)
    return found, tokens.gather(1, order)
