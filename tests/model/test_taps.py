"""Taps of inputs and outputs: layers against the paper's sums written out, states, distillation, files, settings."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash_stu import FlashSTUConfig, UserError
from flash_stu.filters.spectral import spectral_filters
from flash_stu.generation import generate_tokens
from flash_stu.model.layers import LDS, STU
from flash_stu.model.layers.context import SequenceContext
from spectralds import distill

LENGTH, WIDTH, FILTERS = 41, 6, 5


def make(kind, branches, inputs, outputs, states=None):
    config = FlashSTUConfig(
        hidden_size=WIDTH,
        num_attention_heads=1,
        num_filters=FILTERS,
        max_position_embeddings=LENGTH,
        stu_type=kind,
        stu_branches=branches,
        stu_input_taps=inputs,
        stu_output_taps=outputs,
        lds_state_dim=states,
    )
    layer = STU(config) if states is None else LDS(config)
    torch.manual_seed(1)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if name == "taps.M_y":  # sum of the norms of its matrices below one: stable
            size = parameter.abs().amax(-1) if kind == "tensordot" else torch.linalg.matrix_norm(parameter, 2)
            parameter.data *= 0.9 / size.sum()
    if isinstance(layer, LDS):
        torch.nn.init.normal_(layer.readout, std=0.3)
        layer.decay.copy_(torch.linspace(0.2, 0.98, len(layer.decay)))
    return layer, SequenceContext(spectral_filters(LENGTH, FILTERS)[1].float()), torch.randn(2, LENGTH, WIDTH)


def matrices(weight, layer):
    """Coefficients of the layer, as matrices that act on its input x from the right: (number, WIDTH, WIDTH)."""
    weight = weight.detach().double()
    return layer.in_proj.weight.detach().double().T @ torch.diag_embed(weight) if layer.tensordot else weight


def paper(layer, context, x):
    """Eq. 6 of arXiv 2312.06837, token by token in float64, its features not delayed."""
    x, phi = x.double(), context.spectral_filters().double()
    learned = layer.M_filters if layer.tensordot else layer.M_phi
    plus = matrices(learned[0], layer)
    minus = {"shared": plus, "positive": torch.zeros_like(plus), "separate": matrices(learned[-1], layer)}
    taps = layer.taps
    inputs = [] if taps.M_u is None else list(matrices(taps.M_u, layer))
    outputs = [] if taps.M_y is None else list(taps.M_y.detach().double())
    outputs = [torch.diag(m) if layer.tensordot else m for m in outputs]
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for i, matrix in enumerate(outputs, start=1):
            if t >= i:
                y[:, t] += y[:, t - i] @ matrix
        for i, matrix in enumerate(inputs, start=1):
            if t + 1 >= i:
                y[:, t] += x[:, t + 1 - i] @ matrix
        for lag in range(t + 1):
            signed = plus + (-1) ** lag * minus[layer.branches]
            y[:, t] += x[:, t - lag] @ torch.einsum("k,kio->io", phi[lag], signed)
    return y


VARIANTS = [(kind, branches) for kind in ("tensordot", "full") for branches in ("shared", "separate", "positive")]
COUNTS = [(0, 1), (1, 0), (3, 0), (3, 2), (0, 32)]


@pytest.mark.parametrize(("kind", "branches"), VARIANTS)
@pytest.mark.parametrize(("inputs", "outputs"), COUNTS)
@torch.no_grad()
def test_a_layer_is_the_papers_sum(kind, branches, inputs, outputs):
    layer, context, x = make(kind, branches, inputs, outputs)
    expected = paper(layer, context, x)
    assert (layer(x, context) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("states", [None, 8])
@pytest.mark.parametrize(("kind", "branches"), [variant for variant in VARIANTS if variant[1] != "positive"])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 0), (3, 2), (0, 32), (45, 2)])
@torch.no_grad()
def test_forward_prefill_and_step_agree(kind, branches, inputs, outputs, states):
    layer, context, x = make(kind, branches, inputs, outputs, states)
    whole = layer(x, context)
    for prompt in (1, 18):
        y, state = layer.prefill(x[:, :prompt], context)
        z, state = layer.prefill(x[:, prompt : prompt + 4], context, state)
        rows = torch.tensor([1, 0])
        state, parts = state.select(rows), [y[rows], z[rows]]
        for t in range(prompt + 4, LENGTH):
            y, state = layer.step(x[rows, t : t + 1], context, state)
            parts.append(y)
        assert (torch.cat(parts, 1) - whole[rows]).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize("states", [None, 8])
@pytest.mark.parametrize("kind", ["tensordot", "full"])
@torch.no_grad()
def test_padding_is_not_remembered(kind, states):
    layer, context, x = make(kind, "shared", 3, 2, states)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, :6] = False
    padded = layer(x, context._replace(mask=mask))[1, 6:]
    alone = layer(x[1:, 6:], context)[0]
    assert (padded - alone).abs().max() <= 1e-5 * alone.abs().max()


def with_taps(model, seed=3):
    """Give a model's taps random values; the sum of its output taps is below one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".taps." in name:
            scale = 0.3 if name.endswith("M_u") else 0.9 / parameter.shape[0] / (parameter[0].numel() ** 0.5)
            parameter.data = torch.empty_like(parameter).uniform_(-scale, scale, generator=generator)
    return model


IDS = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))


def test_taps_begin_at_zero_and_learn(tiny_model):
    plain, tapped = tiny_model(), tiny_model(stu_input_taps=3, stu_output_taps=2)
    tapped.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(tapped(IDS).logits, plain(IDS).logits, atol=1e-6, rtol=1e-5)
    tapped(IDS, labels=IDS).loss.backward()
    for layer in tapped.model.layers[::2]:
        assert all(not p.detach().any() and (p.grad != 0).all() for p in layer.mixer.taps.parameters())


@pytest.mark.parametrize("kind", ["tensordot", "full"])
@torch.no_grad()
def test_a_distilled_model_keeps_its_taps(tiny_model, kind):
    model = with_taps(tiny_model(stu_type=kind, stu_input_taps=3, stu_output_taps=2))
    distilled = distill(model, 80)
    expected, found = model(IDS).logits, distilled(IDS).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    changed = expected - tiny_model(stu_type=kind)(IDS).logits
    assert changed.abs().max() > 1e-2 * expected.abs().max()
    for tested in (model, distilled):
        tokens = torch.stack(list(generate_tokens(tested, IDS[:, :7], 12)), 1)
        whole = torch.cat([IDS[:, :7], tokens], 1)
        cached = tested(whole[:, :7], use_cache=True)
        logits = [cached.logits[:, -1]]
        for t in range(7, whole.shape[1] - 1):
            logits.append(tested(whole[:, t : t + 1], past_key_values=cached.past_key_values).logits[:, -1])
        close = tested(whole).logits[:, 6:-1]
        assert (torch.stack(logits, 1) - close).abs().max() <= 2e-5 * close.abs().max()


def test_files_keep_them_and_older_files_have_none(tiny_model, tmp_path):
    model = with_taps(tiny_model(stu_input_taps=2, stu_output_taps=1))
    model.bfloat16().save_pretrained(tmp_path / "new")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    kept = dict(again.named_parameters())
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, kept[name])
        assert tensor.dtype == kept[name].dtype == (torch.float32 if name.endswith("M_y") else torch.bfloat16)

    plain = tiny_model()
    plain.config = plain.config.__class__(**{k: v for k, v in plain.config.to_user().items() if "_taps" not in k})
    plain.save_pretrained(tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    config.write_text("\n".join(line for line in config.read_text().splitlines() if "_taps" not in line))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "old")(IDS).logits, plain(IDS).logits)
    started = AutoModelForCausalLM.from_pretrained(tmp_path / "old", stu_input_taps=3, stu_output_taps=2)
    assert all(float(layer.mixer.taps.M_u.abs().sum()) == 0 for layer in started.model.layers[::2])
    torch.testing.assert_close(started(IDS).logits, plain(IDS).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["tensordot", "full"])
@pytest.mark.parametrize("states", [None, 16])
def test_weights_are_counted(tiny_config, tiny_model, kind, states):
    shape = {"stu_type": kind, "lds_state_dim": states, "stu_input_taps": 3, "stu_output_taps": 2}
    model = tiny_model(**shape)
    constants = sum(buffer.numel() for buffer in model.buffers())
    assert tiny_config(**shape).count_weights() == model.num_parameters() + constants


@pytest.mark.parametrize("key", ["stu_input_taps", "stu_output_taps"])
@pytest.mark.parametrize("value", [-1, 257, 1.5, "3"])
def test_bad_numbers_are_one_line(key, value):
    with pytest.raises(UserError, match=key) as error:
        FlashSTUConfig.from_user({key: value})
    assert "\n" not in str(error.value)
