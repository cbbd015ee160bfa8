"""Classifiers of sequences and of pairs: pooling, padding, reading both ways, numbers as inputs, distilling."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import spectralds
from flash_stu import FlashSTUConfig, FlashSTUForCausalLM, FlashSTUForSequenceClassification, FlashSTUModel, UserError

BOTH_WAYS = {"bidirectional": True, "attn_logit_softcapping": None, "sliding_window": 65}
VARIANTS = [
    {"classifier_pooling": "mean"},
    {"classifier_pooling": "last", "classifier_towers": 2},
    {"classifier_pooling": "mean", **BOTH_WAYS},
    {**BOTH_WAYS, "sliding_window": 5, "position_embedding": "alibi", "num_key_value_heads": 2},
    {**BOTH_WAYS, "stu_branches": "separate", "stu_type": "full", "stu_input_taps": 3, "stu_output_taps": 2},
    {**BOTH_WAYS, "lds_state_dim": 8, "lds_trainable": True, "classifier_towers": 2, "classifier_pooling": "mean"},
]


@pytest.fixture
def classifier(tiny_config):
    def make(**changes) -> FlashSTUForSequenceClassification:
        torch.manual_seed(0)
        return FlashSTUForSequenceClassification(tiny_config(num_labels=5, **changes)).eval()

    return make


def inputs(model, batch=3, length=21):
    torch.manual_seed(1)
    shape = (batch, length) if model.config.classifier_towers == 1 else (batch, 2, length)
    return torch.randint(1, 61, shape)


@pytest.mark.parametrize("changes", VARIANTS)
def test_padding_on_either_side_changes_nothing(classifier, changes):
    model = classifier(**changes)
    ids = inputs(model)
    whole = model(ids).logits
    for pads in ((6, 0), (0, 6)):
        padded = torch.nn.functional.pad(ids, pads, value=7)
        mask = torch.nn.functional.pad(torch.ones_like(ids), pads)
        torch.testing.assert_close(model(padded, attention_mask=mask).logits, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_weight_has_a_gradient_and_is_stored(classifier, changes, tmp_path):
    model = classifier(**changes)
    ids = inputs(model)
    out = model(ids, labels=torch.tensor([0, 4, 2]))
    out.loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 4, 2]))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(again) is FlashSTUForSequenceClassification
    assert torch.equal(again(ids).logits, out.logits)
    half = model.bfloat16()
    exact = {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
    assert exact == {name for name in half.state_dict() if model.stays_float32(name)} != set()


@torch.no_grad()
def test_pooling(classifier):
    """Without a mask, padding is told by its id: the mean leaves it out, the last is before it."""
    for pooling in ("mean", "last"):
        model = classifier(classifier_pooling=pooling, pad_token_id=0)
        ids = inputs(model)
        ids[1, 15:] = 0
        hidden = model.model(ids).last_hidden_state
        rows = [hidden[0], hidden[1, :15], hidden[2]]
        vectors = torch.stack([row.mean(0) if pooling == "mean" else row[-1] for row in rows])
        torch.testing.assert_close(model(ids).logits, model.score(vectors), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_pairs_go_through_the_same_layers(classifier):
    model = classifier(classifier_towers=2, classifier_pooling="mean")
    ids = inputs(model)
    u, v = (model.model(ids[:, tower]).last_hidden_state.mean(1) for tower in (0, 1))
    features = torch.nn.functional.gelu(model.pooler.dense(torch.cat([u, v, u * v, u - v], 1)))
    torch.testing.assert_close(model(ids).logits, model.score(features), atol=1e-6, rtol=1e-6)
    with pytest.raises(UserError, match=r"input_ids has shape \(3, 21\); needed of pairs: \(batch, 2, length\)"):
        model(ids[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("changes", [VARIANTS[2], VARIANTS[4], {**BOTH_WAYS, "layer_types": ["sliding_attention"] * 4}])
def test_a_bidirectional_model_sees_what_comes(tiny_config, changes):
    """Its hidden states of a reversed sequence are those of a model with its two directions exchanged, reversed."""
    torch.manual_seed(0)
    model = FlashSTUModel(tiny_config(**changes | {"position_embedding": "none"})).eval()
    ids = torch.randint(0, 61, (2, 19))
    first = model(ids).last_hidden_state
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 61
    assert ((model(changed).last_hidden_state - first)[:, 0].abs().amax(1) > 1e-6).all()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {"past": "future", "future": "past"}
    model.load_state_dict({".".join(places.get(part, part) for part in name.split(".")): state[name] for name in state})
    torch.testing.assert_close(model(ids.flip(1)).last_hidden_state, first.flip(1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [4, 65])
def test_attention_ahead_has_the_weights_that_it_shows(tiny_config, window):
    changes = BOTH_WAYS | {"sliding_window": window, "layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = FlashSTUModel(tiny_config(**changes)).eval()
    ids, mask = torch.randint(0, 61, (2, 19)), torch.ones(2, 19, dtype=torch.long)
    mask[0, 15:] = 0
    shown, plain = model(ids, attention_mask=mask, output_attentions=True), model(ids, attention_mask=mask)
    torch.testing.assert_close(shown.last_hidden_state[1], plain.last_hidden_state[1], atol=1e-5, rtol=1e-5)
    distance = (torch.arange(19)[:, None] - torch.arange(19)).abs()
    assert ((shown.attentions[0][1] > 0) == (distance < window)).all()
    assert (shown.attentions[0][0, :, :, 15:] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("changes", [VARIANTS[1], VARIANTS[2], {**BOTH_WAYS, "stu_output_taps": 2}])
def test_distilled_classifiers_answer_alike(classifier, changes, tmp_path):
    model = classifier(**changes)
    ids = inputs(model)
    distilled = spectralds.distill(model, 60)
    assert type(distilled) is FlashSTUForSequenceClassification and distilled.config.lds_state_dim == 60
    torch.testing.assert_close(distilled(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "model")
    from spectralds.directory import distill_directory

    distill_directory(tmp_path / "model", tmp_path / "distilled", 60)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "distilled").eval()
    torch.testing.assert_close(again(ids).logits, distilled(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="needs a language model, not a FlashSTUForSequenceClassification"):
        distill_directory(tmp_path / "model", tmp_path / "other", 60, verify=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 24])
def test_numbers_begin_as_small_as_token_ids(classifier, channels):
    """Larger hidden states would drown what the first mixers add to them."""
    model = classifier(num_input_channels=channels, hidden_size=512, num_attention_heads=4, num_hidden_layers=1)
    numbers = model.model.embed_values(torch.randn(4, 50, channels))
    tokens = FlashSTUModel(FlashSTUConfig(**{**model.config.to_diff_dict(), "num_input_channels": None}))
    spread = tokens.embed_tokens.weight.std()
    assert numbers.square().mean().sqrt() / spread == pytest.approx((1 + 1 / channels) ** 0.5, rel=0.25)


@torch.no_grad()
def test_numbers_as_inputs(classifier):
    model = classifier(num_input_channels=3, classifier_pooling="mean")
    values = torch.randn(2, 9, 3)
    embeds = model.model.embed_values(values)
    assert torch.equal(model(input_values=values).logits, model(inputs_embeds=embeds).logits)
    assert model.get_input_embeddings() is model.model.embed_values
    for bad in (
        {"input_ids": torch.ones(2, 9, dtype=torch.long)},
        {},
        {"input_values": values, "inputs_embeds": embeds},
    ):
        with pytest.raises(UserError, match="exactly one of input_values and inputs_embeds"):
            model(**bad)
    with pytest.raises(UserError, match=r"input_values has shape \(2, 9, 2\); needed: \(batch, length, 3\)"):
        model(input_values=values[..., :2])


@torch.no_grad()
def test_the_size_of_a_single_number_counts(classifier):
    """Not its sign alone, which is all that a norm leaves of a multiple of one vector."""
    model = classifier(num_input_channels=1)
    logits = [model(input_values=torch.full((1, 9, 1), value)).logits for value in (0.2, 1.0)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_what_a_bidirectional_model_refuses(tiny_config, classifier):
    model, ids = classifier(**BOTH_WAYS), torch.ones(1, 6, dtype=torch.long)
    for refused in ({"use_cache": True}, {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}):
        with pytest.raises(UserError, match="reads whole sequences, one a row: it does not go with"):
            model(ids, **refused)
    for changes, name in ((BOTH_WAYS, "bidirectional is True"), ({"num_input_channels": 2}, "num_input_channels is 2")):
        with pytest.raises(UserError, match=f"model.{name}; allowed for a language model: (false|null)"):
            FlashSTUForCausalLM(tiny_config(**changes))
    with pytest.raises(UserError, match="attn_logit_softcapping is 50.0; allowed for bidirectional attention: null"):
        FlashSTUConfig.from_user({"bidirectional": True})
    with pytest.raises(UserError, match="'banded' does not do keys after the query"):
        classifier(**BOTH_WAYS, attention_backend="banded")(ids)


def test_counted_weights_are_those_of_the_model(tiny_config):
    for changes in (BOTH_WAYS, {"num_input_channels": 3}, {**BOTH_WAYS, "lds_state_dim": 8}):
        config = tiny_config(**changes)
        model = FlashSTUModel(config)
        assert config.count_weights() == sum(t.numel() for t in [*model.parameters(), *model.buffers()])


def test_classes_are_found_whatever_is_imported_first(tiny_config, tmp_path):
    """This module loads transformers' automatic classes in the midst of its own imports."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    code = f"""
import flash_stu.model.pretrained
from transformers import AutoConfig, AutoModelForSequenceClassification as Auto
print(type(Auto.from_config(AutoConfig.from_pretrained({str(tmp_path)!r}))).__name__)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "FlashSTUForSequenceClassification", result.stderr
