"""Counted FLOPs against the products that PyTorch sees, and sums over tokens written out."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flash_stu.training.flops import forward_flops, mean_keys, peak_flops, train_flops

LENGTH = 7  # at most the window: then attention multiplies all queries with all keys, and its share is known


def attention_flops(query, key, *_, out_shape=None, **__) -> int:
    """Scores and weighted values of all queries with all keys, from the shapes that the operator is called with."""
    return 2 * 2 * math.prod(query) * key[2]


def counted(model, length: int) -> dict[str, int]:
    """FLOPs of matrix products per module name, in a forward pass of one sequence."""
    formulas = {torch.ops.flash_stu.banded_attention: attention_flops}
    counter = FlopCounterMode(display=False, depth=None, custom_mapping=formulas)
    with counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    return {
        name.removeprefix(f"{type(model).__name__}."): sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
    }


def total(flops: dict[str, int], *endings: str) -> int:
    return sum(count for name, count in flops.items() if name.endswith(endings))


def fft_flops(length: int, dilation: int, sequences: int, filters: int) -> float:
    """The formula of the module's head: sequences and filters of ceil(length / dilation), padded to twice that."""
    size = 2 * math.ceil(length / dilation)
    return (2 * sequences + filters) * 2.5 * size * math.log2(size) + sequences * 6 * (size / 2 + 1)


@pytest.mark.parametrize("branches", ["shared", "separate", "positive"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_matrix_products_are_those_that_run(tiny_model, branches, kv_heads):
    model = tiny_model(
        stu_branches=branches, num_key_value_heads=kv_heads, attention_backend="banded", conv_backend="fft"
    )
    seen = counted(model, LENGTH)
    ours = {part: LENGTH * count for part, count in forward_flops(model.config, LENGTH).items()}
    projections = total(seen, "qkv_proj", "o_proj", "in_proj")
    assert ours["projections"] == projections
    assert ours["mlp"] == total(seen, "mlp")
    assert ours["head"] == total(seen, "lm_head")
    scores = sum(total(seen, f"layers.{i}.mixer") - total(seen, f"layers.{i}.mixer.o_proj") for i in (1, 3))
    scores -= total(seen, "qkv_proj")
    assert ours["attention"] == pytest.approx(scores * (LENGTH + 1) / (2 * LENGTH))

    dilation = 2 if branches == "shared" else 1
    products = sum(total(seen, f"layers.{i}.mixer") for i in (0, 2)) - total(seen, "in_proj")
    expected = 2 * fft_flops(LENGTH, dilation, sequences=32 * dilation, filters=32) + products
    assert ours["conv"] == pytest.approx(expected)


def test_full_stu(tiny_model):
    model = tiny_model(stu_type="full", layer_types=["linear_attention"] * 4, conv_backend="fft")
    ours = forward_flops(model.config, LENGTH)
    seen = counted(model, LENGTH)
    spread = 2 * math.ceil(LENGTH / 2) * 32  # a filter is multiplied by ones to be every channel's, which is no work
    assert LENGTH * ours["projections"] + 4 * 8 * spread == sum(total(seen, f"layers.{i}.mixer") for i in range(4))
    assert LENGTH * ours["conv"] == pytest.approx(4 * 8 * fft_flops(LENGTH, 2, sequences=64, filters=1))
    assert ours["attention"] == 0


def test_lds_layers_count_their_states_as_filters(tiny_config):
    stu, lds = (forward_flops(tiny_config(lds_state_dim=states), 64) for states in (None, 16))
    assert stu == lds  # 16 states, 8 for each of two phases: as many as filters
    assert forward_flops(tiny_config(lds_state_dim=32), 64)["conv"] - lds["conv"] == 2 * 2 * 8 * 32 / 2


def test_taps_are_products_of_channels_or_matrices(tiny_config):
    for kind, part, each in (("tensordot", "conv", 32), ("full", "projections", 32**2)):
        taps = {"stu_type": kind, "stu_input_taps": 3, "stu_output_taps": 2}
        plain, tapped = forward_flops(tiny_config(stu_type=kind), 64), forward_flops(tiny_config(**taps), 64)
        added = {key: tapped[key] - plain[key] for key in plain if tapped[key] != plain[key]}
        assert added == {part: pytest.approx(2 * 2 * (3 + 2) * each)}  # two layers, a product and a sum each


@pytest.mark.parametrize(("length", "window"), [(1, 5), (4, 5), (5, 5), (13, 5), (64, 1)])
def test_mean_keys(length, window):
    assert mean_keys(length, window) == pytest.approx(sum(min(t + 1, window) for t in range(length)) / length)


def test_the_340m_model(tiny_config):
    """By hand: 2 FLOPs a weight for all but the embedding, which is the head, and attention and convolution beside."""
    config = tiny_config(
        vocab_size=200064, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8,
        sliding_window=1024, max_position_embeddings=8192, num_filters=24,
    )  # fmt: skip
    flops = forward_flops(config, 8192)
    weights = 200064 * 1024 + 12 * 3 * 1024 * 2816 + 6 * 4 * 1024**2 + 6 * 1024**2
    assert flops["projections"] + flops["mlp"] + flops["head"] == 2 * weights
    assert flops["attention"] == 6 * 4 * 1024 * (1024 - 1024 * 1023 / 2 / 8192)
    # per channel and token: 5 transforms of 8192 points for 8192 tokens, 2 x 4097 products, 24 filters at even lags
    assert flops["conv"] == pytest.approx(6 * 1024 * (5 * 2.5 * 13 + 6 * 2 * 4097 / 8192 + 24))
    assert train_flops(config, 8192) == 3 * sum(flops.values())


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A10G", None),
        ("NVIDIA H20", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_rates_by_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda", 0)
    expected = None if teraflops is None else pytest.approx(1e12 * teraflops)
    assert peak_flops(cuda, torch.bfloat16) == expected
    assert peak_flops(cuda, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
