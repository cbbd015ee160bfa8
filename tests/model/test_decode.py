"""Token by token with every decode backend: the whole sequence's outputs, from any prompt, for any rows."""

import pytest
import torch

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM, UserError
from flash_stu.filters.spectral import spectral_filters
from flash_stu.model.layers import LDS, STU
from flash_stu.model.layers.context import SequenceContext
from spectralds import distill

STU_BACKENDS = ("futurefill", "futurefill_epoched", "naive")
VARIANTS = [
    ("tensordot", "shared"),
    ("tensordot", "separate"),
    ("tensordot", "positive"),
    ("full", "shared"),
    ("full", "separate"),
]
LENGTH = 257  # of the filters, and one past the second block of 128


def make(kind, branches, backend, **changes):
    config = FlashSTUConfig(
        hidden_size=12,
        num_attention_heads=2,
        num_filters=6,
        max_position_embeddings=LENGTH,
        stu_type=kind,
        stu_branches=branches,
        decode_backend=backend,
        lds_state_dim=12 if backend == "lds" else None,
        **changes,
    )
    layer = LDS(config) if backend == "lds" else STU(config)
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if backend == "lds":
        torch.nn.init.normal_(layer.readout, std=0.3)
        layer.decay.copy_(torch.linspace(0.2, 0.999, len(layer.decay)))
    context = SequenceContext(spectral_filters(LENGTH, 6)[1].float())
    return layer, context, torch.randn(3, LENGTH, 12)


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def steps(layer, context, x, state):
    outputs = []
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t : t + 1], context, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize(("kind", "branches"), VARIANTS)
@pytest.mark.parametrize("backend", ["lds", *STU_BACKENDS])
@torch.no_grad()
def test_prompts_and_steps_give_the_whole(kind, branches, backend):
    layer, context, x = make(kind, branches, backend)
    whole = layer(x, context)
    for prompt in (1, 5, 64):
        y, state = layer.prefill(x[:, :prompt], context)
        close(y, whole[:, :prompt])
        end = LENGTH if prompt == 5 else 80
        y, _ = steps(layer, context, x[:, prompt:end], state)
        close(y, whole[:, prompt:end])


@pytest.mark.parametrize(("kind", "branches"), VARIANTS)
@pytest.mark.parametrize("backend", ["lds", *STU_BACKENDS])
@torch.no_grad()
def test_whole_lengths(kind, branches, backend):
    layer, context, x = make(kind, branches, backend)
    for length in (1, 2, 3, 37, 128, 255, 256):
        expected = layer(x[:, : length + 1], context)
        y, state = layer.prefill(x[:, :length], context)
        close(y, expected[:, :-1])
        y, _ = layer.step(x[:, length : length + 1], context, state)
        close(y, expected[:, -1:])


@pytest.mark.parametrize("backend", ["lds", *STU_BACKENDS])
@pytest.mark.parametrize(("kind", "branches"), VARIANTS)
@torch.no_grad()
def test_rows_can_be_picked_at_any_time(kind, branches, backend):
    layer, context, x = make(kind, branches, backend)
    whole = layer(x[:, :200], context)
    rows = torch.tensor([2, 0, 2, 1])
    _, state = layer.prefill(x[:, :97], context)
    _, state = steps(layer, context, x[:, 97:133], state)
    y, state = steps(layer, context, x[rows, 133:150], state.select(rows))
    close(y, whole[rows, 133:150])
    y, state = layer.prefill(x[rows, 150:171], context, state)
    close(y, whole[rows, 150:171])
    y, _ = steps(layer, context, x[rows[:1], 171:200], state.select(torch.tensor([0])))
    close(y, whole[rows[:1], 171:])


@pytest.mark.parametrize("backend", ["lds", *STU_BACKENDS])
@torch.no_grad()
def test_half_precision_inputs(backend):
    layer, context, x = make("tensordot", "shared", backend)
    exact = layer(x, context)
    half = layer.bfloat16()
    y, state = half.prefill(x[:, :200].bfloat16(), context)
    z, state = steps(half, context, x[:, 200:].bfloat16(), state)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (torch.cat([y, z], 1) - exact).norm() <= 1e-2 * exact.norm()
    core = state.core
    kept = core.slots[0] if backend == "lds" else core.inputs if backend == "naive" else core.pending
    assert kept.dtype == (torch.bfloat16 if backend == "naive" else torch.float32)


@torch.no_grad()
def test_the_choice_is_read_at_every_prefill(tiny_model):
    model, ids = tiny_model(), torch.arange(1, 31).view(2, 15)
    whole = model(ids).logits
    assert model.config.resolve_decode_backend() == "futurefill"
    units = []
    for backend in STU_BACKENDS:
        model.config.decode_backend = backend
        out = model(ids[:, :7], use_cache=True)
        units.append(out.past_key_values.states[0].core.unit)
        y = [model(ids[:, t : t + 1], past_key_values=out.past_key_values).logits for t in range(7, 15)]
        torch.testing.assert_close(torch.cat(y, 1), whole[:, 7:], atol=1e-5, rtol=1e-5)
    assert len(set(units)) == 3
    model.config.decode_backend = "lds"
    with pytest.raises(UserError, match="decode_backend is 'lds', but the model has STU layers; allowed: futurefill, "):
        model(ids, use_cache=True)
    distilled = distill(tiny_model(), 16)
    distilled.config.decode_backend = "naive"
    with pytest.raises(UserError, match="decode_backend is 'naive', but the model has LDS layers; allowed: lds, auto"):
        distilled(ids, use_cache=True)


def test_the_choice_can_be_made_on_loading(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = FlashSTUForCausalLM.from_pretrained(tmp_path, decode_backend="naive")
    assert model.model.layers[0].mixer.config.resolve_decode_backend() == "naive"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_backend": "fast"}, "decode_backend is 'fast'; allowed: auto, lds, futurefill"),
        ({"decode_backend": "lds"}, "decode_backend is 'lds', but the model has STU layers"),
        ({"decode_backend": "naive", "lds_state_dim": 8}, "decode_backend is 'naive', but the model has LDS layers"),
        (
            {"decode_backend": "naive", "layer_types": ["sliding_attention"] * 12},
            "decode_backend is 'naive', but the model has only attention layers; allowed: auto",
        ),
        ({"lds_trainable": True}, "lds_trainable is true, but lds_state_dim is null"),
        ({"lds_state_dtype": "float16"}, "lds_state_dtype is 'float16'; allowed: float32, float64"),
    ],
)
def test_impossible_choices(changes, message):
    with pytest.raises(UserError) as error:
        FlashSTUConfig.from_user(changes)
    assert message in str(error.value)
