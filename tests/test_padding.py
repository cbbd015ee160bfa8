"""Padding anywhere gives every row what it gets alone, from any call and at every later step; the rest is refused."""

import pytest
import torch

from flash_stu import UserError
from flash_stu.generation.loop import generate_tokens
from flash_stu.generation.sampling import Sampling
from flash_stu.model.cache import FlashSTUCache
from flash_stu.model.layers import LDS

VARIANTS = {
    "futurefill": {"decode_backend": "futurefill"},
    "epoched": {"decode_backend": "futurefill_epoched", "stu_branches": "separate"},
    "naive full": {"decode_backend": "naive", "stu_type": "full"},
    "lds": {"lds_state_dim": 12},
    "lds full alibi": {"lds_state_dim": 12, "stu_type": "full", "position_embedding": "alibi"},
    "stu only": {"layer_types": ["linear_attention"] * 4},
    "attention only": {"layer_types": ["sliding_attention"] * 4},
    "no positions": {"layer_types": ["sliding_attention"] * 4, "position_embedding": "none"},
}
MASKS = {
    "right": [[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1], [1] * 9, [0, 1, 1, 0, 1, 1, 1, 0, 0]],
    "left": [[0] * 4 + [1] * 5, [0] * 8 + [1], [1] * 9],
}


@pytest.fixture
def make(tiny_model):
    def build(**changes):
        model = tiny_model(tie_word_embeddings=False, **changes)
        for layer in model.modules():
            if isinstance(layer, LDS):
                torch.nn.init.normal_(layer.readout)
                layer.decay.data.copy_(torch.linspace(-0.9, 0.95, len(layer.decay)))
        return model

    return build


def batch(mask):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(61, (3, 9), generator=generator), torch.tensor(MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_prompt_and_steps_equal_each_row_alone(make, changes, mask):
    model, (ids, mask) = make(**changes), batch(mask)
    new = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(4))
    cache = FlashSTUCache(4)
    found = [model(ids, attention_mask=mask, past_key_values=cache).logits]
    torch.testing.assert_close(found[0], model(ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-4)
    for step, token in enumerate(new.split(1, dim=1)):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        given = mask if step % 2 else None  # a step may repeat the mask or not
        found.append(model(token, attention_mask=given, past_key_values=cache).logits)
    found = torch.cat(found, dim=1)
    everything = torch.cat([ids, new], dim=1)
    again = model(everything, attention_mask=mask).logits
    for row in range(3):
        real = mask[row].bool()
        alone = model(everything[row : row + 1, real]).logits[0]
        torch.testing.assert_close(found[row, real], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(again[row, real], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [VARIANTS["futurefill"], VARIANTS["lds"]], ids=["stu", "lds"])
def test_generation_after_padding_anywhere(make, changes):
    model = make(**changes)
    for name in MASKS:
        ids, mask = batch(name)
        settings = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
        ours = torch.stack(list(generate_tokens(model, ids, 15, Sampling(temperature=0), mask)), dim=1)
        assert torch.equal(model.generate(ids, **settings)[:, 9:], ours)
        beams = model.generate(ids, num_beams=2, **settings)
        assert torch.equal(beams, model.generate(ids, num_beams=2, use_cache=False, **settings))
        for row in range(3):
            alone = generate_tokens(model, ids[row : row + 1, mask[row].bool()], 15, Sampling(temperature=0))
            assert torch.equal(torch.cat(list(alone)), ours[row])


@torch.no_grad()
def test_a_longer_chunk_continues_a_padded_prompt(make):
    model, (ids, mask) = make(), batch("right")
    more = torch.arange(12).view(3, 4)
    cache = FlashSTUCache(4)
    model(ids, attention_mask=mask, past_key_values=cache)
    longer = torch.cat([mask, torch.ones_like(more)], dim=1)
    found = model(more, attention_mask=longer, past_key_values=cache).logits
    whole = model(torch.cat([ids, more], dim=1), attention_mask=longer).logits
    torch.testing.assert_close(found, whole[:, 9:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_gradients_and_losses_know_no_padding(make):
    model, (ids, mask) = make(), batch("holes")
    labels = ids.masked_fill(mask == 0, -100)
    with torch.enable_grad():
        # the next token of a row is the next real one
        real = [ids[row, mask[row].bool()] for row in range(3)]
        logits = model(ids, attention_mask=mask.bool()).logits
        for row, tokens in enumerate(real):
            alone = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:])
            padded = torch.nn.functional.cross_entropy(logits[row][mask[row].bool()][:-1], tokens[1:])
            torch.testing.assert_close(alone, padded)
    assert model(ids, attention_mask=mask, labels=labels).loss.isfinite()


ONES = torch.ones(3, 9)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 8), r"has shape \(3, 8\); needed: a tensor of \(3, 9\)"),
        (torch.ones(9), r"has shape \(9,\)"),
        (torch.ones(3, 1, 9, 9), r"has shape \(3, 1, 9, 9\)"),
        ([[1] * 9] * 3, "has type list"),
        (ONES * 2, "values other than 0"),
        (-ONES, "values other than 0"),
        (ONES * 0.5, "values other than 0"),
        (torch.zeros(3, 9), "hides every token of row 0"),
        (torch.tensor([[1] * 9, [0] * 9, [1] * 9]), "hides every token of row 1"),
        (torch.where(ONES.cumsum(1) > 5, -torch.inf, 0.0), "values other than 0"),
    ],
)
def test_masks_that_cannot_be(make, mask, message):
    model, (ids, _) = make(num_hidden_layers=2), batch("left")
    with pytest.raises(UserError, match=message):
        model(ids, attention_mask=mask)
    with pytest.raises(UserError, match=message):
        list(generate_tokens(model, ids, 1, Sampling(repetition_penalty=1.2), mask))


@pytest.mark.parametrize("first", [None, "left", "right"])
@torch.no_grad()
def test_later_masks_that_contradict_the_first(make, first):
    model, cache, token = make(num_hidden_layers=2), FlashSTUCache(2), torch.ones(3, 1, dtype=torch.long)
    ids, mask = batch(first or "left")
    model(ids, attention_mask=mask if first else None, past_key_values=cache)
    other = torch.cat([batch("holes")[1], token], dim=1)
    with pytest.raises(UserError, match="hides other tokens of the cache"):
        model(token, attention_mask=other, past_key_values=cache)
    late = torch.cat([mask if first else torch.ones_like(mask), token * 0], dim=1)
    with pytest.raises(UserError, match="hides tokens after those in the cache"):
        model(token, attention_mask=late, past_key_values=cache)
    if first:
        with pytest.raises(UserError, match="hides other tokens of the cache"):
            model(token, attention_mask=torch.ones(3, 10), past_key_values=cache)
