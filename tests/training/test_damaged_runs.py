"""Damaged checkpoints, configs and metrics, and a user's files among them: one line, and nothing is lost."""

import errno
import os
import runpy
import shutil
from pathlib import Path

import pytest
from broken_runs import DAMAGES, assert_same, one_error
from toy_checkpoints import alter, truncate

from flash_stu import files
from flash_stu.training.checkpoint_folder import list_steps

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(start, run, whole, name):
    damage, words = DAMAGES[name]
    damage(run / "checkpoints" / "step-6")
    code, out, errors = start()
    assert (code, errors) == (0, [])
    (line,) = [line for line in out.splitlines() if "damaged checkpoint" in line]
    assert f"damaged checkpoint {run / 'checkpoints' / 'step-6'}: " in line and words in line
    assert "after step 4 of 6" in out
    assert_same(run, whole)
    assert sorted(os.listdir(run / "checkpoints")) == ["step-2", "step-4", "step-6", "step-6.damaged"]


def test_a_checkpoint_that_cannot_be_read_is_set_aside(start, run, whole, monkeypatch):
    read = Path.open

    def refused(path, *arguments, **options):
        if path.match("step-6/*.safetensors") and not (run / "checkpoints" / "step-6.damaged").exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    code, out, _ = start()
    assert code == 0 and "damaged checkpoint" in out and "cannot be read: Permission denied" in out
    assert_same(run, whole)


def test_a_checkpoint_whose_directory_cannot_be_read_is_set_aside(start, run, whole, failing):
    step = run / "checkpoints" / "step-6"
    damage, _ = DAMAGES["manifest missing"]
    damage(step)
    patch = failing("listdir", str(step), errno.EACCES)
    assert list_steps(run / "checkpoints") == [2, 4, 6]
    patch.undo()
    assert start()[0] == 0
    assert_same(run, whole)


def test_one_damaged_before_stays(start, run, whole):
    aside = run / "checkpoints" / "step-6.damaged"
    aside.mkdir()
    (aside / "evidence").write_text("of the first time")
    truncate(run / "checkpoints" / "step-6" / "state.json")
    assert start()[0] == 0
    assert (aside / "evidence").read_text() == "of the first time"
    assert (run / "checkpoints" / "step-6.damaged-2" / "state.json").is_file()
    assert_same(run, whole)


def test_without_an_intact_one_nothing_is_touched(start, run):
    for step in (2, 4, 6):
        alter(run / "checkpoints" / f"step-{step}" / "state.json")
    before = (run / "metrics.jsonl").read_bytes()
    one_error(start(), "none of its 3 checkpoints is intact")
    assert list_steps(run / "checkpoints") == [2, 4, 6] and (run / "metrics.jsonl").read_bytes() == before


def test_checkpoints_that_are_no_directory_are_an_error_before_anything_is_lost(start, run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("moved to the other disk")
    before = (run / "metrics.jsonl").read_bytes()
    one_error(start(), "checkpoints", "Not a directory")
    assert (run / "metrics.jsonl").read_bytes() == before


# What users put beside -------------------------------------------------------------------------------------------


def test_files_of_a_user_in_and_beside_checkpoints_stay(start, run, whole):
    checkpoints = run / "checkpoints"
    shutil.rmtree(checkpoints / "step-6")
    shutil.copy(next((checkpoints / "step-2").glob("*.safetensors")), checkpoints / "step-4" / "mine.safetensors")
    notes = [checkpoints / name / "notes.txt" for name in ("step-2", "step-3", "step-7", "step-08", "plots")]
    for note in notes:
        note.parent.mkdir(exist_ok=True)
        note.write_text("mine")
    in_the_way = checkpoints / "step-6" / "notes.txt"
    in_the_way.parent.mkdir()
    in_the_way.write_text("mine")
    code, out, errors = start("train.keep_checkpoints=1")
    assert (code, errors) == (0, [])
    assert_same(run, whole)
    assert "step-6 is no intact checkpoint" in out
    assert (checkpoints / "step-6.damaged" / "notes.txt").read_text() == "mine"
    assert all(note.read_text() == "mine" for note in notes)
    assert (checkpoints / "step-4" / "mine.safetensors").is_file()
    assert list_steps(checkpoints) == [2, 4, 6]  # old, but not ours alone


def test_a_users_file_in_final_is_an_error_before_training(start, run, whole):
    shutil.copytree(whole / "final", run / "final")
    (run / "final" / "README.md").write_text("mine")
    (run / "metrics.jsonl").write_bytes(b"")  # the run is not finished
    one_error(start(), str(run / "final"), "README.md")
    assert (run / "final" / "README.md").read_text() == "mine"
    assert (run / "metrics.jsonl").read_bytes() == b""


def test_a_directory_final_of_a_user_is_an_error_before_training(start, run):
    (run / "final").mkdir()
    (run / "final" / "config.json").write_text("{}")
    one_error(start(), str(run / "final"), "not written by this program")
    assert os.listdir(run / "final") == ["config.json"]


@pytest.mark.parametrize("missing", ["model.safetensors", files.MANIFEST])
def test_a_final_that_is_not_complete(start, run, whole, missing):
    shutil.copytree(whole / "final", run / "final")
    (run / "final" / missing).unlink()
    outcome = start()
    if missing == files.MANIFEST:
        one_error(outcome, str(run / "final"))
    else:
        assert outcome[0] == 0
        assert_same(run, whole)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "config.yaml"),
        (b"", "config.yaml"),
        (b"- 1\n", "config.yaml"),
        (b"output_dir: [\n", "config.yaml"),
        (b"{}", "config.yaml"),
    ],
)
def test_a_damaged_config_of_the_run_is_an_error(start, run, content, words):
    before = sorted(path.name for path in run.rglob("*"))
    (run / "config.yaml").write_bytes(content)
    one_error(start(), str(run), words)
    assert (run / "config.yaml").read_bytes() == content
    assert sorted(path.name for path in run.rglob("*")) == before


def test_an_edited_config_of_the_run_is_an_error(start, run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("seed: 1", "seed: 2"))
    one_error(start(), "other settings (seed)")


# metrics.jsonl ---------------------------------------------------------------------------------------------------

LINES = {
    "not UTF-8": b"\xff\xfe\x00",
    "a number": b"7",
    "an empty object": b"{}",
    "cut short": b'{"step": 3, "lo',
    "a list": b"[]",
    "nested": b"[" * 20_000,
    "step a string": b'{"step": "3"}',
    "step a truth value": b'{"step": true}',
    "step a list": b'{"step": [3]}',
    "step negative": b'{"step": -3}',
    "step without bounds": b'{"step": 1' + 400 * b"0" + b"}",
    "loss a string": b'{"step": 3, "loss": "low"}',
    "loss an object": b'{"step": 3, "loss": {}}',
    "loss not a number": b'{"step": 3, "loss": NaN}',
    "loss without bounds": b'{"step": 3, "loss": 1' + 400 * b"0" + b"}",
    "zeros": bytes(64),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_cannot_be_read_costs_no_other(start, run, whole, name):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    content = b"".join([*lines[:4], LINES[name] + b"\n", *lines[4:]])
    (run / "metrics.jsonl").write_bytes(content)
    code, out, errors = start()
    assert (code, errors) == (0, [])
    assert_same(run, whole)
    assert [line for line in out.splitlines() if "1 lines cannot be read" in line and "metrics.jsonl.damaged" in line]
    assert (run / "metrics.jsonl.damaged").read_bytes() == content
    runpy.run_path(str(REPOSITORY / "scripts" / "plot_run.py"))["read_losses"](run)


def test_every_damage_of_the_metrics_is_kept(start, run, whole):
    for name in ("metrics.jsonl.damaged", "metrics.jsonl.damaged-2"):
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(b"7\n{}\n")
        shutil.rmtree(run / "final", ignore_errors=True)
        code, out, _ = start()
        assert code == 0 and f"2 lines cannot be read; the file as it was is {name}" in out
    assert_same(run, whole)


def test_a_last_line_cut_short_is_nothing_unusual(start, run, whole):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "val')
    code, out, _ = start()
    assert code == 0 and "cannot be read" not in out
    assert_same(run, whole)
    assert not (run / "metrics.jsonl.damaged").exists()


def test_metrics_that_are_a_directory_are_an_error(start, run):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    one_error(start(), str(run / "metrics.jsonl"))
    assert list_steps(run / "checkpoints") == [2, 4, 6]


def test_plots_of_damaged_metrics(run):
    expected = runpy.run_path(str(REPOSITORY / "scripts" / "plot_run.py"))["read_losses"](run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines[:5], *LINES.values(), *lines[5:]]))
    found = runpy.run_path(str(REPOSITORY / "scripts" / "plot_run.py"))["read_losses"](run)
    assert found == expected
