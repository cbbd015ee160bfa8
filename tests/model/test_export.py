"""torch.export: one program for every length, and one for a step with a cache."""

import pytest
import torch
from torch.export import Dim, export

from flash_stu import FlashSTUCache

LDS = {"lds_state_dim": 8}
ATTENTION = {"layer_types": ["sliding_attention"] * 2}


@pytest.mark.parametrize("changes", [{}, {"stu_branches": "separate"}, LDS, ATTENTION])
@torch.no_grad()
def test_a_program_takes_every_length(tiny_model, changes):
    model = tiny_model(num_hidden_layers=2, **changes)
    model.config.use_cache = False
    ids = torch.arange(80).view(2, 40) % 61
    length = {"input_ids": {1: Dim("length", min=3, max=65)}}
    program = export(model, (), {"input_ids": ids[:, :12].clone()}, dynamic_shapes=length, strict=False).module()
    for count in (5, 12, 33, 40):
        part = ids[:, :count].clone()
        torch.testing.assert_close(program(input_ids=part).logits, model(part).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [LDS, ATTENTION])
@torch.no_grad()
def test_a_program_of_a_step_takes_a_cache(tiny_model, changes):
    model = tiny_model(num_hidden_layers=2, **changes)
    ids = torch.arange(26).view(2, 13) % 61
    caches = [model(ids).past_key_values for _ in range(3)]
    step = {"input_ids": ids[:, :1], "past_key_values": caches[0]}
    program = export(model, (), step, strict=False).module()
    out = program(**step | {"past_key_values": caches[1]})
    assert isinstance(out.past_key_values, FlashSTUCache)
    expected = model(ids[:, :1], past_key_values=caches[2]).logits
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
