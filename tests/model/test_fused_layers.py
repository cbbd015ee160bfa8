"""Layers that are one product, against the separate layers that they join; and models stored with those."""

import re

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from flash_stu import UserError, load_model
from flash_stu.model.layers.linear import FUSED, FusedLinear, join

SHAPE = {"num_key_value_heads": 2, "bias": True}


def separated(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors as versions before 0.3.0 stored them."""
    sizes = {"qkv_proj": (32, 16, 16), "gate_up_proj": (48, 48)}
    tensors = {}
    for name, tensor in model.state_dict().items():
        *path, layer, key = name.split(".")
        parts = tensor.split(sizes[layer]) if layer in sizes else [tensor]
        for part, value in zip(FUSED.get(layer, [layer]), parts, strict=True):
            tensors[".".join([*path, part, key])] = value.clone()
    return tensors


@pytest.fixture
def model(tiny_model):
    model = tiny_model(**SHAPE)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def test_parts_are_layers_of_their_own():
    fused = FusedLinear("qkv_proj", 5, (6, 2, 2), bias=True)
    x = torch.randn(3, 5)
    layers = dict(fused.separate())
    assert [*layers] == ["q_proj", "k_proj", "v_proj"]
    torch.testing.assert_close(fused(x), torch.cat([layer(x) for layer in layers.values()], dim=1))
    layers["k_proj"].weight.zero_()
    assert not fused.weight[6:8].any() and fused.weight[:6].all()


def test_names():
    assert join("model.layers.1.mixer.k_proj.weight") == ("model.layers.1.mixer.qkv_proj.weight", 1)
    assert join("optimizer.mlp.up_proj.weight.exp_avg") == ("optimizer.mlp.gate_up_proj.weight.exp_avg", 1)
    assert join("mixer.qkv_proj.weight") is None and join("mixer.o_proj.weight") is None


@torch.no_grad()
def test_attention_and_mlp_are_those_of_separate_layers(model):
    weights = separated(model)

    def linear(x, name):
        return F.linear(x, weights[f"model.layers.1.{name}.weight"], weights[f"model.layers.1.{name}.bias"])

    block, seen = model.model.layers[1], {}
    block.mixer.qkv_proj.register_forward_hook(lambda _m, inputs, y: seen.update(x=inputs[0], y=y))
    block.mlp.register_forward_hook(lambda _m, inputs, y: seen.update(u=inputs[0], z=y))
    model(torch.randint(0, 61, (2, 9)))
    together = torch.cat([linear(seen["x"], f"mixer.{name}_proj") for name in "qkv"], dim=-1)
    torch.testing.assert_close(seen["y"], together)
    gate = F.gelu(linear(seen["u"], "mlp.gate_proj"), approximate="tanh")
    torch.testing.assert_close(seen["z"], linear(gate * linear(seen["u"], "mlp.up_proj"), "mlp.down_proj"))


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_directories_of_separate_layers_load(model, tmp_path, shards):
    model.save_pretrained(tmp_path / "old", state_dict=separated(model), max_shard_size=shards)
    files = sorted((tmp_path / "old").glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "20KB")
    names = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118 - not a mapping
    assert "model.layers.3.mixer.v_proj.bias" in names and not any("qkv_proj" in name for name in names)
    expected = model.state_dict()
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "old")
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path / "new")  # fused from now on
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert "model.layers.3.mixer.qkv_proj.bias" in file.keys()  # noqa: SIM118
    assert torch.equal(load_model(tmp_path / "new").lm_head.weight, model.lm_head.weight)


def test_state_dicts_of_separate_layers_load(model, tiny_model):
    other = tiny_model(seed=1, **SHAPE)
    assert not other.load_state_dict(separated(model)).missing_keys
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert not other.load_state_dict(model.state_dict()).missing_keys


@pytest.mark.parametrize("name", ["model.layers.1.mixer.k_proj.bias", "model.layers.0.mlp.gate_proj.weight"])
def test_a_part_that_is_missing_or_misshapen_is_named(model, tmp_path, name):
    tensors = separated(model)
    first = tensors.pop(name)
    model.save_pretrained(tmp_path, state_dict=dict(tensors))
    with pytest.raises(UserError, match=f"no tensor {re.escape(name)}"):
        load_model(tmp_path)
    model.save_pretrained(tmp_path, state_dict=tensors | {name: first[1:].clone()})
    with pytest.raises(UserError, match=f"{re.escape(name)} has shape"):
        load_model(tmp_path)
