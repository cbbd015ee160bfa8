"""The static step: the same tokens as the plain loop, in the same memory."""

import pytest
import torch

from flash_stu import FlashSTUCache, UserError
from flash_stu.generation import static_step
from flash_stu.generation.loop import generate_tokens
from flash_stu.generation.sampling import Sampling
from flash_stu.generation.static_step import StaticStep
from flash_stu.model.cache import state_tensors
from flash_stu.model.layers import LDS

VARIANTS = [
    {"lds_state_dim": 12},
    {"lds_state_dim": 12, "stu_branches": "separate", "position_embedding": "alibi", "num_key_value_heads": 2},
    {"lds_state_dim": 12, "stu_type": "full", "layer_types": ["linear_attention"] * 4},
    {"layer_types": ["sliding_attention"] * 4},
]


@pytest.fixture
def make(tiny_model):
    """A model whose LDS layers do something."""

    def build(**changes):
        model = tiny_model(**changes)
        for layer in model.modules():
            if isinstance(layer, LDS):
                torch.nn.init.normal_(layer.readout, std=0.3)
                layer.decay.data.copy_(torch.linspace(0.2, 0.999, len(layer.decay)))
        return model

    return build


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_same_logits_in_the_same_memory(make, changes):
    model = make(**changes)
    ids, mask = torch.arange(27).view(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    caches = [FlashSTUCache(4) for _ in range(2)]
    for cache in caches:
        model(ids, attention_mask=mask, past_key_values=cache)
    step = StaticStep(model, caches[1])
    places = sorted(tensor.data_ptr() for state in step.states for tensor in state_tensors(state))
    torch.manual_seed(0)
    for _ in range(20):
        token = torch.randint(61, (3, 1))
        expected = model(token, past_key_values=caches[0]).logits[:, -1]
        torch.testing.assert_close(step(token), expected, atol=1e-6, rtol=1e-6)
    assert sorted(tensor.data_ptr() for state in step.states for tensor in state_tensors(state)) == places
    assert step.position.item() == 29


def test_the_step_compiles_to_one_graph(make, monkeypatch):
    whole = torch.compile(static_step._step, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(static_step, "_compiled_step", lambda: whole)
    model = make(lds_state_dim=12, num_hidden_layers=2, position_embedding="alibi")
    ids, settings = torch.arange(18).view(2, 9), Sampling(temperature=0)
    plain, compiled = (
        torch.stack(list(generate_tokens(model, ids, 30, settings, compile=flag))) for flag in (False, True)
    )
    assert torch.equal(plain, compiled)


def test_growing_states_are_refused(tiny_model):
    with pytest.raises(UserError, match="has STU layers: distill it"):
        list(generate_tokens(tiny_model(), torch.arange(9)[None], 3, compile=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and FLASH_STU_GPU_TESTS=1")
@pytest.mark.parametrize("compile", [False, True])
@torch.no_grad()
def test_graph_on_a_gpu(make, compile):
    model = make(lds_state_dim=12).cuda()
    ids = torch.arange(18, device="cuda").view(2, 9)
    expected = ids
    for _ in range(30):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    tokens = torch.stack(list(generate_tokens(model, ids, 30, Sampling(temperature=0), compile=compile)), dim=1)
    assert torch.equal(tokens, expected[:, 9:])
