"""Faults of the disk and of what lies on it, over the commands that write: one line, exit 2, and nothing lost.

Every command runs in this process. The faults are those that system calls report: permissions would not hold off tests
that run as root.
"""

import os
import resource
import sys

import pytest
from processes import Child
from writing_commands import COMMANDS, FAULTS, WRITERS_OF_DIRECTORIES, failing, files_of, refused

from flash_stu.errors import UserError, run_cli
from flash_stu.files import MANIFEST
from flash_stu.filters.spectral import spectral_filters
from flash_stu.locks import holding
from scripts import plot_run

# A disk that takes nothing more


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_written_is_one_line_and_loses_nothing(name, fault, command, tmp_path, monkeypatch):
    calls, number, words = FAULTS[fault]
    output = tmp_path / "deep/output"
    spectral_filters(33, 4)  # not what is tried here
    with monkeypatch.context() as patch:
        if calls == "limit":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, limits[1]))
        else:
            failing(patch, output.parent, calls, number)
        try:
            result = command(name, output)
        finally:
            if calls == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused(result, output, "cannot be written", words)
    assert files_of(tmp_path) == {} and not output.parent.exists()


@pytest.mark.parametrize("fault", ["disk full", "broken disk"])
@pytest.mark.parametrize("name", WRITERS_OF_DIRECTORIES + ["plot"])
def test_an_earlier_output_stays_if_the_new_one_cannot_be_written(name, fault, command, tmp_path, monkeypatch):
    assert command(name)[0] == 0
    if name in ("evaluate", "fetch"):  # as if one file were missing yet
        for path in (tmp_path / "output").rglob("*.json*"):
            if path.name != MANIFEST:
                path.unlink()
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        calls, number, words = FAULTS[fault]
        failing(patch, tmp_path, calls, number)
        assert refused(command(name), "cannot be written", words)
    assert files_of(tmp_path) == before
    assert command(name)[0] == 0


# Outputs that are not ours


@pytest.mark.parametrize("name", WRITERS_OF_DIRECTORIES)
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "mine"},
        {"config.json": "{}", "model.safetensors": "mine"},
        {"distillation.json": "{}"},
        {"results.json": '{"models": {}}', "table.md": "mine"},
        {MANIFEST: "{}", "thesis.tex": "mine"},
        {"someone/colours/default/validation.jsonl": "mine"},
    ],
    ids=str,
)
def test_a_directory_of_the_users_stays(name, files, command, tmp_path):
    for file, text in files.items():
        (tmp_path / "output" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "output" / file).write_text(text)
    before = files_of(tmp_path)
    assert refused(command(name), f"--output {tmp_path / 'output'} exists and was not written by this program")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("distill", "model.safetensors"),
        ("distill", "notes.txt"),
        ("convert", "config.json"),
        ("convert", "sub/notes.txt"),
        ("evaluate", "results.json"),
        ("evaluate", "table.md"),
        ("evaluate", "items/model/text.txt.json"),
        ("fetch", "someone/colours/default/validation.jsonl"),
    ],
)
def test_a_file_that_somebody_changed_or_added_stays(name, file, command, tmp_path):
    assert command(name)[0] == 0
    path = tmp_path / "output" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = files_of(tmp_path)
    assert refused(command(name), f"holds {file}, which this program did not write or somebody changed")
    assert files_of(tmp_path) == before
    path.unlink()
    if name in ("evaluate", "fetch"):  # what is missing is made again
        assert command(name)[0] == 0 and path.read_text() != "mine"


def test_a_users_file_in_a_picture_s_place_is_refused_before_any_work(command, tmp_path, monkeypatch):
    assert command("evaluate")[0] == 0
    (tmp_path / "output/table.csv").write_text("mine")
    monkeypatch.setattr("flash_stu.evaluation.language_model.load_source", lambda *_: pytest.fail("a model was loaded"))
    assert refused(command("evaluate"), "holds table.csv, which this program did not write")
    (tmp_path / "output/table.csv").unlink()
    assert command("evaluate")[0] == 0  # found earlier


@pytest.mark.parametrize("name", ["evaluate", "fetch"])
def test_two_at_once_on_one_output(name, command, tmp_path):
    with holding(tmp_path / "output", "--output"):
        assert refused(command(name), f"output is in use by process {os.getpid()} on host ")
    assert files_of(tmp_path) == {}
    assert command(name)[0] == 0


@pytest.mark.parametrize("first", WRITERS_OF_DIRECTORIES)
def test_a_directory_of_another_command_stays(first, command, tmp_path):
    assert command(first)[0] == 0
    before = files_of(tmp_path)
    for other in WRITERS_OF_DIRECTORIES:
        if other != first:
            assert refused(command(other), "output holds a ", "; choose another, or remove it")
    assert files_of(tmp_path) == before


# Pictures


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("loss", "--output {}/loss must end in an image format; allowed: .png, .pdf, .svg"),
        ("loss.", "must end in an image format"),
        (".png", "must end in an image format"),
        ("loss.xyz", "must end in an image format"),
        ("loss.pgf", "must end in an image format"),
        ("folder.png", "folder.png exists and is not a regular file"),
        ("file/loss.png", "file/loss.png cannot be written: "),
        ("n" * 300 + ".png", "it must not be longer than 255 bytes"),
        ("nul\0.png", "it must not have control characters"),
    ],
)
def test_paths_that_cannot_be_pictures(output, words, inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(inputs / "run"), "--output", f"{tmp_path}/{output}"])
    assert refused((run_cli(plot_run.main), capsys.readouterr().err), words.format(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_records_without_numbers_are_not_drawn(inputs, monkeypatch):
    bad = [{}, {"loss": 1}, {"step": "1", "loss": 2}, {"step": 1, "loss": [2]}, {"step": 1, "loss": None}]
    bad += [{"step": 1, "loss": float("nan")}, {"step": float("inf"), "loss": 1}, {"step": 10**400, "loss": 1}]
    monkeypatch.setattr(plot_run, "read_metrics", lambda path: bad)
    with pytest.raises(UserError, match="is not a run directory with metrics"):
        plot_run.read_losses(inputs / "run")
    monkeypatch.setattr(plot_run, "read_metrics", lambda path: [*bad, {"step": 2, "loss": 3.5}])
    assert plot_run.read_losses(inputs / "run") == ([(48, 3.5)], [])


# Standard streams


def with_closed_streams(path: str) -> tuple[int, bytes]:
    """Run an entry point as a shell does after `>&- 2>&-`."""
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    sys.stdin = sys.stdout = sys.stderr = None

    def main():
        print("said to nobody")
        with open(path, "w") as file:
            file.write("kept")
            print("said to nobody", flush=True)
        raise UserError("wrong")

    return run_cli(main), open(path, "rb").read()


def test_closed_streams_take_nothing_down_and_write_into_no_file(tmp_path):
    assert Child(with_closed_streams, str(tmp_path / "file")).result() == (2, b"kept")
