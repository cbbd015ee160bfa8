"""The decoding loop against transformers' generate, and its limits."""

import pytest
import torch

from flash_stu import UserError
from flash_stu.generation import generate_tokens


def run(model, prompt, count, **settings):
    return torch.stack(list(generate_tokens(model, prompt, count, **settings)), dim=1)


def test_greedy_equals_generate(tiny_model):
    model, prompt = tiny_model(), torch.arange(1, 19).view(2, 9)
    expected = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[:, 9:]
    assert torch.equal(run(model, prompt, 20, temperature=0), expected)


def test_seed_decides_the_sample(tiny_model):
    model, prompt = tiny_model(), torch.arange(9)[None]
    first, again, other = (run(model, prompt, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_top_k_and_top_p_narrow_the_choice(tiny_model):
    model, prompt = tiny_model(), torch.arange(9)[None]
    greedy = run(model, prompt, 10, temperature=0)
    assert torch.equal(run(model, prompt, 10, top_k=1), greedy)
    assert torch.equal(run(model, prompt, 10, top_p=1e-6), greedy)


def test_stops_when_every_row_has_ended(tiny_model):
    model, prompt = tiny_model(), torch.arange(1, 19).view(2, 9)
    greedy = run(model, prompt, 20, temperature=0)
    end = greedy[0, 3].item()
    stopped = run(model, prompt, 20, temperature=0, eos_token_id=end)
    row = stopped[0].tolist()
    first = row.index(end)
    assert row[: first + 1] == greedy[0, : first + 1].tolist()
    assert set(row[first:]) == {end}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 0}, "top-k is 0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"max_new_tokens": 57}, "66 together; this model's spectral filters end at 65"),
    ],
)
def test_bad_settings(tiny_model, settings, message):
    with pytest.raises(UserError, match=message):
        list(generate_tokens(tiny_model(), torch.arange(9)[None], **({"max_new_tokens": 1} | settings)))
