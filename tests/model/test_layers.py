"""Each sequence mixer: forward, prefill and step agree, and match their definitions."""

import pytest
import torch

from flash_stu.filters.spectral import spectral_filters
from flash_stu.model.layers import LDS, STU, GatedMLP, SlidingWindowAttention
from flash_stu.model.layers.context import Ring, SequenceContext
from flash_stu.ops.positions import rotary_angles

VARIANTS = [
    (kind, branches, basis)
    for kind in ("tensordot", "full")
    for branches in ("shared", "separate", "positive")
    for basis in ("hankel", "hankel_l", "tensor")
]


def context_for(config, length, start=0):
    filters = spectral_filters(config.max_position_embeddings, config.num_filters, config.filter_basis)[1].float()
    angles = rotary_angles(torch.arange(start, start + length)[None], config.hidden_size // 4, config.rope_theta)
    ring = Ring.at(start, None, config.sliding_window, "cpu")
    return SequenceContext(filters, angles if config.position_embedding == "rope" else None, seen=start, ring=ring)


def stu_config(tiny_config, kind, branches, basis):
    own = {"tensor_filters": 3} if basis == "tensor" else {}
    return tiny_config(stu_type=kind, stu_branches=branches, filter_basis=basis, **own)


def random_layer(layer):
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if isinstance(layer, LDS):
        torch.nn.init.normal_(layer.readout, std=0.3)
        layer.decay.copy_(torch.linspace(0.2, 0.999, len(layer.decay)))
    return layer


def mixers(tiny_config):
    for kind, branches, basis in VARIANTS:
        config = stu_config(tiny_config, kind, branches, basis)
        yield config, random_layer(STU(config))
        if basis == "tensor":
            continue
        config = tiny_config(stu_type=kind, stu_branches=branches, filter_basis=basis, lds_state_dim=12)
        yield config, random_layer(LDS(config))
    for positions in ("rope", "alibi", "none"):
        for kv_heads in (1, 2, 4):
            config = tiny_config(position_embedding=positions, num_key_value_heads=kv_heads)
            yield config, random_layer(SlidingWindowAttention(config))


@torch.no_grad()
def test_forward_prefill_and_step_agree(tiny_config):
    for config, layer in mixers(tiny_config):
        torch.manual_seed(0)
        x = torch.randn(2, 31, config.hidden_size)
        whole = layer(x, context_for(config, 31))
        y, state = layer.prefill(x[:, :10], context_for(config, 10))
        parts = [y]
        y, state = layer.prefill(x[:, 10:13], context_for(config, 3, 10), state)
        parts.append(y)
        for t in range(13, 31):
            y, state = layer.step(x[:, t : t + 1], context_for(config, 1, t), state)
            parts.append(y)
        torch.testing.assert_close(
            torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-5, msg=lambda m, c=config: f"{c}\n{m}"
        )


@pytest.mark.parametrize(("kind", "branches", "basis"), VARIANTS)
@torch.no_grad()
def test_stu_is_the_sum_over_features(tiny_config, kind, branches, basis):
    config = stu_config(tiny_config, kind, branches, basis)
    layer = random_layer(STU(config))
    phi = spectral_filters(65, config.num_filters, basis)[1]
    x = torch.randn(2, 21, config.hidden_size)
    features = torch.zeros(2, 2, 21, config.num_filters, config.hidden_size, dtype=torch.float64)
    for t in range(21):
        for lag in range(t + 1):
            contribution = phi[lag][None, :, None] * x[:, t - lag, None].double()
            features[0, :, t] += contribution
            features[1, :, t] += (-1) ** lag * contribution

    if kind == "tensordot":
        diagonal = torch.diag_embed(layer.M_filters.double())  # (branches, K, D, D)
        matrices = torch.einsum("ed,bkdf->bkef", layer.in_proj.weight.double().t(), diagonal)
    else:
        matrices = layer.M_phi.double()
    plus = torch.einsum("btkd,kde->bte", features[0], matrices[0])
    minus = 0 if branches == "positive" else torch.einsum("btkd,kde->bte", features[1], matrices[-1])
    y = layer(x, SequenceContext(phi.float()))
    torch.testing.assert_close(y.double(), plus + minus, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_shared_branches_see_even_lags_only(tiny_config):
    layer = random_layer(STU(tiny_config()))
    x = torch.zeros(1, 12, 32)
    x[:, 4] = 1
    y = layer(x, context_for(tiny_config(), 12))
    assert (y[:, 5::2].abs() < 1e-6).all()
    assert (y[:, 4::2].abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_padding_is_not_remembered(tiny_config):
    for config, layer in mixers(tiny_config):
        x = torch.randn(2, 15, config.hidden_size)
        mask = torch.ones(2, 15, dtype=torch.bool)
        mask[1, :6] = False
        context = context_for(config, 15)._replace(mask=mask)
        padded = layer(x, context)[1, 6:]
        alone = layer(x[1:, 6:], context_for(config, 9, 6))[0]
        torch.testing.assert_close(padded, alone, atol=2e-5, rtol=1e-5)


def test_lds_constants_stay_float32(tiny_config):
    layer = LDS(tiny_config(lds_state_dim=8))
    layer.decay.copy_(torch.tensor([0.9999, 0.99, 0.9, 0.5]))
    layer.bfloat16()
    assert layer.decay.dtype == torch.float32
    assert layer.decay[0].item() == pytest.approx(0.9999, abs=1e-7)
    assert layer.readout.dtype == torch.float32
    assert layer.in_proj.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_lds_state_does_not_grow(tiny_config):
    config = tiny_config(lds_state_dim=12)
    layer = random_layer(LDS(config))
    _, state = layer.prefill(torch.randn(1, 9, 32), SequenceContext())
    for _ in range(5):
        _, state = layer.step(torch.randn(1, 1, 32), SequenceContext(), state)
    assert [tuple(slot.shape) for slot in state.core.slots] == [(1, 32, 6)] * 2  # 12 state variables per channel


def test_mlp_formula(tiny_config):
    mlp = GatedMLP(tiny_config())
    x = torch.randn(2, 3, 32)
    gate, up = (layer.weight for _, layer in mlp.gate_up_proj.separate())
    gate = x @ gate.t()
    gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(mlp(x), (gelu * (x @ up.t())) @ mlp.down_proj.weight.t())
