"""convert_checkpoint.py: published configs, filters and checkpoints with one thing wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "dim": 8,
    "num_heads": 2,
    "num_layers": 1,
    "seq_len": 16,
    "window_size": 4,
    "vocab_size": 11,
    "mlp_scale": 2,
    "num_eigh": 3,
    "weight_tying": True,
}
COUNTS = ("dim", "num_heads", "num_layers", "seq_len", "window_size", "vocab_size", "mlp_scale", "num_eigh")
SWITCHES = ("use_alibi", "use_hankel_L", "use_approx", "use_attn", "all_attn", "bias", "weight_tying")


@pytest.fixture
def published(tmp_path):
    """A checkpoint of one STU layer in the published layout, with its config and filters."""
    torch.manual_seed(0)
    shapes = {
        "tok_emb.weight": (11, 8),
        "norm.weight": (8,),
        "layers.0.stu_norm.weight": (8,),
        "layers.0.mlp_norm.weight": (8,),
        "layers.0.mlp.gate_proj.weight": (16, 8),
        "layers.0.mlp.up_proj.weight": (16, 8),
        "layers.0.mlp.down_proj.weight": (8, 16),
        "layers.0.stu.M_inputs": (8, 8),
        "layers.0.stu.M_filters": (3, 8),
    }
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    np.save(tmp_path / "filters.npy", np.ones((16, 3)))
    return tmp_path


@pytest.fixture
def converts(refuses, published):
    """Refuse what is in the folder now."""
    arguments = ["--checkpoint", "model.safetensors", "--config", "config.json", "--filters", "filters.npy"]
    return lambda *words: refuses("scripts/convert_checkpoint.py", [*arguments, "--output", "out"], *words)


@pytest.mark.parametrize("content", [b"[]", b"null", b"7", b'"x"', b"", b"{", b"{}", b"\xff", b"[" * 20_000])
def test_files_that_are_no_config(converts, published, content):
    (published / "config.json").write_bytes(content)
    converts("config.json")


@pytest.mark.parametrize("key", COUNTS)
def test_counts(converts, published, key):
    for value in ("8", -1, 0, 2.5, None, True, [], {}, 10**7 if key == "num_layers" else 10**12, float("nan")):
        (published / "config.json").write_text(json.dumps(CONFIG | {key: value}))
        converts("config.json", key)
    (published / "config.json").write_text(json.dumps({name: CONFIG[name] for name in CONFIG if name != key}))
    converts("config.json", key)


@pytest.mark.parametrize("key", [*SWITCHES, "theta", "dropout"])
def test_other_settings(converts, published, key):
    for value in ("yes", -1, [], {}, "1"):
        (published / "config.json").write_text(json.dumps(CONFIG | {key: value}))
        converts("config.json", "rope_theta" if key == "theta" and value == -1 else key)


def test_filters_too_large_to_compute(refuses, published):
    (published / "config.json").write_text(json.dumps(CONFIG | {"seq_len": 10**7}))
    arguments = ["--checkpoint", "model.safetensors", "--config", "config.json", "--output", "out"]
    refuses("scripts/convert_checkpoint.py", arguments, "seq_len is 10000000")


FILTERS = {
    "empty": np.ones((0, 0)),
    "one dimension": np.ones(48),
    "no dimension": np.ones(()),
    "three dimensions": np.ones((16, 3, 1)),
    "another shape": np.ones((16, 4)),
    "structured": np.zeros((16, 3), dtype=[("a", "f4"), ("b", "i4")]),
    "complex": np.ones((16, 3), dtype=complex),
    "text": np.full((16, 3), "x"),
    "booleans": np.ones((16, 3), dtype=bool),
    "dates": np.zeros((16, 3), dtype="datetime64[s]"),
    "NaN": np.full((16, 3), np.nan),
    "infinity": np.full((16, 3), np.inf),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(converts, published, name):
    np.save(published / "filters.npy", FILTERS[name])
    converts("filters")


def test_files_that_are_no_filters(converts, published):
    with (published / "filters.npy").open("wb") as file:
        np.save(file, np.array([[object()] * 3] * 16), allow_pickle=True)
    converts("filters.npy")
    with (published / "filters.npy").open("wb") as file:
        np.savez(file, a=np.ones((16, 3)))
    converts("filters.npy")
    for content in (b"", b"\x93NUMPY", b"not numbers", (published / "config.json").read_bytes()):
        (published / "filters.npy").write_bytes(content)
        converts("filters.npy")


NORM, INPUTS = "layers.0.mlp_norm.weight", "layers.0.stu.M_inputs"
CHANGES = {
    "missing": (lambda t: t.pop(NORM), NORM),
    "unknown": (lambda t: t.update(foo=torch.ones(1)), "foo"),
    "misshapen": (lambda t: t.update({NORM: torch.ones(9)}), NORM),
    "no dimension": (lambda t: t.update({INPUTS: torch.ones(())}), INPUTS),
    "three dimensions": (lambda t: t.update({INPUTS: torch.ones(8, 8, 1)}), INPUTS),
    "integers": (lambda t: t.update({NORM: torch.ones(8).long()}), NORM),
    "NaN": (lambda t: t[NORM].fill_(float("nan")), NORM),
    "there twice": (lambda t: t.update({f"module.{NORM}": torch.ones(8)}), NORM),
    "a bias without place": (lambda t: t.update({"layers.0.mlp.up_proj.bias": torch.ones(16)}), "up_proj.bias"),
    "empty": (lambda t: t.clear(), "tok_emb.weight"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors(converts, published, name):
    change, word = CHANGES[name]
    tensors = load_file(published / "model.safetensors")
    change(tensors)
    save_file(tensors, published / "model.safetensors")
    converts("model.safetensors", word)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"PK\x03\x04"])
def test_files_that_are_no_checkpoint(converts, published, content):
    (published / "model.safetensors").write_bytes(content)
    converts("model.safetensors")


def test_a_missing_bias_is_named(converts, published):
    (published / "config.json").write_text(json.dumps(CONFIG | {"bias": True}))
    converts("model.safetensors", "bias")
