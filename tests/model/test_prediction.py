"""Models that predict numbers: loss, padding, cache, distilling, stored directories."""

import pytest
import torch
from transformers import AutoModelForTimeSeriesPrediction

import spectralds
from flash_stu import FlashSTUForTimeSeriesPrediction, UserError

VARIANTS = [
    {},
    {"layer_types": ["linear_attention"] * 4, "stu_branches": "separate", "stu_output_taps": 2},
    {"layer_types": ["sliding_attention"] * 4},
    {"lds_state_dim": 8, "stu_branches": "separate"},
]


@pytest.fixture
def predictor(tiny_config):
    def make(**changes) -> FlashSTUForTimeSeriesPrediction:
        torch.manual_seed(0)
        channels = {"num_input_channels": 5, "num_output_channels": 3}
        return FlashSTUForTimeSeriesPrediction(tiny_config(**channels | changes)).eval()

    return make


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS)
def test_step_by_step_is_all_at_once(predictor, changes, tmp_path):
    model, values = predictor(**changes), torch.randn(2, 23, 5)
    whole = model(values).predictions
    assert whole.shape == (2, 23, 3)
    cache, parts = None, []
    for part in values.split([9, 1, 1, 5, *[1] * 7], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.predictions]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path).eval()
    assert type(again) is FlashSTUForTimeSeriesPrediction
    assert torch.equal(again(values).predictions, whole)


def test_loss(predictor):
    """The mean over what counts: neither NaN nor padding."""
    model, values, labels = predictor(), torch.randn(2, 11, 5), torch.randn(2, 11, 3)
    out = model(values, labels=labels)
    assert out.loss.item() == pytest.approx((out.predictions - labels).square().mean().item(), rel=1e-6)
    out.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    labels[0, 3, 1] = torch.nan
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 8:] = 0
    out = model(values, labels=labels, attention_mask=mask)
    counts = mask.bool()[:, :, None] & ~labels.isnan()
    assert out.loss.item() == pytest.approx((out.predictions - labels)[counts].square().mean().item(), rel=1e-6)
    with pytest.raises(UserError, match=r"labels has shape \(2, 11, 5\); needed: \(2, 11, 3\)"):
        model(values, labels=values)


@torch.no_grad()
def test_a_distilled_model_predicts_its_own_inputs(predictor):
    """The same closed loop, before it amplifies rounding a thousandfold, with a cache that does not grow."""
    model = predictor(num_output_channels=None, stu_branches="separate")
    distilled = spectralds.distill(model, 60)
    start, loops, sizes = torch.randn(1, 8, 5), [], []
    for one in (model, distilled):
        out, loop = one(start, use_cache=True), []
        for _ in range(20):
            out = one(out.predictions[:, -1:], past_key_values=out.past_key_values, use_cache=True)
            loop.append(out.predictions)
            if one is distilled:
                sizes.append(sum(t.nbytes for t in out.past_key_values.states[0].core.slots))
        loops.append(torch.cat(loop[:6], dim=1))
    torch.testing.assert_close(*loops, atol=1e-3, rtol=1e-3)
    assert len(set(sizes)) == 1


def test_the_number_of_inputs_is_needed(tiny_config):
    with pytest.raises(UserError, match="num_input_channels is null"):
        FlashSTUForTimeSeriesPrediction(tiny_config())
