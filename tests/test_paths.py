"""`~` means the home directory in every path that a user can give, on a command line and in settings."""

import re
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from flash_stu import arguments
from flash_stu.errors import UserError
from flash_stu.evaluation.definitions import resolve_tasks
from flash_stu.settings import expand
from flash_stu.training import load_config

ROOT = Path(__file__).parents[1]
# words of help texts' metavars and of names by which a path is given
_PATH_OPTION = re.compile(
    r"""add(?:_argument)?\(\s*"(--(?:[a-z]+-)*(?:model|checkpoint|output|text|config|dir|path|file|runs|results|readme|save"""
    r"""|tokenizer)|--run|runs)",([^)]*)"""
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_types_of_arguments(home):
    (home / "file").touch()
    assert arguments.any_path("~/x") == arguments.output_directory("~/x") == arguments.output_file("~/x") == f"{home}/x"
    assert arguments.input_file("~/file") == f"{home}/file" and arguments.input_directory("~") == str(home)
    assert arguments.any_path("a~b/~c") == "a~b/~c" and arguments.any_path("./~x") == "./~x"
    with pytest.raises(ArgumentTypeError, match="no home directory ~nobody-here; write ./~nobody-here/x"):
        arguments.any_path("~nobody-here/x")
    with pytest.raises(UserError, match="no home directory"):
        expand("~nobody-here")


def test_every_path_of_a_command_line_has_such_a_type():
    scripts = {*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py")} - {ROOT / "scripts/gpu.py"}  # says what is missing
    options = [(path.name, *found) for path in scripts for found in _PATH_OPTION.findall(path.read_text())]
    assert len(options) > 25
    types = "any_path|input_file|input_directory|output_directory|output_file"
    assert [found[:2] for found in options if not re.search(rf"type=({types})\b|choices=", found[2])] == []


def test_settings(home):
    overrides = ["output_dir=~/run", "data.cache_dir=~/cache", "data.dataset=~/data", "train.initial_weights=~/model"]
    overrides += ["evaluation.data_dir=~/mirror", "evaluation.include_path=~/tasks", "data.tokenizer=~/tokenizer"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    assert (config.output_dir, config.data.cache_dir, config.data.dataset, config.train.initial_weights) == (
        f"{home}/run", f"{home}/cache", f"{home}/data", f"{home}/model",
    )  # fmt: skip
    assert (config.evaluation.data_dir, config.evaluation.include_path) == (f"{home}/mirror", f"{home}/tasks")
    assert config.data.tokenizer == f"{home}/tokenizer"
    with pytest.raises(UserError, match="~nobody-here/run: there is no home directory"):
        load_config(ROOT / "configs" / "quickstart.yaml", ["output_dir=~nobody-here/run"])


def test_a_config_with_a_byte_order_mark(home):
    text = (ROOT / "configs" / "quickstart.yaml").read_text()
    for mark in ("", "\ufeff"):
        (home / "config.yaml").write_text(mark + text.replace("\n", "\r\n"), newline="")
        assert load_config(home / "config.yaml") == load_config(ROOT / "configs" / "quickstart.yaml")
    (home / "config.yaml").write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match="the text is UTF-16"):
        load_config(home / "config.yaml")


def test_a_suite(home):
    (home / "mine.yaml").write_text("\ufefftasks: [{name: piqa}]")
    specs, _ = resolve_tasks("~/mine.yaml")
    assert [spec.name for spec in specs] == ["piqa"]
