"""The model as transformers sees it: reload, cache, padding, generate, pipelines, and its initialisation."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flash_stu import FlashSTUCache, FlashSTUConfig, FlashSTUForCausalLM, UserError
from flash_stu.model.cache import state_tensors

VARIANTS = [
    {"stu_type": "tensordot", "stu_branches": "shared"},
    {"stu_type": "tensordot", "stu_branches": "separate", "num_key_value_heads": 2},
    {"stu_type": "full", "stu_branches": "positive", "filter_basis": "hankel_l"},
    {"stu_type": "full", "stu_branches": "shared", "position_embedding": "alibi"},
    {"layer_types": ["linear_attention"] * 4},
    {"filter_basis": "tensor", "tensor_filters": 3, "stu_branches": "separate"},
    {"layer_types": ["sliding_attention"] * 4, "tie_word_embeddings": False, "bias": True},
]


def state_bytes(cache):
    return sum(tensor.nbytes for state in cache.states for tensor in state_tensors(state))


def tokens(batch=3, length=29):
    torch.manual_seed(5)
    return torch.randint(0, 61, (batch, length))


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_cached_tokens_equal_the_full_forward(tiny_model, changes):
    model, ids = tiny_model(**changes), tokens()
    whole = model(ids).logits
    out = model(ids[:, :11], use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    parts.append(model(ids[:, 11:14], past_key_values=cache).logits)
    parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(14, 29)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 29


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_reload_gives_the_same_logits(tiny_model, tmp_path, changes):
    model, ids = tiny_model(**changes), tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is FlashSTUForCausalLM
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()


@torch.no_grad()
def test_filters_travel_with_the_checkpoint(tiny_model, tmp_path):
    model, ids = tiny_model(), tokens()
    model.model.filters.phi.mul_(-1.5)  # filters no machine would compute
    model.save_pretrained(tmp_path)
    again = FlashSTUForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_bf16_keeps_the_filters(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for half in (FlashSTUForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tiny_model().bfloat16()):
        assert half.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(half.model.filters.phi, model.model.filters.phi)
        difference = half(tokens()).logits.float() - model(tokens()).logits
        assert difference.abs().max() < 0.05


@torch.no_grad()
def test_bf16_keeps_the_systems_of_a_distilled_model(tiny_config, tmp_path):
    torch.manual_seed(0)
    model = FlashSTUForCausalLM(tiny_config(lds_state_dim=8))
    for block in model.model.layers[::2]:
        block.mixer.readout.normal_()
        block.mixer.decay.copy_(torch.tensor([0.99999, 0.9, 0.5, 0.1]))
    model.save_pretrained(tmp_path)
    half = FlashSTUForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    for mine, theirs in zip(model.model.layers[::2], half.model.layers[::2], strict=True):
        assert torch.equal(mine.mixer.readout, theirs.mixer.readout)
        assert torch.equal(mine.mixer.decay, theirs.mixer.decay)


@torch.no_grad()
def test_left_padding_changes_nothing(tiny_model):
    for changes in VARIANTS:
        model, ids = tiny_model(**changes), tokens()
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        padded = model(ids, attention_mask=mask).logits[1, 5:]
        torch.testing.assert_close(padded, model(ids[1:2, 5:]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
def test_generate(tiny_model, changes):
    model, ids = tiny_model(**changes), tokens(length=9)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, **settings)
    assert torch.equal(greedy, model.generate(ids, use_cache=False, **settings))
    beams = model.generate(ids, num_beams=3, **settings)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **settings))
    # a batch of prompts of different lengths, padded on the left, gives what each gives alone
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(padded[0, 9:], model.generate(ids[:1, 4:], **settings)[0, 5:])


@torch.no_grad()
def test_memory_of_a_distilled_cache_is_bounded(tiny_config):
    model = FlashSTUForCausalLM(tiny_config(lds_state_dim=8)).eval()
    cache = FlashSTUCache(4)
    model(tokens(length=30), past_key_values=cache)
    before = state_bytes(cache)
    for _ in range(100):  # far beyond the 65 positions of the filters it was distilled from
        model(tokens(length=1), past_key_values=cache)
    assert state_bytes(cache) == before
    assert cache.get_seq_length() == 130


def test_loads_where_nothing_of_ours_is_imported(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        "assert 'flash_stu' not in sys.modules;"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True);"
        "print(float(m(torch.arange(9)[None]).logits.sum()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = tiny_model()(torch.arange(9)[None]).logits.sum().item()
    assert float(run.stdout) == pytest.approx(expected, rel=1e-4)


def test_losses(tiny_model):
    model, ids = tiny_model(), tokens()
    logits = model(ids).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, plain)
    out = model(ids[:, :-1], shift_labels=ids[:, 1:], skip_logits=True)
    torch.testing.assert_close(out.loss, plain)
    assert out.logits is None
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])


def test_every_parameter_learns(tiny_model):
    for changes in VARIANTS:
        model = tiny_model(**changes).train()
        model(tokens(), labels=tokens()).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_initialisation_scales_each_residual_projection_once():
    torch.manual_seed(0)
    config = FlashSTUConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=8, max_position_embeddings=64
    )
    model = FlashSTUForCausalLM(config)
    residual = (2 * 8) ** -0.5
    for block in model.model.layers:
        assert block.mlp.down_proj.weight.std().item() == pytest.approx(512**-0.5 * residual, rel=0.05)
        assert block.mlp.gate_up_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    for block in model.model.layers[1::2]:
        assert block.mixer.o_proj.weight.std().item() == pytest.approx(256**-0.5 * residual, rel=0.05)
    for block in model.model.layers[::2]:
        assert block.mixer.in_proj.weight.std().item() == pytest.approx(256**-0.5 * residual, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_340m_configuration_has_its_size():
    with torch.device("meta"):
        model = FlashSTUForCausalLM(FlashSTUConfig())
    assert model.num_parameters() == 340_304_896


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 3}, "model.hiden_size is not a configuration key; did you mean hidden_size?"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"stu_type": "dense"}, "stu_type is 'dense'; allowed: tensordot, full"),
        ({"hidden_size": 100}, "hidden_size 100 is not divisible by num_attention_heads 8"),
        ({"num_filters": 9000}, "num_filters is 9000; at most max_position_embeddings, 8192"),
        ({"filter_basis": "tensor"}, "tensor_filters is None and filter_basis 'tensor'; allowed: "),
        ({"tensor_filters": 5}, "tensor_filters is 5 and filter_basis 'hankel'; allowed: "),
        ({"filter_basis": "tensor", "tensor_filters": 99}, "num_filters is 9801; at most max_position_embeddings"),
        ({"filter_basis": "tensor", "tensor_filters": 5, "conv_backend": "chunked"}, "conv_backend is 'chunked'"),
        ({"filter_basis": "tensor", "tensor_filters": 5, "lds_state_dim": 8}, "filter_basis 'tensor' has no LDS"),
        ({"layer_types": ["full_attention"] * 12}, "layer_types has 'full_attention'; allowed: linear_attention"),
        ({"layer_types": ["linear_attention"]}, "layer_types names 1 layers; num_hidden_layers is 12"),
        ({"lds_state_dim": 7}, "lds_state_dim is 7; allowed: an even number"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"sliding_window": 0}, "sliding_window is 0; allowed: 1 to"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not divisible by num_key_value_heads 3"),
        ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
    ],
)
def test_configuration_errors_name_the_key(changes, message):
    with pytest.raises(UserError) as error:
        FlashSTUConfig.from_user(changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_too_long_for_the_filters(tiny_model):
    model = tiny_model()
    with pytest.raises(UserError, match="the sequence has 66 tokens; the spectral filters end at 65"):
        model(tokens(length=66))
    cache = model(tokens(length=65), use_cache=True).past_key_values
    with pytest.raises(UserError, match="66 tokens"):
        model(tokens(length=1), past_key_values=cache)
    with pytest.raises(UserError, match="attention_mask has shape"):
        model(tokens(length=5), attention_mask=torch.ones(3, 4))
