"""The measured comparison against logits and losses computed directly."""

import pytest
import torch
from matplotlib import pyplot

from flash_stu.filters.spectral import spectral_filters
from spectralds import FilterBank, distill, fit_lds
from spectralds.comparison import compare_generation, compare_layers, compare_models
from spectralds.curve import error_curve
from spectralds.fit import METHODS
from spectralds.plots import plot_fit


@pytest.mark.parametrize("vocab_chunk", [2**24, 61 * 5, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_comparison_of_models_against_a_direct_calculation(tiny_model, monkeypatch, vocab_chunk, bias):
    monkeypatch.setattr("spectralds.comparison._LOGITS", vocab_chunk)
    model = tiny_model(bias=bias)
    if bias:
        torch.nn.init.normal_(model.lm_head.bias)
    distilled = distill(model, 8)  # coarse, so that the differences are no rounding
    windows = torch.randint(61, (3, 34), generator=torch.Generator().manual_seed(0))
    found = compare_models(model, distilled, windows)
    with torch.no_grad():
        before, after = model(windows[:, :-1]).logits, distilled(windows[:, :-1]).logits
    targets = windows[:, 1:].flatten()
    assert (found["tokens"], found["windows"], found["window_length"]) == (99, 3, 33)
    assert found["max_abs_logit_difference"] == pytest.approx(float((before - after).abs().max()), rel=1e-3)
    assert found["mean_abs_logit_difference"] == pytest.approx(float((before - after).abs().mean()), rel=1e-3)
    spread = before - before.mean(dim=-1, keepdim=True)
    relative = float((before - after).norm() / spread.norm())
    assert found["relative_logit_difference"] == pytest.approx(relative, rel=1e-3)
    for key, logits in (("validation_loss_before", before), ("validation_loss_after", after)):
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets)
        assert found[key] == pytest.approx(float(loss), rel=1e-6)
    agreement = (before.argmax(-1) == after.argmax(-1)).double().mean()
    assert found["argmax_agreement"] == pytest.approx(float(agreement), abs=0.021)


def test_comparison_in_half_precision_is_of_the_models_own_logits(tiny_model, monkeypatch):
    monkeypatch.setattr("spectralds.comparison._LOGITS", 61 * 7)
    model = tiny_model().to(torch.bfloat16)
    distilled = distill(tiny_model(), 8).to(torch.bfloat16)
    windows = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
    found = compare_models(model, distilled, windows)
    with torch.no_grad():
        before, after = (one(windows[:, :-1], use_cache=False).logits.double() for one in (model, distilled))
    # a product of other shape may round a logit to the next bfloat16, 2^-8 of it at most
    room = 2**-7 * float(before.abs().max())
    assert found["max_abs_logit_difference"] == pytest.approx(float((before - after).abs().max()), abs=room)
    loss = torch.nn.functional.cross_entropy(before.flatten(0, 1), windows[:, 1:].flatten())
    assert found["validation_loss_before"] == pytest.approx(float(loss), abs=room)


def test_comparison_of_layers_sees_a_bad_fit(tiny_model):
    model = tiny_model()
    good, bad = (compare_layers(model, distill(model, state_dim)) for state_dim in (80, 4))
    assert [entry["layer"] for entry in good["layers"]] == [0, 2]
    assert max(entry["relative_difference"] for entry in good["layers"]) < 1e-5
    assert good["recurrence_relative_difference"] < 1e-5
    assert min(entry["relative_difference"] for entry in bad["layers"]) > 1e-3
    assert bad["recurrence_relative_difference"] > 1e-3


@pytest.mark.parametrize("basis, count", [("hankel", 6), ("hankel_l", 1)])
def test_figure_is_an_image_with_ink_in_every_panel(tmp_path, basis, count):
    bank = FilterBank(spectral_filters(100, count, basis)[1])
    path = tmp_path / "fit.png"
    plot_fit(bank, fit_lds(bank, 24), error_curve(bank, torch.float32, 1), path)
    image = pyplot.imread(path)[..., :3]
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    for top in (0, rows):
        for left in (0, columns):
            assert (image[top : top + rows, left : left + columns] < 0.9).any(axis=2).mean() > 0.01


def test_generation_is_compared_token_by_token(tiny_model):
    model, windows = tiny_model(), torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
    found = compare_generation(model, distill(model), windows, prompts=3)
    assert found == {"prompts": 3, "prompt_length": 10, "tokens": 32, "identical": 3, "agreement": 1.0}
    coarse = compare_generation(model, distill(model, 2), windows, prompts=3)
    assert coarse["identical"] < 3 and coarse["agreement"] < 1


@pytest.mark.parametrize("dilation", [1, 2])
def test_error_curve_is_that_of_the_fits(dilation):
    bank = FilterBank(spectral_filters(300, 8)[1])
    curve = error_curve(bank, torch.float32, dilation, (8, 20, 32))
    assert curve["state_dim"] == [8, 20, 32]
    for method in METHODS:
        reports = [fit_lds(bank, h, method, dilation=dilation).report for h in (8, 20, 32)]
        assert curve[method] == pytest.approx([report["mse"] for report in reports], rel=1e-6)
        assert curve["bound"] == [report["mse_bound"] for report in reports]
