"""The initial weights are a function of the seed and the names, not of the processes."""

import pytest
import torch
from processes import run_processes

from flash_stu.training import join_world
from flash_stu.training.initialization import build_model
from flash_stu.training.parallel import parallelize
from flash_stu.training.run_config import load_config


def initial_weights(config_file: str, *overrides: str) -> tuple[dict[str, torch.Tensor], bool]:
    """Whole initial weights and buffers by name, and whether the head is tied to the embedding."""
    config = load_config(config_file, list(overrides))
    with join_world(config) as world:
        model = parallelize(build_model(config.architecture()), config, world)
        model = getattr(model, "module", model)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        whole = {name: getattr(t, "full_tensor", lambda t=t: t)().detach().clone() for name, t in tensors}
        return whole, model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [(1, ["parallel.strategy=fsdp"]), (3, ["parallel.strategy=fsdp"]), (2, ["parallel.strategy=ddp"])],
)
def test_they_are_the_same_for_every_number_of_processes(config_file, processes, overrides):
    shape = ["train.global_batch_size=144", "train.micro_batch_size=1", "model.hidden_size=20"]  # uneven shards for 3
    expected, tied = initial_weights(config_file, *shape)
    assert tied
    for weights, tied in run_processes(processes, initial_weights, str(config_file), *shape, *overrides):
        assert tied
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_seed_and_the_name_decide(config_file):
    first, _ = initial_weights(config_file)
    torch.rand(5)  # the global generator has no say
    again, _ = initial_weights(config_file)
    other, _ = initial_weights(config_file, "seed=2")
    deeper, _ = initial_weights(config_file, "model.num_hidden_layers=4")
    gate = "model.layers.1.mlp.gate_up_proj.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[gate], other[gate])
    assert torch.equal(first[gate], deeper[gate])
    assert not torch.equal(first[gate], first["model.layers.0.mlp.gate_up_proj.weight"])


def test_they_have_the_sizes_the_model_asks_for(config_file):
    weights, _ = initial_weights(config_file, "model.hidden_size=64", "model.intermediate_size=96")
    assert weights["model.layers.0.mlp.gate_up_proj.weight"].std() == pytest.approx(64**-0.5, rel=0.05)
    assert weights["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx((4 * 96) ** -0.5, rel=0.05)
    assert torch.equal(weights["model.norm.weight"], torch.ones(64))
    assert weights["model.filters.phi"].abs().sum() > 0
