"""The learning-rate schedule against its closed form, and which optimizer does what to which parameters."""

import math

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from pydantic import ValidationError
from torch import nn
from torch.distributed.fsdp import fully_shard

from flash_stu import FlashSTUConfig, FlashSTUForCausalLM
from flash_stu.training.muon import Muon, orthogonalize
from flash_stu.training.optimizer import build_optimizers, learning_rate, set_learning_rate
from flash_stu.training.run_config import OptimizerConfig


def config(**values) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 3e-3, "min_learning_rate": 3e-5, "warmup_steps": 1907, **values})


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("linear", 1, 3e-3 / 1907),
        ("linear", 953, 3e-3 * 953 / 1907),
        ("linear", 1907, 3e-3),
        ("linear", 1907 + 17166 // 2, (3e-3 + 3e-5) / 2),
        ("linear", 19073, 3e-5),
        ("cosine", 1907, 3e-3),
        ("cosine", 1907 + 17166 // 3, 3e-5 + (3e-3 - 3e-5) * (1 + math.cos(math.pi / 3)) / 2),
        ("cosine", 19073, 3e-5),
        ("constant", 1000, 3e-3 * 1000 / 1907),
        ("constant", 19073, 3e-3),
    ],
)
def test_schedule(schedule, step, expected):
    assert learning_rate(step, config(schedule=schedule), 19073) == pytest.approx(expected, rel=1e-12)


def test_schedule_without_warmup_and_all_warmup():
    assert learning_rate(1, config(warmup_steps=0), 10) == pytest.approx(3e-3 - (3e-3 - 3e-5) / 10)
    assert learning_rate(10, config(warmup_steps=10), 10) == 3e-3


def test_one_step_is_adamw_and_only_matrices_decay():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = build_optimizers(model, config(weight_decay=0.1))
    set_learning_rate(optimizers, 0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    # in the first step the bias-corrected moments are the gradient and its square
    for p, old, decay in zip(model.parameters(), before, [0.1, 0.0], strict=True):
        expected = old * (1 - 0.01 * decay) - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer(tiny_model, name):
    model = tiny_model(bias=True)
    model.model.layers[0].requires_grad_(False)
    optimizers = build_optimizers(model, config(name=name))
    assert [type(optimizer).__name__.lower() for optimizer in optimizers] == sorted({name, "adamw"}, reverse=True)
    names = {id(p): key for key, p in model.named_parameters()}
    held = [
        (names[id(p)], type(optimizer).__name__, group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert sorted(key for key, _, _ in held) == sorted(trained)
    for key, kind, decay in held:
        assert decay == (0.1 if trained[key].ndim > 1 else 0)
        assert (kind == "Muon") == (name == "muon" and key.endswith("proj.weight"))
    assert {"model.embed_tokens.weight", "model.layers.2.mixer.M_filters"} <= {
        k for k, kind, _ in held if kind != "Muon"
    }


@pytest.mark.parametrize("key", ["mlp.down_proj", "mixer.in_proj"])
def test_a_step_of_muon_is_a_near_rotation_as_large_as_a_step_of_adamw(tiny_model, key):
    model = tiny_model()
    weight = model.model.layers[0].get_submodule(key).weight
    optimizers = build_optimizers(model, config(name="muon", weight_decay=0.1))
    set_learning_rate(optimizers, 0.01)
    before = weight.detach().double()
    u, _, v = torch.linalg.svd(torch.randn_like(weight), full_matrices=False)
    weight.grad = u * torch.linspace(0.1, 1, len(v)) @ v
    optimizers[0].step()
    update = before * (1 - 0.01 * 0.1) - weight.detach().double()
    singular = torch.linalg.svdvals(update) / (0.01 * 0.2 * max(weight.shape) ** 0.5)
    # five Newton-Schulz steps leave them spread around 1
    assert singular.min() > 0.5 and singular.max() < 1.3
    assert (update * weight.grad).sum() > 0  # against the gradient
    assert update.square().mean().sqrt() == pytest.approx(0.01 * 0.2, rel=0.2)  # the usual size of AdamW's


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = (15 * s - 10 * s**3 + 3 * s**5) / 8
    found = orthogonalize(matrix.float(), (15 / 8, -10 / 8, 3 / 8), 5, 1e-7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), u * s @ v, rtol=0, atol=1e-5)
    assert not orthogonalize(torch.zeros(shape), (15 / 8, -10 / 8, 3 / 8), 5, 1e-7).any()


def test_muon_on_a_cpu_is_pytorchs_but_for_the_rounding():
    weights = [torch.nn.Parameter(torch.eye(6, 4)) for _ in range(2)]
    settings = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = [
        Muon({weights[0]: (6,)}, **settings),
        torch.optim.Muon(weights[1:], **settings, adjust_lr_fn="match_rms_adamw"),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        grad = torch.randn(6, 4, generator=generator)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    ours, theirs = (weight.detach() - torch.eye(6, 4) for weight in weights)
    assert (ours - theirs).norm() < 0.05 * theirs.norm()  # bfloat16 has 8 bits, and a step several products
    torch.testing.assert_close(*(o.state[w]["momentum_buffer"] for o, w in zip(optimizers, weights, strict=True)))


SIZES = {
    "vocab_size": 41, "hidden_size": 18, "intermediate_size": 25, "num_hidden_layers": 2, "num_attention_heads": 3,
    "sliding_window": 5, "max_position_embeddings": 16, "num_filters": 4,
}  # fmt: skip


def muon_weights(world_size: int, steps: int = 3) -> dict[str, torch.Tensor]:
    """The weights after some steps of Muon, sharded over the processes if there are several."""
    torch.manual_seed(0)
    model = FlashSTUForCausalLM(FlashSTUConfig(**SIZES))
    if world_size > 1:
        dist.init_process_group("gloo")
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizers = build_optimizers(model, config(name="muon", learning_rate=0.02))
    ids = torch.randint(0, 41, (3, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = {key: p.full_tensor() if world_size > 1 else p for key, p in model.named_parameters()}
    if world_size > 1:
        dist.destroy_process_group()
    return {key: weight.detach() for key, weight in weights.items()}


def test_muon_under_fsdp_equals_one_process():
    initial, alone = muon_weights(1, steps=0), muon_weights(1)
    sharded, also_sharded = run_processes(2, muon_weights, 2)
    for key, weight in alone.items():
        assert sharded[key].equal(also_sharded[key])
        # Newton-Schulz runs in bfloat16, from a norm that is summed in another order
        assert (sharded[key] - weight).norm() < 0.04 * (weight - initial[key]).norm(), key


def test_momentum_is_refused_out_of_range():
    with pytest.raises(ValidationError, match="momentum"):
        config(momentum=1.0)
