"""Checkpoints: saved while training goes on, and damaged, failing or cut short."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from toy_checkpoints import alter, assert_equal, build, checkpointer, save, state, train, trained, truncate, whole

from flash_stu import UserError
from flash_stu.files import read_manifest
from flash_stu.training import checkpoint, checkpoint_folder
from flash_stu.training.checkpoint_folder import list_steps
from flash_stu.training.model_source import load_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints of the steps 1, 2 and 3 of a little training."""
    model, optimizers = build(1)
    with checkpointer(tmp_path / "checkpoints", model, optimizers) as saver:
        for number in (1, 2, 3):
            train(model, optimizers)
            saver.save(state(number, f"after {number}"))
    return tmp_path / "checkpoints"


def resume(folder: Path):
    """Load into a fresh model; returns its weights after one more step, the run state and the reports."""
    reports = []
    model, optimizers = build(2)
    with checkpointer(folder, model, optimizers, report=reports.append) as saver:
        resumed = saver.resume()
    train(model, optimizers)
    return whole(model), resumed, reports


def file_of(path: Path) -> Path:
    (file,) = path.glob("*.safetensors")
    return file


def test_the_newest_is_resumed_exactly(folder):
    weights, resumed, reports = resume(folder)
    assert resumed == state(3, "after 3")
    assert reports == []
    assert_equal(weights, trained(4))


def test_nothing_to_resume(tmp_path):
    weights, resumed, reports = resume(tmp_path / "checkpoints")
    assert resumed is None and reports == []
    model, optimizers = build(2)
    train(model, optimizers)
    assert_equal(weights, whole(model))


def test_saving_changes_nothing_before_the_first_step(tmp_path):
    model, optimizers = build(1)
    with checkpointer(tmp_path, model, optimizers) as saver:
        saver.save(state(0))
    assert not any(optimizer.state for optimizer in optimizers)
    assert not any("optimizer" in name for name in names_in(tmp_path / "step-0"))
    assert_equal(resume(tmp_path)[0], trained(1))


def test_the_hyperparameters_are_not_the_checkpoints(folder):
    model, optimizers = build(2)
    for group in optimizers[0].param_groups:
        group["lr"] = 0.5
    with checkpointer(folder, model, optimizers) as saver:
        saver.resume()
    assert optimizers[0].param_groups[0]["lr"] == 0.5
    assert optimizers[1].param_groups[0]["momentum"] == 0.9


def test_muon_is_resumed_exactly(tmp_path):
    def start(seed):
        model, _ = build(seed)
        vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        return model, [torch.optim.Muon([model.first.weight], lr=0.1), torch.optim.AdamW(vectors, lr=0.1)]

    model, optimizers = start(1)
    train(model, optimizers, 2)
    with checkpointer(tmp_path, model, optimizers) as saver:
        saver.save(state(2))
    train(model, optimizers, 2)
    other, optimizers = start(2)
    with checkpointer(tmp_path, other, optimizers) as saver:
        saver.resume()
    train(other, optimizers, 2)
    assert_equal(whole(other), whole(model))


def test_another_models_checkpoint_is_refused(folder):
    model = nn.Linear(5, 5)
    with (
        checkpointer(folder, model, [torch.optim.SGD(model.parameters())]) as saver,
        pytest.raises(UserError, match="step-3 is another model's"),
    ):
        saver.resume()


# What is on disk -------------------------------------------------------------------------------------------------


def names_in(path: Path) -> list[str]:
    with safe_open(file_of(path), "pt") as file:
        return sorted(file.keys())


def test_tied_weights_are_written_once_and_nothing_is_pickled(folder):
    path = folder / "step-3"
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".json", ".safetensors"]
    names = names_in(path)
    assert [name for name in names if name.startswith("model.")] == [
        "model.first.bias",
        "model.first.weight",
        "model.second.bias",
        "model.table",
    ]
    assert {"optimizer.first.weight.max_exp_avg_sq", "optimizer.second.bias.momentum_buffer"} < set(names)
    assert json.loads((path / "state.json").read_text())["step"] == 3
    content = file_of(path).read_bytes()
    assert content[8:9] == b"{" and not content.startswith((b"PK", b"\x80"))


def test_whole_weights_for_a_model_that_is_not_trained(folder):
    model, _ = build(2)
    load_weights(folder / "step-3", model)
    assert_equal(whole(model), trained(3))
    with pytest.raises(UserError, match="step-3 is another model's: they differ in model"):
        load_weights(folder / "step-3", nn.Linear(5, 5))
    alter(file_of(folder / "step-3"))
    with pytest.raises(UserError, match="damaged checkpoint .*step-3: .*checksum"):
        load_weights(folder / "step-3", model)
    with pytest.raises(UserError, match="damaged checkpoint .*step-4"):
        load_weights(folder / "step-4", model)


def test_files_of_a_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 150)
    model, optimizers = build(1)
    train(model, optimizers, 2)
    with checkpointer(tmp_path, model, optimizers) as saver:
        saver.save(state(2))
    files = list((tmp_path / "step-2").glob("*.safetensors"))
    assert len(files) > 3
    manifest = read_manifest(tmp_path / "step-2")
    assert manifest["files"].keys() == {file.name for file in files} | {"state.json"}
    assert_equal(resume(tmp_path)[0], trained(3))


def test_the_newest_stay_and_every_so_many(tmp_path):
    model, optimizers = build(1)
    with checkpointer(tmp_path, model, optimizers, keep=2, keep_every=4) as saver:
        for step in range(1, 12):
            saver.save(state(step))
    assert list_steps(tmp_path) == [4, 8, 10, 11]
    assert len(list(tmp_path.iterdir())) == 4
    with checkpointer(tmp_path, model, optimizers, keep=1) as saver:
        saver.save(state(11, "again"))
    assert list_steps(tmp_path) == [11]
    assert resume(tmp_path)[1] == state(11, "again")


# In the background -----------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    changed, begin = threading.Event(), checkpoint_folder.begin

    def wait_and_begin(*arguments):
        assert changed.wait(20)
        return begin(*arguments)

    monkeypatch.setattr(checkpoint_folder, "begin", wait_and_begin)
    model, optimizers = build(1)
    train(model, optimizers, 2)
    with checkpointer(tmp_path, model, optimizers) as saver:
        saver.save(state(2, "then"))
        train(model, optimizers, 3)
        with torch.no_grad():
            model.table.zero_()
        assert list_steps(tmp_path) == []
        changed.set()
        saver.wait()
        assert list_steps(tmp_path) == [2]
    weights, resumed, _ = resume(tmp_path)
    assert resumed == state(2, "then")
    assert_equal(weights, trained(3))


def test_a_failing_write_is_an_error_of_the_next_call(folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    model, optimizers = build(1)
    with checkpointer(folder, model, optimizers) as saver, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        saver.save(state(4))
        with pytest.raises(UserError, match="checkpoints/step-4 cannot be written: disk full$"):
            saver.save(state(5))
        saver.save(state(6))
        with pytest.raises(UserError, match="step-6 cannot be written"):
            saver.wait()
        saver.wait()
    assert list_steps(folder) == [1, 2, 3]
    save(folder, 7)  # clears away what is left of them
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-3", "step-7"]


def test_leaving_waits_and_raises_but_hides_no_other_error(folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    reports = []
    monkeypatch.setattr(checkpoint_folder, "complete", fail)
    with pytest.raises(UserError, match="step-4 .*disk full"):
        save(folder, 4)
    with pytest.raises(KeyError), checkpointer(folder, *build(1), report=reports.append) as saver:
        saver.save(state(4))
        raise KeyError
    assert len(reports) == 1 and "disk full" in reports[0]


# Damage ----------------------------------------------------------------------------------------------------------


def test_all_damaged_is_an_error_and_nothing_is_touched(folder):
    for number in (1, 2, 3):
        truncate(file_of(folder / f"step-{number}"))
    with pytest.raises(UserError, match="none of its 3 checkpoints is intact"):
        resume(folder)
    assert list_steps(folder) == [1, 2, 3]


def test_what_a_killed_process_left_is_ignored_and_cleared_away(folder):
    shutil.copytree(folder / "step-3", folder / ".step-4.flash_stu-0123abcd.tmp")
    shutil.copytree(folder / "step-3", folder / ".step-2.flash_stu-0123abcd.old")
    assert resume(folder)[1].step == 3
    assert sorted(path.name for path in folder.iterdir()) == ["step-1", "step-2", "step-3"]
    shutil.copytree(folder / "step-3", folder / ".step-5.flash_stu-0123abcd.tmp")
    save(folder, 5, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-3", "step-5"]


class PowerCut(BaseException):
    """Nothing that comes later is done."""


def test_whenever_the_power_is_cut_the_newest_complete_checkpoint_is_intact(folder, tmp_path, monkeypatch):
    """Cut before the first, second, … of everything that a write does to the disk, until one gets through."""
    done, limit = [], 0

    def counted(function):
        def run(*arguments, **options):
            if len(done) >= limit:
                raise PowerCut
            done.append(function.__name__)
            return function(*arguments, **options)

        return run

    def attempt(place) -> bool:
        model, optimizers = build(1)
        train(model, optimizers, 5)
        saver = checkpointer(place, model, optimizers, keep=2)
        try:
            saver.save(state(5, "after 5"))
            saver.wait()
        except (PowerCut, UserError):  # torch.distributed.checkpoint catches whatever happens within it
            return False
        return True

    outcomes = []
    for limit in range(100):
        place = tmp_path / str(limit)
        shutil.copytree(folder, place)
        done.clear()
        with monkeypatch.context() as patch:
            for module, name in [(os, "fsync"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]:
                patch.setattr(module, name, counted(getattr(module, name)))
            finished = attempt(place)
        weights, resumed, reports = resume(place)
        assert reports == [] and resumed.step in (3, 5)
        assert_equal(weights, trained(resumed.step + 1))
        outcomes.append(resumed.step)
        if finished:
            break
    assert outcomes == sorted(outcomes) and outcomes.count(3) > 3 and outcomes.count(5) > 3
    assert done.count("rename") == 3  # of the new one, and of two old ones
