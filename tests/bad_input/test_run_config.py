"""Run configs: damaged files, impossible values in every setting, and overrides at odd places."""

import os

import pytest
import yaml

from flash_stu import UserError
from flash_stu.model.config import BOUNDS
from flash_stu.training.run_config import RunConfig, load_config

BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
)
FILES = {
    "empty": (b"", "not a mapping"),
    "a list": (b"- 1", "not a mapping"),
    "UTF-16": (b"\xff\xfes\0e\0", "the text is UTF-16; allowed: UTF-8"),
    "latin-1": ("wandb: {name: é}".encode("latin-1"), "not UTF-8"),
    "NUL": (b"seed: 1\0", "not valid YAML"),
    "nested lists": (b"[" * 20_000, "nested too deep"),
    "nested mappings": (b"{a: " * 20_000, "nested too deep"),
    "aliases": (BOMB, "values, aliases written out"),
    "an alias of itself": (b"a: &a [*a]", "values, aliases written out"),
    "an impossible date": (b"seed: 2024-13-45", "at line 1"),
    "a date": (b"output_dir: 2024-12-24", "output_dir"),
    "thousands of digits": (b"seed: " + b"9" * 5000, "at line 1"),
    "thousands of hexadecimal digits": (b"seed: 0x" + b"f" * 5000, "at line 1"),
    "a Python object": (b"seed: !!python/object/apply:os.system [touch made]", "at line 1"),
    "a tag that does not fit": (b"seed: !!timestamp now", "at line 1"),
    "a repeated key": (b"seed: 1\nseed: 2", "repeated key 'seed'"),
    "a number as key": (b"1: 2", "'1' is not a string"),
    "a number as merged key": (b"<<: {1: 2}", "'1' is not a string"),
    "null as key": (b"null: 2", "is not a string"),
    "a list as key": (b"? [a]\n: 1", "is not a string"),
    "a mapping as key": (b"{a: 1}: 1", "is not a string"),
    "two documents": (b"a: 1\n---\nb: 2", "another document"),
    "an unknown key": (b"x\x1b: 1", "not valid YAML"),
}
VALUES = [".nan", ".inf", "-.inf", "-1", "1e300", "1" + "0" * 30, '"1"', "true", "null", "[]", "{}", "1.5", "0"]
SETTINGS = [
    f"{section}.{name}"
    for section, field in RunConfig.model_fields.items()
    if hasattr(field.annotation, "model_fields")
    for name, setting in field.annotation.model_fields.items()
    if any(kind in str(setting.annotation) for kind in ("int", "float"))
]
NUMBERS = ["seed", *SETTINGS, *(f"model.{key}" for key in BOUNDS), "model.eos_token_id", "model.pad_token_id"]
TEXTS = [
    *("output_dir", "data.dataset", "data.subset", "data.revision", "data.text_column", "data.tokenizer"),
    *("data.cache_dir", "train.initial_weights", "evaluation.tasks", "evaluation.data_dir", "evaluation.include_path"),
    *("wandb.project", "wandb.name"),
]


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(refuses, tmp_path, name):
    content, words = FILES[name]
    (tmp_path / "bad.yaml").write_bytes(content)
    for script in ("train.py", "scripts/prepare_data.py", "scripts/quickstart.py"):
        refuses(script, ["--config", tmp_path / "bad.yaml"], words)


def test_what_is_no_regular_file(refuses, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        load_config(tmp_path / "pipe")
    for path in ("/dev/zero", "/dev/null", tmp_path):
        refuses("train.py", ["--config", path], "--config", "not a regular file")


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_bounds(config_file, tmp_path, key):
    """A value is refused in one line that names the key, or accepted, and then read back equal and finite."""
    accepted = []
    for value in VALUES:
        try:
            config = load_config(config_file, [f"{key}={value}"])
        except UserError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 600
            assert key.rpartition(".")[2] in message
            continue
        accepted.append(value)
        (tmp_path / "again.yaml").write_text(config.to_yaml())
        assert load_config(tmp_path / "again.yaml") == config
    assert not set(accepted) & {".nan", ".inf", "-.inf", "-1", "1e300", "1" + "0" * 30, '"1"', "[]", "{}"}
    assert "true" not in accepted or key == "optimizer.fused"


@pytest.mark.parametrize("key", TEXTS)
def test_every_text_has_a_length(config_file, key):
    for value in (
        "''",
        "x" * 256,
        '"a\\0b"',
        '"a\\nb"',
        '"\\ud800"',
        "5",
        "true",
        "[]",
        "{}",
        "!!binary aGk=",
        "/".join(["x" * 200] * 30),
    ):
        with pytest.raises(UserError) as error:
            load_config(config_file, [f"{key}={value}"])
        assert key.rpartition(".")[2] in str(error.value) and "\n" not in str(error.value)
        assert len(str(error.value)) < 600


def test_sections_are_frozen(config_file):
    config = load_config(config_file)
    for section in (config, config.data, config.train, config.optimizer, config.parallel, config.wandb):
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, name, getattr(section, name))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("=", "section.key=value"),
        ("seed", "section.key=value"),
        (".=1", "section.key=value"),
        ("train.=1", "section.key=value"),
        ("é=1", "unknown setting é"),
        ("a\nb=1", "unknown setting a"),
        ("train.steps.x=1", "steps is a single value"),
        ("optimizer.betas[0]=1", "unknown setting optimizer.betas[0]"),
        ("optimizer.betas=[.nan, 0.9]", "optimizer.betas"),
        ("model=3", "model is 3"),
        ("train=null", "train is None"),
        ("model.__class__=1", "model.__class__"),
        ("seed=1=2", "seed is '1=2'"),
        ("seed=\0", "not valid YAML"),
        ("seed=" + "[" * 20_000, "nested too deep"),
        ("data.validation_fraction='0.1'", "data.validation_fraction is '0.1'"),
        ("model.num_hidden_layers=1000000000", "num_hidden_layers is 1000000000; allowed: 1 to 1024"),
        ("model.layer_types=[linear_attention, 3]", "layer_types"),
        ("model.eos_token_id=264", "eos_token_id is 264; allowed: 0 to 263"),
    ],
)
def test_overrides(refuses, config_file, override, words):
    refuses("train.py", ["--config", config_file, override], words)


def test_models_that_cannot_be_built(refuses, config_file):
    large = ["model.hidden_size=131072", "model.intermediate_size=1048576", "model.num_hidden_layers=1000"]
    refuses(
        "train.py", ["--config", config_file, *large], "the model would have ", " weights; at most 1,000,000,000,000"
    )
    large = ["model.hidden_size=65536", "model.intermediate_size=65536", "model.num_hidden_layers=30"]
    refuses("train.py", ["--config", config_file, *large], "GiB per process")


def test_places_that_cannot_be_written(refuses, config_file, tmp_path):
    (tmp_path / "taken").write_text("")
    (tmp_path / "nowhere").symlink_to("absent/place")
    (tmp_path / "loop").symlink_to("loop")
    for place in ("taken", "taken/run", "nowhere", "loop"):
        refuses("train.py", ["--config", config_file, f"output_dir={place}"], "output_dir", place.partition("/")[0])
    refuses("train.py", ["--config", config_file, "train.initial_weights=absent"], "train.initial_weights", "absent")


def test_settings_of_another_kind_name_their_section(config_file):
    settings = yaml.safe_load(config_file.read_text())
    for section in ("data", "train", "optimizer", "parallel", "evaluation", "wandb", "model"):
        for value in (3, "text", [1], [[]], True):
            config_file.write_text(yaml.safe_dump(settings | {section: value}))
            with pytest.raises(UserError, match=rf"^{section} is .*; it is a section"):
                load_config(config_file)
