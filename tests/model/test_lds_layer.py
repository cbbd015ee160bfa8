"""The LDS layer's numbers and its training: precision of its states, moved decays, weights drawn from scratch."""

import pytest
import torch

from flash_stu import FlashSTUForCausalLM
from flash_stu.model.layers import LDS
from flash_stu.model.layers.context import SequenceContext
from flash_stu.model.loading import load_model
from flash_stu.training.initialization import read_initial_weights
from spectralds import distill

CONTEXT = SequenceContext()


def token_by_token(layer, x):
    y, state = layer.prefill(x[:, :1], CONTEXT)
    outputs = [y]
    for t in range(1, x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], CONTEXT, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("float64", 1e-6)])
@torch.no_grad()
def test_token_by_token_over_the_filters_length(tiny_model, dtype, bound):
    """With all 24 filters: float32 states lose a little to rounding at every token, float64 states nothing."""
    sizes = {"max_position_embeddings": 2048, "num_filters": 24, "layer_types": ["linear_attention"] * 4}
    layer = distill(tiny_model(**sizes), 160).model.layers[0].mixer
    layer.config.lds_state_dtype = dtype
    x = torch.randn(2, 2048, 32)
    whole = layer(x, CONTEXT)
    assert (token_by_token(layer, x) - whole).norm() <= bound * whole.norm()
    y, state = layer.prefill(x, CONTEXT)
    assert (y - whole).norm() <= 1e-6 * whole.norm()
    assert state.core.slots[0].dtype == getattr(torch, dtype)


@torch.no_grad()
def test_prefill_continues_at_any_point(tiny_config):
    for changes in ({}, {"stu_branches": "separate"}, {"stu_type": "full"}):
        layer = LDS(tiny_config(lds_state_dim=8, **changes))
        FlashSTUForCausalLM._init_weights(_Owner(layer.config), layer)
        torch.nn.init.normal_(layer.in_proj.weight, std=0.2) if layer.tensordot else None
        x = torch.randn(3, 700, 32)
        whole, ends = layer(x, CONTEXT), [0, 1, 64, 127, 255, 256, 513, 700]
        parts, state = [], None
        for first, end in zip(ends, ends[1:], strict=False):
            y, state = layer.prefill(x[:, first:end], CONTEXT, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


class _Owner:
    """Stands in for a model in `_init_weights`, which reads nothing else of it."""

    def __init__(self, config):
        self.config = config


def test_a_layer_from_scratch_is_stable_and_keeps_the_variance(tiny_config):
    torch.manual_seed(0)
    for kind in ("tensordot", "full"):
        for branches in ("shared", "separate"):
            config = tiny_config(
                stu_type=kind,
                stu_branches=branches,
                lds_state_dim=40,
                lds_trainable=True,
                max_position_embeddings=512,
                num_hidden_layers=1,
                layer_types=["linear_attention"],
                vocab_size=23,
            )
            model = FlashSTUForCausalLM(config)
            layer = model.model.layers[0].mixer
            decays = layer.system()[0]
            assert (decays.abs() < 1).all()
            assert decays.abs().max() > 0.995
            assert (decays < 0).any() == (branches == "separate")
            with torch.no_grad():
                y = layer(torch.randn(4, 512, 32), CONTEXT)[:, 256:]
            assert 0.2 < y.std().item() * 2**0.5 < 3  # the residual's factor is 2^-1/2 in a model of one layer


def test_training_a_model_from_scratch_learns_to_remember(tiny_config):
    """The token four back: with even lags it is in reach, and a model without memory cannot know it."""
    torch.manual_seed(0)
    config = tiny_config(
        lds_state_dim=16, lds_trainable=True, num_hidden_layers=1, layer_types=["linear_attention"], vocab_size=8
    )
    model = FlashSTUForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        ids = torch.randint(0, 8, (8, 40))
        loss = model(ids, shift_labels=ids.roll(4, dims=1)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.5  # guessing is log 8 = 2.08
    layer = model.model.layers[0].mixer
    assert layer.log_rate_change.abs().max() > 0.01


@pytest.mark.parametrize(
    "changes", [{}, {"stu_branches": "separate", "filter_basis": "hankel_l"}, {"stu_type": "full"}]
)
def test_a_distilled_model_can_be_fine_tuned(tiny_model, tmp_path, changes):
    ids = torch.randint(0, 61, (2, 50), generator=torch.Generator().manual_seed(0))
    distilled = distill(tiny_model(**changes), 40)
    distilled.save_pretrained(tmp_path / "distilled")
    model = FlashSTUForCausalLM.from_pretrained(tmp_path / "distilled", lds_trainable=True)
    with torch.no_grad():
        assert (model(ids).logits - distilled(ids).logits).abs().max() <= 1e-6
        with torch.device("meta"):
            started = FlashSTUForCausalLM(model.config)
        read_initial_weights(started, torch.device("cpu"), tmp_path / "distilled")  # as train.initial_weights does
        assert torch.equal(started(ids).logits, model(ids).logits)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for block in model.model.layers[::2]:
        assert block.mixer.log_rate_change.abs().mean() > 1e-3
        assert (block.mixer.system()[0].abs() < 1).all()

    model.eval().save_pretrained(tmp_path / "tuned")
    again = load_model(tmp_path / "tuned")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    tuned = model.generate(ids, **settings)
    assert torch.equal(again.generate(ids, **settings), tuned)
    assert torch.equal(again.generate(ids, use_cache=False, **settings), tuned)
    half = FlashSTUForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.bfloat16)
    theirs, mine = half.model.layers[0].mixer, model.model.layers[0].mixer
    for name in ("decay", "readout", "log_rate_change", "readout_change"):
        assert torch.equal(getattr(theirs, name), getattr(mine, name))


def test_gradients_are_finite_and_reach_the_decays(tiny_config):
    layer = LDS(tiny_config(lds_state_dim=16, lds_trainable=True))
    torch.manual_seed(0)
    for parameter in (layer.in_proj.weight, layer.readout, layer.readout_change):
        torch.nn.init.normal_(parameter, std=0.2)
    layer.decay.copy_(torch.tensor([0.0, 1e-30, 1e-3, 0.5, 0.9, 0.999, 1 - 2.0**-20, 1 - 2.0**-24]))
    layer(torch.randn(2, 9000, 32), CONTEXT).square().mean().backward()
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
    assert (layer.log_rate_change.grad[2:] != 0).all()


def test_only_a_trainable_layer_has_the_parameter(tiny_config):
    fixed, trainable = LDS(tiny_config(lds_state_dim=8)), LDS(tiny_config(lds_state_dim=8, lds_trainable=True))
    assert set(trainable.state_dict()) - set(fixed.state_dict()) == {"log_rate_change", "readout_change"}
    assert {name for name, _ in fixed.named_parameters()} == {"in_proj.weight"}
    trainable.bfloat16()
    assert trainable.log_rate_change.dtype == torch.float32
    assert trainable.system()[0].dtype == torch.float32
