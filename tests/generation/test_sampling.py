"""Choosing tokens: against transformers' processors and against frequencies."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from flash_stu import UserError
from flash_stu.generation.sampling import Sampler, Sampling

PROMPT = torch.tensor([[3, 3, 5], [1, 2, 0]])
MASK = torch.tensor([[True, True, True], [False, True, True]])


def sampler(rows=2, vocab=11, **settings):
    return Sampler(Sampling(**settings), PROMPT[:rows], MASK[:rows], vocab)


def frequencies(logits, draws=4000, **settings):
    nothing = torch.zeros(draws, 0, dtype=torch.long)
    choose = Sampler(Sampling(seed=0, **settings), nothing, nothing.bool(), len(logits))
    return torch.bincount(choose(torch.tensor([logits]).expand(draws, -1)), minlength=len(logits)) / draws


def test_temperature_and_truncations_give_their_distributions():
    logits = [2.0, 1.0, 0.0, -1.0, -9.0]
    whole = torch.tensor(logits).softmax(0)
    cases = {
        (): whole,
        (("temperature", 2.0),): (torch.tensor(logits) / 2).softmax(0),
        (("top_k", 2),): torch.tensor([*logits[:2], *[-torch.inf] * 3]).softmax(0),
        (("top_p", 0.9),): torch.tensor([*logits[:3], *[-torch.inf] * 2]).softmax(0),
        (("min_p", 0.3),): torch.tensor([*logits[:2], *[-torch.inf] * 3]).softmax(0),
    }
    for settings, expected in cases.items():
        observed = frequencies(logits, **dict(settings))
        assert (observed - expected).abs().max() < 0.03, settings
        assert (observed[expected == 0] == 0).all(), settings


def test_repetition_penalty_is_that_of_transformers():
    torch.manual_seed(0)
    choose, processor = sampler(temperature=0, repetition_penalty=1.7), RepetitionPenaltyLogitsProcessor(1.7)
    texts = [[3, 3, 5], [2, 0]]  # without the padding
    for _ in range(6):
        logits = 3 * torch.randn(2, 11)
        tokens = choose(logits)
        for row, text in enumerate(texts):
            expected = processor(torch.tensor([text]), logits[row : row + 1].clone()).argmax()
            assert tokens[row] == expected
            text.append(expected.item())


def test_a_strong_penalty_forbids_repetition_and_padding_is_not_text():
    choose = sampler(temperature=0, repetition_penalty=1e6)
    rows = torch.stack([choose(torch.arange(11, 0, -1).float().expand(2, -1)) for _ in range(8)], dim=1)
    assert rows[0].tolist() == [0, 1, 2, 4, 6, 7, 8, 9]
    assert rows[1].tolist() == [1, 3, 4, 5, 6, 7, 8, 9]  # 1 was padding


def test_seed():
    logits = torch.zeros(2, 11)
    first, again, other = (
        torch.stack([choose(logits) for _ in range(30)]) for choose in (sampler(seed=s) for s in (1, 1, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])  # rows of a batch draw apart


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature is -1; allowed: 0 .greedy. or positive"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; allowed: 1 or more"),
        ({"top_p": 1.5}, "top_p is 1.5; allowed: above 0, up to 1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"min_p": -0.1}, "min_p is -0.1; allowed: 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; allowed: positive"),
        ({"seed": -3}, "seed is -3; allowed: 0 or more"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
