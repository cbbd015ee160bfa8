"""Training with fused layers is that with the layers they join: initial weights, Muon's steps, older checkpoints."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import fully_shard
from toy_checkpoints import ALONE, checkpointer, state

from flash_stu.distributed import World
from flash_stu.model.layers.linear import FusedLinear
from flash_stu.training.initialization import build_model, initialize, read_initial_weights
from flash_stu.training.model_source import load_weights
from flash_stu.training.muon import Muon

PARTS = {"q_proj": 6, "k_proj": 4, "v_proj": 3}  # rows that 2 processes share unevenly


class Separate(nn.Module):
    def __init__(self):
        super().__init__()
        for name, rows in PARTS.items():
            setattr(self, name, nn.Linear(5, rows))

    def forward(self, x):
        return torch.cat([getattr(self, name)(x) for name in PARTS], dim=-1)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = FusedLinear("qkv_proj", 5, tuple(PARTS.values()), bias=True)

    def forward(self, x):
        return self.qkv_proj(x)


def optimizers(model, muon=True):
    weights = [p for p in model.parameters() if p.ndim == 2]
    rows = {p: tuple(PARTS.values()) if isinstance(model, Fused) else tuple(p.shape[:1]) for p in weights}
    settings = {"lr": 0.1, "weight_decay": 0.1}
    first = Muon(rows, momentum=0.9, **settings) if muon else torch.optim.AdamW(weights, amsgrad=True, **settings)
    return [first, torch.optim.AdamW([p for p in model.parameters() if p.ndim == 1], **settings)]


def train(model, steppers, steps):
    """Steps whose gradients are not those of one process's data; sums of small integers, exact in any order."""
    x = torch.arange(20.0).reshape(4, 5).remainder(7) - 3
    for _ in range(steps):
        y = model(x)
        (y * (torch.arange(y.shape[-1]) - 5)).sum().backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def pair(muon=True):
    """Separate layers, and the same as one."""
    torch.manual_seed(0)
    separate, fused = Separate(), Fused()
    for key, tensor in fused.qkv_proj.named_parameters():
        tensor.data = torch.cat([getattr(getattr(separate, name), key).detach() for name in PARTS])
    return separate, fused


def assert_joined(separate, found):
    for key, tensor in found.items():
        joined = torch.cat([getattr(getattr(separate, name), key).detach() for name in PARTS])
        torch.testing.assert_close(tensor, joined, rtol=0, atol=1e-6)


def test_muon_takes_the_parts_for_matrices():
    separate, fused = pair()
    for model in (separate, fused):
        train(model, optimizers(model), 3)
    assert_joined(separate, dict(fused.qkv_proj.named_parameters()))


def sharded_muon():
    dist.init_process_group("gloo")
    model = pair()[1]
    fully_shard(model)
    train(model, optimizers(model), 3)
    weights = {key: whole(tensor) for key, tensor in model.qkv_proj.named_parameters()}
    dist.destroy_process_group()
    return weights


def test_muon_finds_the_parts_of_a_sharded_weight():
    separate, _ = pair()
    train(separate, optimizers(separate), 3)
    for weights in run_processes(2, sharded_muon):
        assert_joined(separate, weights)


def resumed(folder: Path, muon: bool, sharded: bool):
    """Weights and moments after resuming a checkpoint, by name."""
    world = ALONE
    if sharded:
        dist.init_process_group("gloo")
        world = World(rank=dist.get_rank(), size=2, device=torch.device("cpu"))
    torch.manual_seed(1)
    model = Fused()
    if sharded:
        fully_shard(model)
    steppers = optimizers(model, muon)
    with checkpointer(folder, model, steppers, world=world) as saver:
        assert saver.resume() is not None
    keys = {p: key for key, p in model.qkv_proj.named_parameters()}
    moments = {(keys[p], key): whole(v) for s in steppers for p, values in s.state.items() for key, v in values.items()}
    weights = {key: whole(p) for p, key in keys.items()}
    if sharded:
        dist.destroy_process_group()
    return weights, moments


@pytest.mark.parametrize("muon", [False, True])
def test_checkpoints_of_separate_layers_are_resumed_exactly(tmp_path, muon):
    separate, _ = pair()
    steppers = optimizers(separate, muon)
    train(separate, steppers, 2)
    with checkpointer(tmp_path, separate, steppers) as saver:
        saver.save(state(2))
    state_of = {p: s for stepper in steppers for p, s in stepper.state.items()}
    for weights, moments in [
        resumed(tmp_path, muon, False),
        *run_processes(2, resumed, tmp_path, muon, True),
    ]:
        for key, weight in weights.items():
            parts = [getattr(getattr(separate, name), key) for name in PARTS]
            assert torch.equal(weight, torch.cat([p.detach() for p in parts]))
            for moment, value in state_of[parts[0]].items():
                expected = torch.cat([state_of[p][moment] for p in parts]) if value.ndim else value
                assert torch.equal(moments[key, moment], expected)
        assert len(moments) == (1 if muon else 4) + 3
    model = Fused()
    load_weights(tmp_path / "step-2", model)
    assert_joined(separate, dict(model.qkv_proj.named_parameters()))


def test_each_part_is_drawn_as_the_layer_that_it_was(tiny_config, tmp_path):
    """Numbers in the documentation come from initial weights that are functions of seed and name."""
    config = tiny_config(num_key_value_heads=2)
    model = build_model(config)
    initialize(model, torch.device("cpu"), 3)
    rows = {"mixer.qkv_proj": {"q": 32, "k": 16, "v": 16}, "mlp.gate_up_proj": {"gate": 48, "up": 48}}
    former = {}
    for layer, parts in rows.items():
        for part, count in parts.items():
            name = f"model.layers.1.{layer.split('.')[0]}.{part}_proj"
            digest = hashlib.sha256(f"3 {name}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            former[f"{name}.weight"] = nn.init.normal_(torch.empty(count, 32), std=32**-0.5)
        drawn = torch.cat([former[f"model.layers.1.{layer.split('.')[0]}.{part}_proj.weight"] for part in parts])
        assert torch.equal(model.get_submodule(f"model.layers.1.{layer}").weight, drawn)


def test_initial_weights_of_separate_layers(tiny_model, tmp_path):
    model = tiny_model(num_key_value_heads=2)
    tensors = {}
    for name, module in model.named_modules():
        for layer, part in module.separate() if isinstance(module, FusedLinear) else ():
            tensors[f"{name.rpartition('.')[0]}.{layer}.weight"] = part.weight.clone()
    rest = {name: t for name, t in model.state_dict().items() if "qkv_proj" not in name and "gate_up" not in name}
    model.save_pretrained(tmp_path, state_dict=rest | tensors)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.1.mixer.q_proj.weight" in file.keys()  # noqa: SIM118
    other = build_model(model.config)
    read_initial_weights(other, torch.device("cpu"), tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
