"""The optimizer step as a function: what it returns, and that a step that is not finite changes nothing."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_stu.distributed import World
from flash_stu.training.initialization import build_model
from flash_stu.training.optimizer import build_optimizers
from flash_stu.training.parallel import parallelize
from flash_stu.training.step import accumulate_gradients, train_step


def test_a_step_updates_the_weights_unless_it_is_not_finite(load):
    config, world = load(), World()
    model = parallelize(build_model(config.architecture()), config, world)
    optimizers = build_optimizers(model, config.optimizer)
    batch = torch.arange(4 * 25).reshape(4, 25)
    marks = []

    def step():
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        result = train_step(model, optimizers, batch, config, world, (2.0, 0.0), marks.append)
        assert all(parameter.grad is None for parameter in model.parameters())
        return result, {name for name, tensor in model.named_parameters() if not tensor.equal(before[name])}

    result, changed = step()
    assert result.taken and abs(result.loss - math.log(264)) < 0.3 and result.grad_norm > 0
    assert result.sums == [2.0, 0.0]
    assert marks == ["micro batch 1 of 2", "micro batch 2 of 2"]
    assert "model.embed_tokens.weight" in changed

    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    result, changed = step()
    assert not result.taken and not math.isfinite(result.loss) and changed == set()


def test_separate_documents_with_activation_checkpointing(load):
    batch = torch.arange(4 * 25).reshape(4, 25) % 11  # token 0 ends a document and begins the next
    norms = []
    for mode in ("none", "selective", "full"):
        config = load(f"train.activation_checkpointing={mode}")
        model = parallelize(build_model(config.architecture()), config, World())
        apart = accumulate_gradients(model, batch, config, World(), end_of_text=0)
        norms.append(torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item())
        assert apart != accumulate_gradients(model, batch, config, World())
    assert norms[1:] == pytest.approx(norms[:1] * 2, rel=1e-5)


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """Lists the operators for whose results a GPU has to be waited for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool for index in args[1] if isinstance(args[1], list | tuple)
        )
        if name in WAITING or by_mask:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", ["train.activation_checkpointing=selective", "optimizer.name=muon"])
def test_no_micro_batch_waits_for_a_gpu(load, change):
    config = load(change, "optimizer.fused=true")  # as on a GPU
    model = parallelize(build_model(config.architecture()), config, World())
    batch = torch.arange(4 * 25).reshape(4, 25)
    with Waits() as waits:
        accumulate_gradients(model, batch, config, World())
    assert waits.names == []
    with Waits() as waits:
        train_step(model, build_optimizers(model, config.optimizer), batch, config, World())
    assert waits.names == ["_local_scalar_dense"]  # the norm of the gradients
    with Waits() as waits:
        assert batch[batch > 3].sum().item()
    assert waits.names == ["index", "_local_scalar_dense"]
