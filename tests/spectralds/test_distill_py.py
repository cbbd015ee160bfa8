"""distill.py from the outside: what it writes, what it compares on, and what bad input gets."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_stu.data import load_tokenizer
from flash_stu.loading import load_model

REPOSITORY = Path(__file__).parents[2]
SIZES = {"vocab_size": 257, "max_position_embeddings": 129, "hidden_size": 16}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run distill.py's command line in this process; returns exit status, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(REPOSITORY / "distill.py"), run_name="__main__")
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def model_dir(tiny_model, tmp_path) -> Path:
    """A model directory with a byte tokenizer."""
    path = tmp_path / "model"
    tiny_model(**SIZES).save_pretrained(path)
    load_tokenizer("bytes").to_transformers().save_pretrained(path)
    return path


def test_writes_a_model_its_tokenizer_a_report_and_a_figure(command, model_dir, tmp_path):
    output = tmp_path / "somewhere" / "distilled"
    status, stdout, stderr = command("--checkpoint", model_dir, "--output", output, "--state-dim", 80)
    assert (status, stderr) == (0, "")
    assert "validation loss" in stdout and str(output) in stdout
    assert sorted(path.name for path in output.parent.iterdir()) == ["distilled"]

    report = json.loads((output / "distillation.json").read_text())
    assert (report["state_dim"], report["method"]) == (80, "quadrature")
    assert report["fit"]["mse"] < 1e-22
    assert len(report["fit"]["per_filter"]["mse"]) == 8
    assert {"lambda_max", "lambda_max_h", "aak_bound", "mse_bound", "coefficient_norm"} <= report["fit"].keys()
    assert [entry["layer"] for entry in report["layers"]["layers"]] == [0, 2]
    comparison = report["comparison"]
    assert comparison["text"] == "validation documents of the embedded corpus"
    assert comparison["window_length"] == 129
    assert comparison["max_abs_logit_difference"] < 1e-4
    assert comparison["validation_loss_after"] == pytest.approx(comparison["validation_loss_before"], abs=1e-6)
    assert f"{comparison['validation_loss_before']:.6f} before" in stdout
    assert (output / "distillation.png").read_bytes().startswith(b"\x89PNG")

    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    distilled, original = AutoModelForCausalLM.from_pretrained(output), load_model(model_dir)
    assert distilled.config.lds_state_dim == 80
    with torch.no_grad():
        torch.testing.assert_close(distilled(ids).logits, original(ids).logits, rtol=0, atol=1e-4)


def test_an_earlier_distillation_is_replaced_and_nothing_else(command, model_dir, tmp_path):
    output = tmp_path / "distilled"
    arguments = ("--checkpoint", model_dir, "--output", output, "--text", model_dir / "config.json")
    assert command(*arguments, "--state-dim", 40)[0] == 0
    (output / "leftover").touch()
    assert command(*arguments, "--state-dim", 24, "--method", "balanced")[0] == 0
    report = json.loads((output / "distillation.json").read_text())
    assert (report["state_dim"], report["method"]) == (24, "balanced")
    assert load_model(output).config.lds_state_dim == 24
    assert not (output / "leftover").exists()
    for taken in (model_dir, tmp_path, model_dir / "config.json"):
        status, stdout, stderr = command("--checkpoint", model_dir, "--output", taken)
        assert (status, stdout) == (2, "")
        assert stderr == f"error: --output {taken} exists and is not a distillation; choose another directory\n"
    shutil.copytree(model_dir, output / "inside")
    status, _, stderr = command("--checkpoint", output / "inside", "--output", output)
    assert status == 2 and f"--output {output} holds the model to distill" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["distilled", "model"]


def test_a_run_is_compared_on_its_own_validation_split(command, model_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model_dir, run / "final")
    texts = [{"text": f"document {i} about filters " * 5} for i in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    config = {
        "output_dir": str(run),
        "model": SIZES | {"num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 4},
        "data": {
            "dataset": str(tmp_path / "corpus.jsonl"),
            "tokenizer": "bytes",
            "cache_dir": str(tmp_path / "cache"),
            "validation_fraction": 0.3,
        },
        "train": {"sequence_length": 48, "global_batch_size": 48, "steps": 1},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    output = tmp_path / "distilled"
    assert command("--checkpoint", run, "--output", output)[0] == 0
    comparison = json.loads((output / "distillation.json").read_text())["comparison"]
    assert comparison["text"] == f"validation split of {run}"
    assert comparison["window_length"] == 48
    assert comparison["tokens"] == 48 * comparison["windows"] > 48

    (tmp_path / "corpus.jsonl").unlink()
    status, _, stderr = command("--checkpoint", run, "--output", tmp_path / "other")
    assert status == 2 and "choose another text for the comparison with --text" in stderr
    assert command("--checkpoint", run, "--output", tmp_path / "other", "--text", "embedded")[0] == 0


def test_a_model_without_a_tokenizer_is_distilled_without_a_comparison(command, model_dir, tmp_path):
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    status, stdout, _ = command("--checkpoint", model_dir, "--output", tmp_path / "distilled")
    assert status == 0 and "no comparison on text" in stdout
    assert json.loads((tmp_path / "distilled" / "distillation.json").read_text())["comparison"] is None


def test_half_precision_checkpoints_stay_half_precision(command, model_dir, tmp_path, tiny_model):
    tiny_model(**SIZES).bfloat16().save_pretrained(model_dir)
    output = tmp_path / "distilled"
    assert command("--checkpoint", model_dir, "--output", output)[0] == 0
    assert AutoModelForCausalLM.from_pretrained(output).model.embed_tokens.weight.dtype == torch.bfloat16
    comparison = json.loads((output / "distillation.json").read_text())["comparison"]
    assert comparison["max_abs_logit_difference"] < 1e-4  # measured in float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--state-dim", 41], "state_dim is 41; allowed: even numbers from 2 to 1024"),
        (["--method", "sgd"], "method is 'sgd'; allowed: quadrature, balanced"),
        (["--method", "balanced", "--state-dim", 200], "balanced truncation resolves at most"),
        (["--checkpoint", "/nowhere"], "/nowhere: no such directory"),
        (["--checkpoint", "."], "not a model directory"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt: No such file or directory"),
        (["--text", "."], "--text .: Is a directory"),
        (["--output", "model/config.json/x"], "--output model/config.json/x: Not a directory"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(command, model_dir, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, stderr = command("--checkpoint", model_dir, "--output", "distilled", *arguments)
    assert status == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert message in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_broken_checkpoints_are_named(command, model_dir, tmp_path):
    weights = model_dir / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    status, _, stderr = command("--checkpoint", model_dir, "--output", tmp_path / "distilled")
    assert status == 2 and stderr.count("\n") == 1 and str(model_dir) in stderr
    weights.write_bytes(whole)
    (model_dir / "tokenizer.json").write_text("{}")
    status, _, stderr = command("--checkpoint", model_dir, "--output", tmp_path / "distilled")
    assert status == 2 and stderr.count("\n") == 1 and "tokenizer" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_model_without_stu_layers_is_refused(command, model_dir, tiny_model, tmp_path):
    tiny_model(**SIZES, layer_types=["sliding_attention"] * 4).save_pretrained(model_dir)
    status, _, stderr = command("--checkpoint", model_dir, "--output", tmp_path / "distilled")
    assert (status, stderr) == (2, "error: the model has no STU layers to distill: its layer_types are all "
                            "sliding_attention\n")  # fmt: skip
