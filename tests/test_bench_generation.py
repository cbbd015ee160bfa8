"""The generation benchmark: its three forms run, and write what the quickstart reads."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from flash_stu.errors import run_cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run the script with a command line: its exit status, output and errors."""
    folder = ROOT / "scripts" / "bench"
    monkeypatch.syspath_prepend(folder)  # where a script finds what it shares with others
    main = runpy.run_path(str(folder / "generation.py"))["main"]

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["generation.py", "--device", "cpu", *map(str, words)])
        return run_cli(main), *capsys.readouterr()

    return run


def test_shapes_of_a_config(bench, tiny_config, tmp_path):
    shape = {key: getattr(tiny_config(), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "sliding_window": 7, "num_filters": 8}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({"model": shape | {"max_position_embeddings": 65}}))
    status, shown, error = bench(
        *("--config", config, "--lengths", 9, 3, "--state-dims", 12, "--repeats", 2, "--output", tmp_path / "out")
    )
    assert status == 0, error
    rows = json.loads((tmp_path / "out" / "generation.json").read_text())["rows"]
    for panel in ("layer", "stu", "hybrid"):
        labels = [row["label"].split()[0] for row in rows if row["panel"] == panel]
        assert labels == ["naive", "epoched", "FutureFill", "LDS,", "attention"]
    for row in rows:
        (short, some), (long, more) = row["seconds"]
        assert (short, long) == (3, 9) and len(some) == len(more) == 2
        assert all(0 < a < b for a, b in zip(some, more, strict=True))
        assert [n for n, _ in row["rates"]] == [3, 9] and row["limit"] > 0
        assert row["curve"][0] == [0, 0] and row["curve"][-1][0] == 9
    (header,) = [line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("| seconds to generate")]
    named = ["seconds to generate", "3", "9", "tokens/s at the end", "weights allow", "share"]
    assert [cell.strip() for cell in header] == named
    assert (tmp_path / "out" / "generation.png").read_bytes().startswith(b"\x89PNG")


def test_finished_models_and_one_long_text(bench, tiny_model, tmp_path):
    for name, changes in {"stu": {}, "lds": {"lds_state_dim": 12}}.items():
        tiny_model(num_hidden_layers=1, **changes).save_pretrained(tmp_path / name)
    models = ["--model", tmp_path / "stu", "--model", tmp_path / "lds"]
    status, _, error = bench(*models, "--lengths", 3, 9, "--output", tmp_path)
    assert status == 0, error
    rows = json.loads((tmp_path / "generation.json").read_text())["rows"]
    assert [row["label"] for row in rows] == list(map(str, models[1::2]))
    status, shown, _ = bench("--model", tmp_path / "lds", "--long", 3000)
    assert status in (0, 1) and "3000 tokens in" in shown and "ratio" in shown
    assert "needs a distilled model" in bench("--model", tmp_path / "stu", "--long", 3000)[2]
    assert "argument --long: 7 is out of range; allowed: 3000 to" in bench("--long", 7)[2]
    assert bench(*models, "--lengths", 64, 90)[2].startswith("error: prompt and new tokens are 91 together")
