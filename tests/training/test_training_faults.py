"""Faults of disks, files, processes and users' hands: what a run says, what it leaves, and that nothing is lost."""

import errno
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from tiny_run import training_settings
from toy_checkpoints import alter, truncate

from flash_stu import distributed, files, reading
from flash_stu.errors import UserError
from flash_stu.locks import holding
from flash_stu.training import Trainer, join_world, load_config, metrics
from flash_stu.training.checkpoint_folder import list_steps
from flash_stu.training.metrics import MEASURED, read_metrics

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch, capfd):
    """Run a script's command line in this process; returns exit status, stdout, lines of stderr."""

    def run(script: str, *arguments) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        out, err = capfd.readouterr()
        return end.value.code, out, err.splitlines()

    return run


@pytest.fixture
def start(command, config_file):
    """Start the run of the tiny config."""
    return lambda *overrides: command("train.py", "--config", config_file, "train.keep_checkpoints=9", *overrides)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The run that nothing happened to, with the checkpoints of the steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    settings = training_settings(folder / "run", corpus)
    settings["train"] |= {"keep_checkpoints": 9}
    (folder / "config.yaml").write_text(json.dumps(settings))
    config = load_config(folder / "config.yaml")
    with join_world(config) as world:
        assert Trainer(config, world).fit()
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """That run, stopped before it wrote its model."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run"


def results(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in read_metrics(run / "metrics.jsonl")]


def assert_same(run: Path, whole: Path) -> None:
    assert results(run) == results(whole)
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (run, whole))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert hidden(run) == []


def hidden(folder: Path) -> list[str]:
    """Temporary files that writers have left."""
    return [path.name for path in folder.rglob(".*") if path.name not in (files.MANIFEST, ".lock")]


def one_error(outcome: tuple[int, str, list[str]], *words: str) -> None:
    code, _, lines = outcome
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), outcome
    assert all(word in lines[0] for word in words), lines


# Damaged checkpoints ---------------------------------------------------------------------------------------------


def rewrite(name: str, change: Callable[[str], str]):
    return lambda step: (step / name).write_text(change((step / name).read_text()))


def replace(name: str, content: bytes):
    return lambda step: (step / name).write_bytes(content)


def to_tensors(change: Callable[[Path], object]):
    return lambda step: change(next(step.glob("*.safetensors")))


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def resealed(kind: str = "checkpoint", leave_out: str = "", **changes):
    """Change the run state and give the directory a manifest that agrees with it."""

    def damage(step: Path) -> None:
        state = json.loads((step / "state.json").read_text())
        (step / "state.json").write_text(json.dumps(state | changes))
        (step / files.MANIFEST).unlink()
        entries = {path.name: reading.describe(path) for path in step.iterdir() if path.name != leave_out}
        files.seal(step, kind, entries)

    return damage


DAMAGES = {
    "another step": (rewrite("state.json", lambda text: text.replace('"step": 6', '"step": 5')), "state.json"),
    "state cut short": (lambda step: truncate(step / "state.json"), "state.json"),
    "state empty": (replace("state.json", b""), "state.json"),
    "state a list": (replace("state.json", b"[]"), "state.json"),
    "state not UTF-8": (replace("state.json", b"\xff\xfe"), "state.json"),
    "state missing": (lambda step: (step / "state.json").unlink(), "state.json"),
    "state a directory": (lambda step: to_directory(step / "state.json"), "state.json"),
    "state a pipe": (lambda step: to_pipe(step / "state.json"), "state.json"),
    "manifest missing": (lambda step: (step / files.MANIFEST).unlink(), files.MANIFEST),
    "manifest empty": (replace(files.MANIFEST, b""), files.MANIFEST),
    "manifest a list": (replace(files.MANIFEST, b"[1]"), files.MANIFEST),
    "manifest a number": (replace(files.MANIFEST, b"7"), files.MANIFEST),
    "manifest nested": (replace(files.MANIFEST, b"[" * 20_000), files.MANIFEST),
    "manifest not UTF-8": (replace(files.MANIFEST, b"\xff{}"), files.MANIFEST),
    "manifest a pipe": (lambda step: to_pipe(step / files.MANIFEST), files.MANIFEST),
    "manifest without files": (rewrite(files.MANIFEST, lambda text: text.replace('"files"', '"other"')), "damaged"),
    "manifest with another size": (rewrite(files.MANIFEST, lambda text: text.replace('"bytes": ', '"bytes": 1')), ""),
    "manifest of nothing": (resealed(leave_out="state.json"), "does not name state.json"),
    "manifest of a model": (resealed(kind="model"), "is of a model"),
    "tensors cut short": (to_tensors(truncate), "bytes instead of"),
    "tensors one bit off": (to_tensors(alter), "checksum"),
    "tensors missing": (to_tensors(Path.unlink), ".safetensors cannot be read"),
    "tensors a directory": (to_tensors(to_directory), "not a regular file"),
    "step a string": (resealed(step="6"), "step"),
    "step negative": (resealed(step=-6), "step"),
    "step of another": (resealed(step=4), "of step 4"),
    "skipped a float": (resealed(skipped=0.5), "skipped"),
    "seconds not finite": (resealed(seconds=float("inf")), "seconds"),
    "run_id missing": (resealed(run_id=None), "run_id"),
    "unknown key": (resealed(stepp=6), "stepp"),
}  # fmt: skip


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


# Disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch):
    """Let a call of the operating system fail for paths that hold some words."""

    def fail(name: str, words: str, number: int) -> pytest.MonkeyPatch:
        call = getattr(os, name)

        def failed(target, *arguments, **options):
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            if words in path:
                raise OSError(number, os.strerror(number), path)
            return call(target, *arguments, **options)

        monkeypatch.setattr(os, name, failed)
        return monkeypatch

    return fail


DISKS = {
    "config full": ("fsync", ".config.yaml.flash", errno.ENOSPC, "config.yaml", False),
    "config in a read-only file system": ("mkdir", ".config.yaml.flash", errno.EROFS, "config.yaml", False),
    "lock refused": ("open", "run/.lock", errno.EACCES, "output_dir", False),
    "run directory read-only": ("mkdir", "run", errno.EROFS, "output_dir", False),
    "metrics full at the start": ("fsync", ".metrics.jsonl.flash", errno.ENOSPC, "metrics.jsonl", False),
    "metrics over quota at a checkpoint": ("fsync", "run/metrics.jsonl", errno.EDQUOT, "metrics.jsonl", True),
    "checkpoint directory read-only": ("mkdir", ".step-4.flash", errno.EROFS, "step-4", True),
    "tensors full": ("fsync", "step-4.flash", errno.ENOSPC, "step-4", True),
    "tensors broken": ("fsync", ".safetensors", errno.EIO, "step-2", True),
    "state full": ("fsync", "state.json", errno.EDQUOT, "step-2", True),
    "rename refused": ("rename", ".step-4.flash", errno.EACCES, "step-4", True),
    "final full": ("fsync", ".final.flash", errno.ENOSPC, "final", True),
    "final read-only": ("mkdir", ".final.flash", errno.EROFS, "final", True),
}  # fmt: skip


@pytest.mark.parametrize("name", DISKS)
def test_a_failing_disk_is_one_line_and_nothing_is_lost(start, tmp_path, whole, failing, name):
    call, words, number, named, begun = DISKS[name]
    run = tmp_path / "run"
    patch = failing(call, words, number)
    one_error(start(), named, os.strerror(number))
    patch.undo()
    assert run.exists() == begun
    if begun:
        assert hidden(run) == []
        assert all(not files.foreign_files(path) for path in (run / "checkpoints").glob("*"))
        assert not (run / "final").exists()
    assert start()[0] == 0
    assert_same(run, whole)


@pytest.mark.parametrize(
    ("lines", "number"), [(0, errno.ENOSPC), (1, errno.EIO), (2, errno.EDQUOT), (5, errno.ENOSPC), (8, errno.EIO)]
)
def test_metrics_that_can_no_longer_be_written(start, tmp_path, whole, monkeypatch, lines, number):
    class Full:
        """A file that takes so many lines, and half of another."""

        def __init__(self, file):
            self.file, self.left = file, lines

        def write(self, line):
            self.left -= 1
            if self.left < -1:
                raise OSError(number, os.strerror(number))
            return self.file.write(line if self.left >= 0 else line[: len(line) // 2])

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = metrics.Metrics.open

    def open_full(self, *arguments):
        opened(self, *arguments)
        self.file = Full(self.file)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "open", open_full)
        one_error(start(), str(run / "metrics.jsonl"), os.strerror(number))
    assert results(run) == results(whole)[: lines if lines > 1 else 0]  # a directory without a step is removed again
    code, out, _ = start()
    assert code == 0 and "cannot be read" not in out
    assert_same(run, whole)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), "error of wandb"])
def test_wandb_that_does_not_start_leaves_nothing(start, tmp_path, monkeypatch, error):
    wandb = pytest.importorskip("wandb")

    def fail(dir, **_):
        (dir / "wandb").mkdir()
        raise wandb.Error(f"{error}\nand more lines") if isinstance(error, str) else error

    monkeypatch.setattr(wandb, "init", fail)
    one_error(start("wandb.mode=offline", f"output_dir={tmp_path / 'some' / 'where'}"), "a run cannot be started")
    assert not (tmp_path / "some").exists()


# Export ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(command, run, tmp_path):
    """Export the run to a directory."""
    return lambda *arguments: command("scripts/export.py", "--run", run, "--output", tmp_path / "model", *arguments)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


# Processes -------------------------------------------------------------------------------------------------------


def test_a_second_start_names_who_has_the_run_and_destroys_nothing(start, run, whole):
    before = content(run)
    with holding(run, "output_dir"):
        one_error(start(), str(run), "in use", f"process {os.getpid()}", f"host {socket.gethostname()}")
    assert content(run) == before
    assert start()[0] == 0
    assert_same(run, whole)


def test_a_second_start_while_the_first_makes_its_directory(start, tmp_path):
    with holding(tmp_path / "run", "output_dir"):
        one_error(start(), "in use")
    assert sorted(os.listdir(tmp_path / "run")) == []
    assert start()[0] == 0  # the lock is free, and no reason to refuse the directory


def test_what_a_start_that_was_killed_at_once_leaves_is_a_run_directory(start, tmp_path, whole):
    run = tmp_path / "run"
    (run / ".config.yaml.flash_stu-0123abcd.tmp").mkdir(parents=True)
    (run / ".lock").touch()
    assert start()[0] == 0
    assert_same(run, whole)


def start_one_of_several(config_file: Path) -> str:
    config = load_config(config_file)
    try:
        with join_world(config) as world:
            Trainer(config, world).fit()
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__}({error})"
    return "trained"


def test_a_second_start_with_several_processes_ends_on_all_of_them(config_file, run):
    before = content(run)
    with holding(run, "output_dir"):
        main, other = run_processes(2, start_one_of_several, config_file)
    assert "in use by process" in main and other == "SystemExit(2)"
    assert content(run) == before


def full_on_main(config_file: Path) -> str:
    """Train with a disk that takes no third line of metrics."""
    opened = metrics.Metrics.open

    def open_full(self, *arguments):
        opened(self, *arguments)
        write, lines = self._write, []

        def limited(step, **values):
            lines.append(step)
            if len(lines) == 3:
                os.dup2(os.open("/dev/full", os.O_WRONLY), self.file.fileno())
            write(step, **values)

        self._write = limited

    metrics.Metrics.open = open_full
    return start_one_of_several(config_file)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_full_for_one_of_several_processes_ends_all(config_file, tmp_path):
    main, other = run_processes(2, full_on_main, config_file)
    assert "metrics.jsonl cannot be written: No space left on device" in main and other == "SystemExit(2)"
    assert len(results(tmp_path / "run")) == 2


def test_workers_end_when_torchrun_is_killed(config_file, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["--config", config_file, "train.steps=1000000", "train.checkpoint_every=1000000"]
    with (tmp_path / "stderr").open("w") as stderr:
        torchrun = subprocess.Popen(
            [*launcher, REPOSITORY / "train.py", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    workers = []
    try:
        wait_until(lambda: len(results(tmp_path / "run")) > 3)
        workers = [int(word) for word in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()]
        assert len(workers) == 2
        torchrun.kill()
        torchrun.wait()
        wait_until(lambda: not any(is_running(worker) for worker in workers))
    finally:
        torchrun.kill()
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert [line for line in lines if "error" in line.lower() or "Traceback" in line] == [
        f"error: torchrun (process {torchrun.pid}) has died; the processes that it started end too"
    ]
    wait_until(lambda: is_free(tmp_path / "run"))


def is_free(directory: Path) -> bool:
    try:
        with holding(directory, "output_dir"):
            return True
    except UserError:
        return False


def wait_until(happened: Callable[[], bool], timeout: float = 300.0) -> None:
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_torchrun_did_not_start_is_not_watched(monkeypatch):
    started = []
    monkeypatch.setattr(distributed.threading.Thread, "start", lambda thread: started.append(thread))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    distributed.end_with_launcher()
    assert started == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    distributed.end_with_launcher()
    assert len(started) == 1 and started[0].daemon
