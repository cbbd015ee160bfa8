"""Checkpoints of several processes: any world takes over from any other, and all know what fails on one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from toy_checkpoints import alter, assert_equal, build, checkpointer, state, train, trained, whole

from flash_stu import UserError, reading
from flash_stu.distributed import World
from flash_stu.training import checkpoint
from flash_stu.training.model_source import load_weights


def join() -> World:
    dist.init_process_group("gloo")
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def go_on(folder: Path, strategy: str, steps: int, seed: int):
    """Resume if there is something to, train some steps, save, train one more; the weights and what was resumed."""
    world = join()
    model, optimizers = build(seed, strategy)
    with torch.no_grad():
        model(torch.ones(1, 5))  # leaves the weights gathered, with FSDP
    with checkpointer(folder, model, optimizers, world=world) as saver:
        resumed = saver.resume()
        train(model, optimizers, steps)
        saver.save(state((resumed.step if resumed else 0) + steps, strategy))
        train(model, optimizers)  # communicates while the thread does
    weights = whole(model)
    dist.destroy_process_group()
    return weights, resumed


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("none", 1), ("fsdp", 4)),
        (("fsdp", 4), ("ddp", 2)),
        (("ddp", 2), ("hsdp", 4)),
        (("hsdp", 4), ("fsdp", 2)),
        (("fsdp", 2), ("none", 1)),
    ],
)
def test_any_world_takes_over_from_any_other(tmp_path, first, second):
    expected = None
    for steps, ((strategy, size), seed) in enumerate(zip((first, second), (1, 2), strict=True)):
        results = run_processes(size, go_on, tmp_path, strategy, 2, seed)
        for weights, resumed in results:
            assert resumed == expected
            assert_equal(weights, trained(2 * steps + 3))
        expected = state(2 * steps + 2, strategy)
        path = tmp_path / f"step-{2 * steps + 2}"
        assert len(list(path.glob("*.safetensors"))) == size
        model, _ = build(3)
        load_weights(path, model)
        assert_equal(whole(model), trained(2 * steps + 2))


def fail_on_one(folder: Path):
    """A process that cannot write, then a file that one finds damaged."""
    world = join()
    model, optimizers = build(1, "fsdp")
    train(model, optimizers)
    heard, errors = [], []
    with checkpointer(folder, model, optimizers, world=world, report=heard.append) as saver:
        saver.save(state(1))
        saver.wait()
        for step, place in [(2, (checkpoint._Writer, "write_data")), (3, (reading, "describe"))]:
            original = getattr(*place)
            if world.rank == 1:
                setattr(*place, unwritable)
            saver.save(state(step))
            try:
                saver.wait()
            except UserError as error:
                errors.append(str(error))
            setattr(*place, original)
        saver.save(state(4))
        saver.wait()
        if world.is_main:
            alter(max((folder / "step-4").glob("*.safetensors")))
        dist.barrier()
        resumed = saver.resume()
    dist.destroy_process_group()
    return errors, heard, resumed.step


def unwritable(*_):
    raise OSError("disk full")


def test_what_fails_on_one_process_is_known_to_all(tmp_path):
    for rank, (errors, heard, step) in enumerate(run_processes(2, fail_on_one, tmp_path)):
        assert len(errors) == 2
        assert all("step" in error and "disk full" in error and "\n" not in error for error in errors)
        assert len(heard) == (rank == 0)
        assert all("step-4" in line and "checksum" in line for line in heard)
        assert step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-4.damaged"]
