"""Distilled models against their originals: layers, logits, weights, round trips, refusals."""

import copy

import pytest
import torch
from references import lds_scan
from transformers import GPT2Config, GPT2LMHeadModel

from flash_stu import FlashSTUForCausalLM, UserError
from flash_stu.model.layers import LDS, STU
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.loading import load_model
from flash_stu.ops.lds import zero_state
from spectralds import distill
from spectralds.comparison import compare_layers
from spectralds.distillation import fold, model_filters
from spectralds.fit import fit_lds

TYPES = ("tensordot", "full")
BRANCHES = ("shared", "separate", "positive")
BASES = ("hankel", "hankel_l")


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("stu_type", TYPES)
def test_logits_agree(tiny_model, stu_type, branches, basis):
    model = tiny_model(stu_type=stu_type, stu_branches=branches, filter_basis=basis)
    distilled = distill(model, 80)
    assert distilled.config.lds_state_dim == 80
    assert [type(layer.mixer) for layer in distilled.model.layers[::2]] == [LDS, LDS]
    ids = torch.randint(61, (3, 65), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(ids).logits, distilled(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("stu_type", TYPES)
def test_fold_against_the_definition_of_the_layer(tiny_model, stu_type, branches, basis):
    """A float64 recurrence with the folded weights equals the direct sum over filters, lags and branches."""
    model = tiny_model(stu_type=stu_type, stu_branches=branches, filter_basis=basis).double()
    layer, phi = model.model.layers[0].mixer, model.model.filters.phi.double()
    fit = fit_lds(model_filters(model), 80, dilation=model.config.stu_dilation)
    folded = {key: tensor.detach().double() for key, tensor in fold(fit, layer).items()}

    length, size, signs = 65, 32, (-1.0) ** torch.arange(65, dtype=torch.float64)
    x = torch.randn(2, length, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u = x @ layer.in_proj.weight.T if layer.tensordot else x
    weights = (layer.M_filters if layer.tensordot else layer.M_phi).detach()
    plus, minus = (
        weights[0],
        {"shared": weights[0], "separate": weights[-1], "positive": 0 * weights[0]}[branches],
    )
    expected = torch.zeros_like(x)
    for filters, weight in ((phi, plus), (signs[:, None] * phi, minus)):
        toeplitz = torch.zeros(phi.shape[1], length, length, dtype=torch.float64)
        for t in range(length):
            toeplitz[:, t, : t + 1] = filters[: t + 1].flip(0).T
        features = torch.einsum("kts,bsd->bktd", toeplitz, u)
        expected += torch.einsum("bktd,kd->btd" if layer.tensordot else "bktd,kde->bte", features, weight)

    decay, readout = folded["decay"], folded["readout"]
    state = tuple(slot.double() for slot in zero_state(2, size, len(decay), layer.dilation, "cpu"))
    if layer.tensordot:
        found, _ = lds_scan(u, decay, readout, state)
    else:
        found = 0
        for feature, weight in zip(readout.T, folded["M_phi"], strict=True):
            found = found + lds_scan(u, decay, feature[:, None].expand(-1, size), state)[0] @ weight
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "branches, basis", [("shared", "hankel"), ("separate", "hankel"), ("shared", "hankel_l"), ("positive", "hankel_l")]
)
def test_whole_layers_over_8192_tokens_in_float32(tiny_model, branches, basis):
    model = tiny_model(
        max_position_embeddings=8192,
        num_filters=24,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        stu_branches=branches,
        filter_basis=basis,
        hidden_size=8,
    )
    measured = compare_layers(model, distill(model))
    assert measured["length"] == 8192
    assert len(measured["layers"]) == 1
    assert measured["layers"][0]["relative_difference"] <= 2e-5
    assert measured["recurrence_relative_difference"] <= 2e-5


@pytest.mark.parametrize("stu_type", TYPES)
def test_step_and_forward_of_a_distilled_layer_agree_past_the_filters(tiny_model, stu_type):
    """The recurrence goes on where the STU has to stop, and the sequence form with it."""
    layer = distill(tiny_model(stu_type=stu_type), 40).model.layers[2].mixer
    x = torch.randn(2, 101, 32, generator=torch.Generator().manual_seed(3))
    context = SequenceContext()
    with torch.no_grad():
        expected = layer(x, context)
        output, state = layer.prefill(x[:, :3], context)
        outputs = [output]
        for t in range(3, 101):
            output, state = layer.step(x[:, t : t + 1], context, state)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_but_the_stu_layers_is_kept(tiny_model, tied, dtype):
    model = tiny_model(tie_word_embeddings=tied, bias=True, num_key_value_heads=2).to(dtype).train()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    distilled = distill(model, 20)

    assert model.config.to_dict() == config and model.training
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert isinstance(model.model.layers[0].mixer, STU)

    assert distilled.training
    found = distilled.state_dict()
    own = {key for key in found if key.endswith((".decay", ".readout"))}
    assert own == {f"model.layers.{i}.mixer.{key}" for i in (0, 2) for key in ("decay", "readout")}
    gone = {"model.filters.phi", "model.layers.0.mixer.M_filters", "model.layers.2.mixer.M_filters"}
    assert found.keys() - own == before.keys() - gone
    assert all(torch.equal(found[key], before[key]) for key in found.keys() - own)
    assert all(found[key].dtype == torch.float32 for key in own)
    memory = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert memory.isdisjoint(tensor.data_ptr() for tensor in found.values())
    assert (distilled.lm_head.weight is distilled.model.embed_tokens.weight) == tied
    assert all(parameter.requires_grad for parameter in distilled.parameters())


def test_distilled_model_survives_saving(tiny_model, tmp_path):
    distilled = distill(tiny_model(stu_branches="separate"), 40)
    distilled.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    ids = torch.randint(61, (2, 33), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, distilled(ids).logits)


def test_generation_of_a_distilled_model_is_that_of_the_original(tiny_model):
    model = tiny_model()
    distilled = distill(model)
    ids = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(5))
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(distilled.generate(ids, **settings), model.generate(ids, **settings))


def test_filters_of_another_origin_are_fitted_as_they_are(tiny_model):
    """A converted checkpoint may hold filters in another order and with other signs."""
    model = tiny_model(stu_branches="separate")
    signs = torch.tensor([1, -1, -1, 1, 1, -1, 1, -1])
    model.model.filters.phi.copy_(model.model.filters.phi.flip(1) * signs)
    ids = torch.randint(61, (2, 65), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected, found = model(ids).logits, distill(model)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_auto_state_dimension(tiny_model):
    fine, coarse = (distill(tiny_model(), "auto", tolerance=t) for t in (1e-6, 1e-2))
    assert coarse.config.lds_state_dim < fine.config.lds_state_dim < 40


def test_settings_that_only_stu_layers_have_are_reset(tiny_model):
    distilled = distill(tiny_model(decode_backend="futurefill_epoched"), 20)
    assert distilled.config.decode_backend == "auto"


def test_a_model_without_stu_layers_is_refused(tiny_model):
    with pytest.raises(UserError, match="no STU layers to distill"):
        distill(tiny_model(layer_types=["sliding_attention"] * 4))
    with pytest.raises(UserError, match="distilled already .lds_state_dim 20.: it has no STU layers left"):
        distill(distill(tiny_model(), 20))
    with pytest.raises(UserError, match="filter_basis is tensor, whose filters no small LDS has; allowed: hankel"):
        distill(tiny_model(filter_basis="tensor", tensor_filters=3), 20)
    with pytest.raises(UserError, match="GPT2LMHeadModel cannot be distilled; allowed: the FlashSTU model classes"):
        distill(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=7)))
    with pytest.raises(UserError, match="state_dim is 21"):
        distill(tiny_model(), 21)


def test_gradients_reach_the_distilled_layers(tiny_model):
    distilled: FlashSTUForCausalLM = distill(tiny_model(), 20).train()
    ids = torch.randint(61, (2, 9))
    distilled(ids, labels=ids).loss.backward()
    assert distilled.model.layers[0].mixer.in_proj.weight.grad.abs().max() > 0
