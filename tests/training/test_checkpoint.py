"""Checkpoints that were truncated, altered, or written halfway."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from flash_stu import UserError
from flash_stu.training import checkpoint
from flash_stu.training.parallel import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


class Tied(nn.Module):
    """Two layers that share their weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.randn(5))


def build(seed: int) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)


def step(model, optimizer):
    torch.manual_seed(0)
    (model.second(model.first(torch.randn(4, 3))) + model.table.sum()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints of the steps 1, 2 and 3 of a little training."""
    model, optimizer = build(1)
    for number in (1, 2, 3):
        step(model, optimizer)
        checkpoint.save(tmp_path, number, model, optimizer, {"note": f"after {number}"}, keep=3, world=ALONE)
    return tmp_path


def resume(folder: Path):
    """Load into a fresh model and return it after one more step, with the progress and the reports."""
    reports = []
    model, optimizer = build(2)
    progress = checkpoint.resume(folder, model, optimizer, ALONE, reports.append)
    step(model, optimizer)
    return model.state_dict(), progress, reports


def trained(steps: int):
    model, optimizer = build(1)
    for _ in range(steps):
        step(model, optimizer)
    return model.state_dict()


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_newest_is_resumed_exactly(folder):
    state, progress, reports = resume(folder)
    assert progress == {"note": "after 3", "step": 3}
    assert reports == []
    assert_equal(state, trained(4))


def test_nothing_to_resume(tmp_path):
    model, optimizer = build(1)
    assert checkpoint.resume(tmp_path / "checkpoints", model, optimizer, ALONE) is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", truncate, "bytes instead of"),
        ("optimizer.safetensors", alter, "checksum"),
        ("optimizer.safetensors", Path.unlink, "optimizer.safetensors"),
        ("progress.json", truncate, "damaged checkpoint"),
        ("progress.json", Path.unlink, "progress.json"),
        ("progress.json", lambda path: path.write_text("[]"), "progress.json"),
        ("progress.json", lambda path: path.write_text("{}"), "progress.json"),
    ],
)
def test_a_damaged_newest_is_named_and_the_one_before_used(folder, name, damage, words):
    damage(folder / "step-3" / name)
    state, progress, reports = resume(folder)
    assert progress["step"] == 2
    assert_equal(state, trained(3))
    assert len(reports) == 1 and "step-3" in reports[0] and words in reports[0]
    assert sorted(path.name for path in folder.iterdir()) == ["step-1", "step-2", "step-3.damaged"]
    assert resume(folder)[2] == []  # it is not tried again


def test_all_damaged_is_an_error_and_nothing_is_touched(folder):
    for number in (1, 2, 3):
        truncate(folder / f"step-{number}" / "model.safetensors")
    with pytest.raises(UserError, match="none of its 3 checkpoints is intact"):
        resume(folder)
    assert checkpoint.list_steps(folder) == [1, 2, 3]


def test_a_half_written_checkpoint_is_ignored_and_cleared_away(folder):
    (folder / ".step-4.tmp").mkdir()
    (folder / ".step-4.tmp" / "model.safetensors").write_bytes(b"half")
    assert resume(folder)[1]["step"] == 3
    model, optimizer = build(1)
    checkpoint.save(folder, 5, model, optimizer, {}, keep=2, world=ALONE)
    assert sorted(path.name for path in folder.iterdir()) == ["step-3", "step-5"]


def test_a_failing_write_leaves_no_checkpoint(folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "_flush_to_disk", fail)
    model, optimizer = build(1)
    with pytest.raises(UserError, match="checkpoint of step 4 cannot be written .*disk full"):
        checkpoint.save(folder, 4, model, optimizer, {}, keep=2, world=ALONE)
    assert checkpoint.list_steps(folder) == [1, 2, 3]


def test_tied_weights_are_written_once_and_nothing_is_pickled(folder):
    from safetensors.torch import load_file

    path = folder / "step-3"
    assert sorted(file.name for file in path.iterdir()) == [
        "model.safetensors", "optimizer.safetensors", "progress.json",
    ]  # fmt: skip
    assert sorted(load_file(path / "model.safetensors")) == [
        "first.bias",
        "first.weight",
        "second.bias",
        "table",
    ]
    assert "first.weight/max_exp_avg_sq" in load_file(path / "optimizer.safetensors")
    assert json.loads((path / "progress.json").read_text())["step"] == 3
