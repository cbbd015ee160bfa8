"""scripts/export.py on damaged runs, full disks and directories of a user's."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from broken_runs import DAMAGES, assert_same, content, one_error

from flash_stu import files
from flash_stu.training.checkpoint_folder import list_steps

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def export(command, run, tmp_path):
    """Export the run to a directory."""
    return lambda *arguments: command("scripts/export.py", "--run", run, "--output", tmp_path / "model", *arguments)


def test_export_replaces_what_it_wrote(export, run, whole, tmp_path):
    for step in (2, 6):
        assert export("--step", step)[0] == 0
    assert content(tmp_path / "model") == content(whole / "final")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "names", [["config.json"], ["config.json", "model.safetensors", "thesis.tex"], [files.MANIFEST]]
)
def test_export_deletes_no_directory_of_a_user(export, tmp_path, names):
    for name in names:
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    one_error(export(), "--output", str(tmp_path / "model"))
    assert sorted(os.listdir(tmp_path / "model")) == sorted(names)


def test_export_keeps_an_export_that_somebody_changed(export, tmp_path):
    assert export()[0] == 0
    (tmp_path / "model" / "config.json").write_text("{}")
    one_error(export(), "--output", "config.json")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["another step", "state missing", "manifest missing", "tensors one bit off"])
def test_export_of_a_damaged_checkpoint_is_one_line(export, run, tmp_path, name):
    DAMAGES[name][0](run / "checkpoints" / "step-6")
    one_error(export(), "damaged checkpoint", str(run / "checkpoints" / "step-6"))
    assert not (tmp_path / "model").exists()
    assert list_steps(run / "checkpoints") == [2, 4, 6]


def test_export_of_another_models_checkpoint_is_one_line(export, run, tmp_path):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("intermediate_size: 24", "intermediate_size: 25"))
    one_error(export(), "another model's")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("call", ["fsync", "mkdir"])
def test_export_to_a_full_disk_keeps_the_export_before(export, tmp_path, failing, call):
    assert export("--step", 2)[0] == 0
    before = content(tmp_path / "model")
    failing(call, ".model.flash", errno.ENOSPC)
    one_error(export(), str(tmp_path / "model"), "No space left")
    assert content(tmp_path / "model") == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_finished_run_whose_model_was_damaged_is_not_called_finished(name, start, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "final" / name).write_bytes(b"")
    before = content(run)
    one_error(start(), str(run / "final"), f"holds {name}, which this program did not write or somebody changed")
    assert content(run) == before
    (run / "final" / name).unlink()
    assert start()[0] == 0
    assert_same(run, whole)
