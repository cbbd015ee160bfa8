"""Other libraries' models with our heads: called as ours are, trained as a whole, blind to padding."""

import pytest
import torch

NAMES = ["mamba2", "s5"]


@pytest.fixture
def peer(scripts, tiny_config):
    def make(name, **changes):
        if name == "s5":
            pytest.importorskip("s5", reason="s5-pytorch is not installed")
        torch.manual_seed(0)
        config = tiny_config(num_labels=5, classifier_pooling="mean", num_hidden_layers=2, **changes)
        return getattr(scripts["peers"], name)(config, state_size=8).eval()

    return make


@pytest.mark.parametrize("name", NAMES)
def test_classifiers(peer, name):
    model, ids = peer(name, classifier_towers=2), torch.randint(0, 61, (2, 2, 17))
    mask = torch.ones_like(ids)
    whole = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([1, 4]))
    assert whole.logits.shape == (2, 5)
    whole.loss.backward()
    assert [key for key, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []
    pads = (0, 6)
    padded = {"input_ids": torch.nn.functional.pad(ids, pads), "attention_mask": torch.nn.functional.pad(mask, pads)}
    torch.testing.assert_close(model(**padded).logits, whole.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_predictors(peer, name):
    model = peer(name, num_input_channels=4, num_output_channels=3)
    out = model(input_values=torch.randn(2, 19, 4), labels=torch.randn(2, 19, 3))
    assert out.predictions.shape == (2, 19, 3) and out.loss.ndim == 0
