"""The learning-rate schedule against its closed form, and which parameters decay."""

import math

import pytest
import torch
from torch import nn

from flash_stu.training.config import OptimizerConfig
from flash_stu.training.optimizer import build_optimizer, learning_rate, set_learning_rate


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
    optimizer = build_optimizer(model, config(weight_decay=0.1))
    set_learning_rate(optimizer, 0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    # in the first step the bias-corrected moments are the gradient and its square
    for p, old, decay in zip(model.parameters(), before, [0.1, 0.0], strict=True):
        expected = old * (1 - 0.01 * decay) - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected)
