"""Choosing tokens: against the definitions in float64, transformers' processors and frequencies."""

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from flash_stu import UserError
from flash_stu.generation import sampling as module
from flash_stu.generation.sampling import Sampler, Sampling, candidates, draw

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


INF = torch.inf
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 3000},
    {"top_k": 10**9},
    {"top_p": 1},
    {"top_p": 1e-300},
    {"top_p": 0.5},
    {"top_p": 0.99},
    {"min_p": 0.1},
    {"min_p": 1},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.3, "top_k": 10**9, "top_p": 0.95},
    {"top_k": 700, "top_p": 1, "min_p": 1e-3},
]


def rows(size):
    """Logits of many kinds: steep, flat, from a 16-bit float (many are equal), one token only, few allowed."""
    random = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    one = torch.full((size,), -INF)
    one[size // 2] = -7.0
    few = random[2].clone()
    few[torch.arange(size) % (size // 3) != 0] = -INF
    steep = 6 * random[0]
    return torch.stack([steep, 0.01 * random[1], (3 * random[2]).bfloat16().float(), one, few, torch.zeros(size)])


def defined(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The probabilities of one row (a list) by the definition, in float64; of equals at an edge, the first."""
    shift = max(logits)
    weights = [math.exp((x - shift) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = [i for i in order if logits[i] >= logits[order[min(top_k or len(order), len(order)) - 1]]]
    if top_p is not None and top_p < 1:
        mass, before = top_p * math.fsum(weights[i] for i in kept), [0.0]
        for i in kept:
            before.append(before[-1] + weights[i])
        kept = [i for i, sum_ in zip(kept, before, strict=False) if sum_ < mass]
    kept = [i for i in kept if weights[i] >= (min_p or 0)]
    total = math.fsum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept if weights[i] > 0}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [7, 5000])
def test_candidates_are_those_of_the_definition(settings, size):
    logits = rows(size)
    weights, tokens = candidates(logits, Sampling(**settings))
    tokens = torch.arange(size).expand_as(weights) if tokens is None else tokens
    for number, row in enumerate(logits.tolist()):
        expected = defined(row, **settings)
        some = weights[number] > 0
        found = dict(zip(tokens[number][some].tolist(), weights[number][some].double().tolist(), strict=True))
        total = sum(found.values())
        found = {token: weight / total for token, weight in found.items()}
        assert found == pytest.approx(expected, rel=1e-4), number


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_choosing_before_sorting_changes_nothing(monkeypatch, settings):
    logits = rows(5000)
    first = candidates(logits, Sampling(**settings))
    monkeypatch.setattr(module, "_level", lambda weights, mass: 0.0)
    monkeypatch.setattr(module, "_sorted", lambda logits, chosen: sort_all(logits.where(chosen, -INF)))
    second = candidates(logits, Sampling(**settings))
    for number in range(len(logits)):
        (weights, tokens), (found, others) = (
            (w[number][w[number] > 0], t[number][w[number] > 0] if t is not None else None) for w, t in (first, second)
        )
        torch.testing.assert_close(weights, found, rtol=1e-5, atol=0)
        assert tokens is None if others is None else torch.equal(tokens, others)


def sort_all(logits):
    return logits.sort(dim=1, descending=True, stable=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and FLASH_STU_GPU_TESTS=1")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_gpu_has_the_same_distribution(settings):
    logits, uniform = rows(5000), torch.rand(6, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = []
    for device in ("cpu", "cuda"):
        weights, tokens = candidates(logits.to(device), Sampling(**settings))
        place = draw(weights, uniform.to(device))
        drawn.append((place if tokens is None else tokens.gather(1, place)).cpu())
    assert (drawn[0] != drawn[1]).double().mean() < 0.01  # a number may fall between two sums


def test_a_batch_is_its_rows():
    logits = rows(5000)[:2]
    together, _ = candidates(logits, Sampling(top_p=0.9))
    for row, alone in zip(together, logits, strict=True):
        weights, _ = candidates(alone[None], Sampling(top_p=0.9))
        assert (row > 0).sum() == (weights > 0).sum()


def test_draw_inverts_the_distribution_function():
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 5.0, 0.0], [0.0, 0.0, 8.0, 0.0, 0.0, 0.0]])  # eighths: sums are exact
    below = 1 - 2.0**-53  # the largest number below 1
    uniform = torch.tensor([[0, 0.25 * below, 0.25, 0.375 * below, 0.375, below]], dtype=torch.float64).expand(2, -1)
    assert draw(weights, uniform).tolist() == [[1, 1, 3, 3, 4, 4], [2] * 6]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.1}], ids=str)
def test_evenly_spaced_numbers_draw_in_proportion(settings):
    logits, count = 2 * torch.randn(1, 300, generator=torch.Generator().manual_seed(1)), 20_000
    weights, tokens = candidates(logits, Sampling(**settings))
    place = draw(weights, (torch.arange(count, dtype=torch.float64)[None] + 0.5) / count)
    drawn = torch.bincount((place if tokens is None else tokens.gather(1, place))[0], minlength=300)
    expected = torch.zeros(300, dtype=torch.float64)
    for token, probability in defined(logits[0].tolist(), **settings).items():
        expected[token] = probability
    # an interval of length p holds between p count - 1 and p count + 1 of the numbers; rounding moves its ends
    assert (drawn - count * expected).abs().max() <= 1 + 1e-5 * count
    assert (drawn[expected == 0] == 0).all()


def test_a_large_vocabulary_of_which_little_is_allowed():
    logits = torch.full((2, 200_064), -INF)
    logits[:, [5, 199_999]] = torch.tensor([0.0, 1.0])
    nothing = torch.zeros(2, 0, dtype=torch.long)
    for settings in SETTINGS:
        choose = Sampler(Sampling(seed=3, **settings), nothing, nothing.bool(), 200_064)
        assert all(set(choose(logits).tolist()) <= {5, 199_999} for _ in range(3)), settings


@pytest.mark.parametrize("temperature", [0, 1e-310, 1e-30])
def test_the_coldest_is_greedy(temperature):
    logits = rows(7)[:4]
    choose = Sampler(Sampling(temperature=temperature, top_p=0.9, top_k=3), *[torch.zeros(4, 0).long()] * 2, 7)
    assert torch.equal(choose(logits), logits.argmax(dim=1))


@pytest.mark.parametrize("penalty", [0.6, 1.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    torch.manual_seed(0)
    choose, processor = sampler(temperature=0, repetition_penalty=penalty), RepetitionPenaltyLogitsProcessor(penalty)
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
