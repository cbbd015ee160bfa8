"""flex_attention on a CPU, where PyTorch runs it densely: its block mask, its results, and how often it is compiled."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

from flash_stu.ops import backends
from flash_stu.ops.attention import flex
from flash_stu.ops.attention.banded import banded_attention
from flash_stu.ops.attention.choice import shared_band
from flash_stu.ops.positions import alibi_slopes

CPU = torch.device("cpu")


@pytest.fixture
def counter(monkeypatch):
    """Compile flex_attention to what PyTorch runs eagerly, and count how often."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex.flex_attention, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    return counter


@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [
        (512, 512, 100),
        (300, 300, 128),
        (1000, 1300, 300),
        (1, 1, 1),
        (129, 400, 257),
        (640, 640, 513),
        (700, 700, 2000),
    ],
)
def test_the_band_is_pytorch_s_block_mask(queries, keys, window):
    band = flex.window_band(queries, keys, window, CPU)
    expected = create_block_mask(band.mask_mod, None, None, queries, keys, device="cpu")
    row, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    visible = (column <= row) & (column > row - window)
    assert torch.equal(band.mask_mod(0, 0, torch.arange(queries)[:, None], column), visible)
    assert band.shape == expected.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(band, name), getattr(expected, name))
    assert torch.equal(band.to_dense(), expected.to_dense())


def draw(batch, length, keys=None):
    torch.manual_seed(length)
    return (torch.randn(batch, heads, n, 8) for heads, n in ((4, length), (2, keys or length), (2, keys or length)))


def test_against_the_banded_form(counter):
    slopes, mask = alibi_slopes(4), torch.ones(2, 200, dtype=torch.bool)
    mask[1, :9] = False
    for options in ({}, {"softcap": 3.0}, {"softcap": 3.0, "slopes": slopes}, {"key_mask": mask}):
        q, k, v = draw(2, 150, 200)
        y = flex.compiled_flex_attention(q, k, v, 40, **options)
        torch.testing.assert_close(y, banded_attention(q, k, v, 40, **options), atol=2e-6, rtol=1e-5)


def test_lengths_and_batches_of_all_kinds_are_compiled_a_few_times(counter):
    for number in range(12):
        q, k, v = draw(1 + number % 3, 130 + 37 * number)
        y = flex.compiled_flex_attention(q, k, v, 40, 5.0)
        torch.testing.assert_close(y, banded_attention(q, k, v, 40, 5.0), atol=2e-6, rtol=1e-5)
    # not for every shape: from recompile_limit on all scores would be held
    assert counter.frame_count < torch._dynamo.config.recompile_limit < 12


def test_the_model_makes_it_once_for_a_length_and_never_in_compiled_code(counter, tiny_model):
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph.code)
        return graph.forward

    model = tiny_model(attention_backend="flex_attention", max_position_embeddings=300)
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend=keep)
    flex.window_band.cache_clear()
    ids = torch.randint(0, 61, (2, 260))
    with torch.no_grad():
        for length in (260, 260, 140, 260):
            model(ids[:, :length], use_cache=False)
    assert flex.window_band.cache_info()[:2] == (2, 2)  # hits, misses
    assert any("flex_attention" in code for code in graphs)
    assert not any("argsort" in code for code in graphs)


@pytest.mark.parametrize(
    ("backend", "device", "length", "made"),
    [
        ("auto", "cuda", 512, True),
        ("auto", "cuda", 511, False),
        ("auto", "cpu", 8192, False),
        ("banded", "cuda", 8192, False),
        ("flash_attn", "cuda", 8192, False),
        ("flex_attention", "cuda", 3, True),
    ],
)
def test_who_wants_a_band(monkeypatch, backend, device, length, made):
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    monkeypatch.setattr(flex, "window_band", lambda *arguments: arguments)
    band = shared_band(backend, length, 9, torch.device(device))
    assert band == ((length, length, 9, torch.device(device)) if made else None)
    monkeypatch.setattr(backends, "why_not", lambda name: "there is none")
    assert shared_band(backend, length, 9, torch.device(device)) is None


def test_prompts_and_documents_have_none(counter, tiny_model):
    """They come in all lengths; what is asked for by name is done all the same."""
    made = []
    model = tiny_model(attention_backend="flex_attention")
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, inputs: made.append(inputs[1].band))
    ids = torch.randint(0, 61, (1, 20))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert all(band is not None for band in made)
        made.clear()
        torch.testing.assert_close(model(ids, use_cache=True).logits, expected, atol=1e-5, rtol=1e-5)
        model(ids, seq_idx=(torch.arange(20) > 7).int()[None], use_cache=False)
    assert made == [None] * len(made)
