"""A little model whose checkpoints tests save, resume and damage."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flash_stu.distributed import World
from flash_stu.training.checkpoint import Checkpointer
from flash_stu.training.checkpoint_folder import RunState

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Tied(nn.Module):
    """Two layers that share their weight, and a buffer. Four processes cannot share 5 rows evenly: one has none."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.randn(5))

    def forward(self, x):
        return self.second(self.first(x)) + self.table


def build(seed: int, strategy: str = "none") -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """A model, parallel if need be, and two optimizers: for its matrix and for its vectors."""
    torch.manual_seed(seed)
    model = Tied()
    if strategy == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif strategy == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif strategy == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return model, [torch.optim.AdamW(matrices, lr=0.1, amsgrad=True), torch.optim.SGD(vectors, lr=0.1, momentum=0.9)]


def train(model, optimizers, steps: int = 1):
    """Steps on one batch, the same in every process: the mean gradient of 2 or 4 is then exactly that of one."""
    for _ in range(steps):
        model(torch.arange(20).reshape(4, 5) / 20).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def whole(model) -> dict[str, torch.Tensor]:
    """All weights, gathered, without DDP's prefix and the names of tied ones."""
    return {
        name.removeprefix("module."): (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in model.state_dict().items()
        if "second.weight" not in name
    }


def trained(steps: int) -> dict[str, torch.Tensor]:
    model, optimizers = build(1)
    train(model, optimizers, steps)
    return whole(model)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def state(step: int, data: str = "") -> RunState:
    return RunState(step=step, seconds=0.0, run_id="0", data=data, skipped=0, skipped_in_a_row=0)


def checkpointer(folder, model, optimizers, keep=3, **options) -> Checkpointer:
    return Checkpointer(folder, model, optimizers, options.pop("world", ALONE), keep, **options)


def save(folder: Path, step: int, **options) -> None:
    """Save a new model as the checkpoint of a step."""
    with checkpointer(folder, *build(1), **options) as saver:
        saver.save(state(step))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
