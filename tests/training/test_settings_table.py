"""The table of settings: complete, and the page in docs/ is what the code says."""

import runpy
import sys
from pathlib import Path

import pytest

from flash_stu import FlashSTUConfig
from flash_stu.settings import flatten
from flash_stu.training import settings_table

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line in this process; returns exit status, stdout, stderr."""

    def run(script: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def table() -> dict[str, settings_table.Setting]:
    return {setting.name: setting for section in settings_table.list_settings() for setting in section.settings}


def test_every_setting_of_a_resolved_config_is_described(table, load):
    names = flatten(load().model_dump()).keys() | {f"model.{key}" for key in FlashSTUConfig().to_user()}
    assert table.keys() == names
    assert all(len(setting.description) > 5 and setting.kind for setting in table.values())


@pytest.mark.parametrize(
    ("name", "kind", "default", "allowed"),
    [
        ("output_dir", "string", "", ""),
        ("train.steps", "integer or null", "null", "from 1 up to 1,000,000,000"),
        ("train.dtype", "string", "bfloat16", "float32, bfloat16"),
        ("train.max_grad_norm", "number or null", "1.0", "above 0 up to 1e+09"),
        ("optimizer.betas", "list of numbers", "[0.9, 0.95]", "2 values, each from 0 below 1"),
        ("optimizer.fused", "boolean or string", "auto", "true, false, auto"),
        ("data.validation_fraction", "number", "0.01", "above 0 below 1"),
        ("model.hidden_size", "integer", "1024", "from 1 up to 131,072"),
        ("model.dropout", "number", "0.0", "from 0 up to 0.999"),
        ("model.stu_type", "string", "tensordot", "tensordot, full"),
        ("model.layer_types", "list of strings or null", "null", "each linear_attention, sliding_attention"),
        ("model.lds_state_dim", "integer or null", "null", "from 2 up to 16,384"),
    ],
)
def test_types_defaults_and_allowed_values(table, name, kind, default, allowed):
    assert table[name][:4] == (name, kind, default, allowed)


def test_the_page_is_what_the_code_says(command):
    assert (REPOSITORY / "docs" / "config.md").read_text() == settings_table.as_markdown()
    assert command("scripts/docs.py", "--check") == (0, "", "")


def test_a_page_out_of_date_is_an_error(command, monkeypatch):
    monkeypatch.setattr(settings_table, "as_markdown", lambda: "other")
    code, _, error = command("scripts/docs.py", "--check")
    assert code == 2 and "config.md is not what the code says; run python scripts/docs.py" in error


def test_train_py_lists_them_without_a_config(command, table):
    code, out, error = command("train.py", "--list-settings")
    assert (code, error) == (0, "")
    assert all(f"  {name}  {setting.kind}; default: " in out for name, setting in table.items())
    code, _, error = command("train.py")
    assert code == 2 and "the following arguments are required: --config" in error
