"""The loss landscape: its centre is the model's loss, its directions are filter-normalised, weights come back."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from flash_stu.data import load_tokenizer
from flash_stu.errors import run_cli

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "experiments" / "loss_landscape.py"))


def loss(model, windows):
    """Nats per token from the logits, in float64, one window after another."""
    with torch.no_grad():
        parts = [cross_entropy(model(w[None]).logits[0, :-1].double(), w[1:]) for w in windows]
    return float(sum(parts)) / len(parts)


def filters(name, tensor):
    """A tensor with a row for everything that makes one output."""
    if name.endswith(("M_filters", "M_phi")):  # (branches, filters, [inputs,] outputs)
        return tensor.flatten(0, -2).t()
    return tensor.flatten(1)


@pytest.mark.parametrize("kind", ["tensordot", "full"])
def test_directions_are_filter_normalised(tiny_model, kind):
    model = tiny_model(stu_type=kind, stu_branches="separate", bias=True)
    drawn, other = (SCRIPT["direction"](model, seed) for seed in (0, 1))
    for name, weight in model.named_parameters():
        moved = drawn[name]
        assert moved.shape == weight.shape
        if weight.dim() < 2:
            assert not moved.any()
            continue
        norms = filters(name, weight.detach()).norm(dim=1)
        torch.testing.assert_close(filters(name, moved).norm(dim=1), norms, rtol=1e-4, atol=1e-7)
        assert not torch.equal(moved, other[name])
    assert {"lm_head.bias"} <= {name for name in drawn if not drawn[name].any()}
    again = SCRIPT["direction"](model, 0)
    assert all(torch.equal(again[name], drawn[name]) for name in drawn)


def test_losses_are_those_of_the_moved_models(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    windows = torch.randint(61, (11, 20), generator=torch.Generator().manual_seed(1))  # not a multiple of a batch
    landscape = SCRIPT["Landscape"](model, windows, scale=2.0)
    axes = [SCRIPT["direction"](model, seed) for seed in (0, 1)]
    points = [(0.0, 0.0), (0.5, 0.0), (-1.0, 0.25)]
    found = landscape.losses(axes, points)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert landscape.losses([], [()]) == [found[0]]
    for point, value in zip(points, found, strict=True):
        moved = tiny_model()
        with torch.no_grad():
            for name, weight in moved.named_parameters():
                weight += point[0] * axes[0][name] + point[1] * axes[1][name]
        assert value == pytest.approx(2 * loss(moved, windows), rel=1e-5)


def test_held_out_windows():
    tokenizer = load_tokenizer("bytes").to_transformers()
    windows, scale = SCRIPT["held_out_windows"](["abcdefg", "hi", "jklmnop"], tokenizer, 2, 5)
    assert windows.tolist() == [list(b"abcde"), [*b"fg", 256, *b"hi"]]
    assert scale == 19 / 16
    assert len(SCRIPT["held_out_windows"](["abcdefg"], tokenizer, 100, 4)[0]) == 2
    with pytest.raises(ValueError, match="the held-out text has 3 tokens; at least 5 are needed"):
        SCRIPT["held_out_windows"](["ab"], tokenizer, 2, 5)


def test_finished_models_and_a_text(tiny_model, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("What is held out is a text of some length. " * 10)
    for name, changes in {"stu": {}, "lds": {"lds_state_dim": 12}}.items():
        tiny_model(num_hidden_layers=1, vocab_size=257, **changes).save_pretrained(tmp_path / name)
        load_tokenizer("bytes").to_transformers().save_pretrained(tmp_path / name)
    words = ["--model", tmp_path / "stu", "--model", tmp_path / "lds", "--text", text, "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", ["loss_landscape.py", "--quick", *map(str, words)])
    status = run_cli(SCRIPT["main"])
    assert status == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "loss_landscape.json").read_text())
    assert [row["model"] for row in results["rows"]] == [str(tmp_path / name) for name in ("stu", "lds")]
    assert results["steps"] is None and results["text"] == str(text)
    for row in results["rows"]:
        size = results["points"]
        assert [len(line) for line in row["plane"]] == [size] * size
        assert row["plane"][size // 2][size // 2] == pytest.approx(row["centre"], rel=1e-6)
        assert all(line[10] == pytest.approx(row["centre"], rel=1e-6) for line in row["slices"])
        first, second = row["slices"][:2]  # along the plane's axes
        assert row["plane"][size // 2][-1] == pytest.approx(first[-1], rel=1e-5)
        assert row["plane"][-1][size // 2] == pytest.approx(second[-1], rel=1e-5)
