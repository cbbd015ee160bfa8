"""Every argument that transformers' models take is honoured, or refused in one line."""

import pytest
import torch
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache, GenerationConfig
from transformers.utils.generic import TransformersKwargs

from flash_stu import FlashSTUCache, UserError

LDS = {"lds_state_dim": 8}
ATTENTION = {"layer_types": ["sliding_attention"] * 4}
FULL = {"stu_type": "full"}
KINDS = [{}, LDS, ATTENTION]


def tokens(batch=3, length=29):
    torch.manual_seed(5)
    return torch.randint(0, 61, (batch, length))


# what each keyword of transformers' models is given, and whether a model of ours takes it so
KEYWORDS = {
    "num_items_in_batch": (torch.tensor(7), True),
    "output_hidden_states": (True, True),
    "output_attentions": (True, True),
    "output_router_logits": (True, False),
    "cu_seq_lens_q": (torch.tensor([0, 10, 87], dtype=torch.int32), True),
    "cu_seq_lens_k": (torch.tensor([0, 10, 87], dtype=torch.int32), True),
    "max_length_q": (77, True),
    "max_length_k": (77, True),
    "position_ids": (torch.arange(29)[None], True),
    "is_causal": (False, False),
    "seq_idx": (torch.zeros(3, 29, dtype=torch.int32), True),
    "return_dict": (False, True),
    "shift_labels": (torch.zeros(3, 29, dtype=torch.long), True),
    "logits_to_keep": (1, True),
    "token_type_ids": (torch.ones(3, 29, dtype=torch.long), False),
    "cache_position": (torch.arange(29), False),
    "head_mask": (torch.ones(4, 4), False),
    "encoder_hidden_states": (torch.ones(3, 2, 32), False),
}


def test_the_table_has_every_keyword_of_transformers():
    assert set(TransformersKwargs.__annotations__) <= set(KEYWORDS)


@pytest.mark.parametrize("name", KEYWORDS)
@torch.no_grad()
def test_every_keyword_is_honoured_or_refused(tiny_model, name):
    value, taken = KEYWORDS[name]
    model = tiny_model()
    if taken:
        model(tokens(), **{name: value})
    else:
        with pytest.raises(UserError, match=name) as refusal:
            model(tokens(), **{name: value})
        assert "\n" not in str(refusal.value)
    model(tokens(), **{name: None})


def test_keywords_that_say_nothing_new_are_taken(tiny_model):
    model, ids = tiny_model(), tokens()
    same = model(ids, is_causal=True, output_router_logits=False, token_type_ids=torch.zeros_like(ids)).logits
    assert torch.equal(same, model(ids).logits)


@pytest.mark.parametrize("changes", KINDS)
@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_each_row_alone(tiny_model, changes):
    model, ids = tiny_model(**changes), tokens()
    mask = torch.ones_like(ids)
    mask[0, 20:] = mask[1, :5] = mask[2, 3:9] = 0
    out = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    attending = model.config.layer_types.count("sliding_attention")
    assert len(out.hidden_states) == 5 and len(out.attentions) == attending
    for row in range(3):
        real = mask[row].bool()
        alone = model(ids[row : row + 1, real], output_hidden_states=True, output_attentions=True)
        for mine, theirs in zip(alone.hidden_states, out.hidden_states, strict=True):
            torch.testing.assert_close(theirs[row, real], mine[0], atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(alone.attentions, out.attentions, strict=True):
            torch.testing.assert_close(theirs[row][:, real][:, :, real], mine[0], atol=1e-5, rtol=1e-5)
            assert not theirs[row][:, real][:, :, ~real].any()


@torch.no_grad()
def test_hidden_states_are_the_blocks_outputs(tiny_model):
    model, ids = tiny_model(), tokens()
    out = model(ids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    expected = {}
    model.model.layers[1].register_forward_hook(lambda _m, _i, y: expected.update(y=y))
    assert torch.equal(model.model(ids).last_hidden_state, out.hidden_states[-1])
    assert torch.equal(out.hidden_states[2], expected["y"])


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@torch.no_grad()
def test_attentions_are_the_weights_that_the_layer_uses(tiny_model, positions):
    model = tiny_model(**ATTENTION, position_embedding=positions, num_key_value_heads=2)
    layer = model.model.layers[0].mixer
    seen = {}
    layer.weights.register_forward_hook(lambda _m, inputs, y: seen.update(weights=y))
    layer.o_proj.register_forward_hook(lambda _m, inputs, _y: seen.update(mixed=inputs[0]))
    layer.qkv_proj.register_forward_hook(lambda _m, _i, y: seen.update(value=y[..., 32 + 16 :]))
    model(tokens(), output_attentions=True)
    value = seen["value"].unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, dim=1)
    mixed = (seen["weights"] @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, seen["mixed"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tuples(tiny_model):
    model, ids = tiny_model(), tokens()
    logits, cache = model(ids, return_dict=False)
    assert torch.equal(logits, model(ids).logits) and isinstance(cache, FlashSTUCache)
    model.config.return_dict = False
    loss, logits = model(ids, labels=ids)
    assert loss.ndim == 0 and isinstance(model.model(ids), tuple)


@pytest.mark.parametrize("changes", KINDS)
@torch.no_grad()
def test_a_plain_decoding_loop_is_right(tiny_model, changes):
    model, ids = tiny_model(**changes), tokens()
    out, parts = model(ids[:, :9]), []
    for t in range(9, 29):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits[:, 9:], atol=1e-5, rtol=1e-5)
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    model.eval().config.use_cache = False
    assert model(ids).past_key_values is None


def test_the_loss_of_micro_batches_adds_up(tiny_model):
    model, ids = tiny_model(), tokens(batch=4)
    labels = ids.clone()
    labels[0, 5:] = labels[1, :20] = labels[2] = -100  # unequal numbers, and a row without any
    counted = (labels[:, 1:] != -100).sum()
    whole = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    whole.backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    total = 0
    for row in range(4):
        part = slice(row, row + 1)
        shifted = pad(labels[part, 1:], (0, 1), value=-100)
        one = {"labels": labels[part]} if row % 2 else {"shift_labels": shifted}
        loss = model(ids[part], num_items_in_batch=counted if row < 2 else int(counted), **one).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(model.lm_head.weight.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("changes", [*KINDS, FULL])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny_model, changes, reentrant):
    model, ids = tiny_model(**changes).train(), tokens()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(theirs, mine)
    with pytest.raises(UserError, match="use_cache"):
        model(ids, use_cache=True)


@pytest.mark.parametrize("changes", [FULL, FULL | LDS])
@torch.no_grad()
def test_full_layers_in_bf16(tiny_model, tmp_path, changes):
    model, ids = tiny_model(**changes), tokens()
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for name, tensor in half.state_dict().items():
        exact = name.rpartition(".")[2] in ("phi", "decay", "readout")
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16)
        assert half.stays_float32(name) == exact
    assert (half(ids).logits.float() - model(ids).logits).abs().max() < 0.05
    half.generate(ids[:, :5], max_new_tokens=3, pad_token_id=0)


@torch.no_grad()
def test_attention_implementations(tiny_config, tiny_model, tmp_path):
    ids = tokens()
    model = tiny_model(attn_logit_softcapping=None)
    layer, plain = model.model.layers[1].mixer, model(ids).logits
    assert layer.backend == "auto"
    for name, backend in (("eager", "banded"), ("sdpa", "sdpa")):
        model.set_attn_implementation(name)
        assert layer.backend == backend
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
    assert again.model.layers[1].mixer.backend == "sdpa"
    assert type(model).from_pretrained(tmp_path).model.layers[1].mixer.backend == "auto"
    for name in ("flash_attention_2", "flex_attention", "flash_attention_9", "paged|eager"):
        with pytest.raises(UserError, match="attn_implementation|attention back end"):
            model.set_attn_implementation(name)
    with pytest.raises(UserError, match="softcap"):
        tiny_model().set_attn_implementation("sdpa")


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded", "offloaded_static"])
def test_other_caches_are_refused(tiny_model, kind):
    model, ids = tiny_model(**LDS), tokens()
    for refused in ({"cache_implementation": kind}, {"past_key_values": DynamicCache()}):
        with pytest.raises(UserError, match=next(iter(refused))):
            model.generate(ids, max_new_tokens=2, pad_token_id=0, **refused)
    with pytest.raises(UserError, match="past_key_values"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(UserError, match="cache_implementation"):
        model.generate(ids, GenerationConfig(cache_implementation=kind, max_new_tokens=2, pad_token_id=0))
    with pytest.raises(UserError, match="continuous batching"):
        model.generate_batch([[1, 2]], GenerationConfig(max_new_tokens=2))
