"""distill.py from the outside: what it writes, what it compares on, and what bad input gets."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_stu.data import load_tokenizer
from flash_stu.distributed import World
from flash_stu.model.loading import load_model
from flash_stu.training.checkpoint import Checkpointer
from flash_stu.training.checkpoint_folder import RunState

REPOSITORY = Path(__file__).parents[2]
SIZES = {"vocab_size": 257, "max_position_embeddings": 129, "hidden_size": 16}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run distill.py's command line in this process; returns exit status, stdout, stderr. Figures take long: an empty
    file stands for one unless asked for."""

    def run(*arguments, figure=False):
        capsys.readouterr()
        if not figure:
            monkeypatch.setattr("spectralds.directory.plot_fit", lambda bank, fit, curve, path: path.touch())
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
    arguments = ("--checkpoint", model_dir, "--output", output, "--state-dim", 80)
    status, stdout, stderr = command(*arguments, "--verify", figure=True)
    assert (status, stderr) == (0, "")
    assert "validation loss" in stdout and str(output) in stdout
    assert sorted(path.name for path in output.parent.iterdir()) == ["distilled"]

    report = json.loads((output / "distillation.json").read_text())
    assert (report["state_dim"], report["method"], report["tolerance"]) == (80, "auto", 1e-5)
    assert report["fit"]["mse"] < 1e-22 and report["fit"]["state_dim"] == 80
    assert len(report["eigenvalues"]) == 40 and 0 < min(report["eigenvalues"]) < max(report["eigenvalues"]) < 1
    assert report["curve"].keys() == {"state_dim", "bound", "quadrature", "balanced", "sampled"}
    assert report["generation"]["agreement"] == 1.0 and report["verified"] is True
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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_running_twice_gives_the_same_files_and_without_verify_compares_nothing(command, model_dir, tmp_path):
    output = tmp_path / "distilled"
    arguments = ("--checkpoint", model_dir, "--output", output, "--state-dim", "auto", "--tolerance", 1e-4)
    assert command(*arguments, figure=True)[0] == 0
    first = contents(output)
    status, stdout, stderr = command(*arguments, figure=True)
    assert (status, stderr) == (0, "") and "validation loss" not in stdout
    assert contents(output) == first
    report = json.loads(first["distillation.json"])
    assert [report[key] for key in ("layers", "comparison", "generation", "verified")] == [None] * 4
    assert report["fit"]["run_time_error"] <= 1e-4 and (report["state_dim"], report["tolerance"]) == ("auto", 1e-4)
    assert load_model(output).config.lds_state_dim == report["fit"]["state_dim"] < 40


def test_a_coarse_distillation_is_written_and_fails_its_verification(command, model_dir, tmp_path):
    output = tmp_path / "distilled"
    arguments = ("--checkpoint", model_dir, "--output", output, "--state-dim", 4)
    status, _, stderr = command(*arguments, "--verify")
    assert status == 1 and stderr.startswith("error: the logits' relative difference is ")
    assert stderr.endswith("; --verify allows 0.001\n") and stderr.count("\n") == 1
    report = json.loads((output / "distillation.json").read_text())
    assert report["verified"] is False and report["comparison"]["relative_logit_difference"] > 1e-3
    assert command(*arguments, "--verify", 10.0)[0] == 0


def test_a_training_checkpoint_is_distilled_and_an_unfinished_run_says_so(command, model_dir, tmp_path):
    run, model = tmp_path / "run", load_model(model_dir)
    model.model.embed_tokens.weight.data.mul_(1.5)  # not what the directory holds
    settings = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 4}
    settings |= {"num_attention_heads": 4, "sliding_window": 7, "max_position_embeddings": 129, "num_filters": 8}
    config = {
        "output_dir": str(run),
        "model": settings,
        "data": {"dataset": "embedded", "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")},
        "train": {"sequence_length": 48, "global_batch_size": 48, "steps": 5},
    }
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    world = World(rank=0, size=1, device=torch.device("cpu"))
    with Checkpointer(run / "checkpoints", model, [torch.optim.SGD(model.parameters())], world, keep=1) as checkpointer:
        checkpointer.save(RunState(step=3, seconds=0.0, run_id="0", data="", skipped=0, skipped_in_a_row=0))
    status, _, stderr = command("--checkpoint", run, "--output", tmp_path / "distilled")
    step = run / "checkpoints" / "step-3"
    assert status == 2 and stderr.endswith(f"has no final/ yet; a checkpoint of it can be distilled: {step}\n")

    assert command("--checkpoint", step, "--output", tmp_path / "distilled", "--verify")[0] == 0
    report = json.loads((tmp_path / "distilled" / "distillation.json").read_text())
    assert report["comparison"]["text"] == f"validation split of {run}" and report["verified"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "distilled")("A checkpoint", return_tensors="pt").input_ids
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "distilled")(ids).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-4)


def test_an_earlier_distillation_is_replaced_and_nothing_else(command, model_dir, tmp_path):
    output = tmp_path / "distilled"
    arguments = ("--checkpoint", model_dir, "--output", output)
    text = ("--verify", "--text", model_dir / "config.json")
    assert command(*arguments, "--state-dim", 40, *text)[0] == 0
    assert json.loads((output / "distillation.json").read_text())["comparison"]["text"] == str(text[-1])
    (output / "notes.txt").touch()
    status, stdout, stderr = command(*arguments, "--state-dim", 24)
    assert (status, stdout) == (2, "") and f"--output {output} holds notes.txt, which this program did not" in stderr
    (output / "notes.txt").unlink()
    assert command(*arguments, "--state-dim", 24, "--method", "balanced")[0] == 0
    report = json.loads((output / "distillation.json").read_text())
    assert (report["state_dim"], report["method"]) == (24, "balanced")
    assert load_model(output).config.lds_state_dim == 24
    others = {model_dir: "was not written by this program", tmp_path: "was not written by this program"}
    for taken, why in (others | {model_dir / "config.json": "is not a directory"}).items():
        status, stdout, stderr = command("--checkpoint", model_dir, "--output", taken)
        assert (status, stdout) == (2, "")
        assert stderr.startswith("error: ") and stderr.count("\n") == 1
        assert f"{taken} exists and {why}" in stderr
    status, _, stderr = command("--checkpoint", output, "--output", output)
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
    assert command("--checkpoint", run, "--output", output, "--verify")[0] == 0
    comparison = json.loads((output / "distillation.json").read_text())["comparison"]
    assert comparison["text"] == f"validation split of {run}"
    assert comparison["window_length"] == 48
    assert comparison["tokens"] == 48 * comparison["windows"] > 48

    (tmp_path / "corpus.jsonl").unlink()
    status, _, stderr = command("--checkpoint", run, "--output", tmp_path / "other", "--verify")
    assert status == 2 and "or compare on another text (argument text)" in stderr
    assert command("--checkpoint", run, "--output", tmp_path / "other", "--verify", "--text", "embedded")[0] == 0


def test_a_model_without_a_tokenizer_is_distilled_but_not_verified(command, model_dir, tmp_path):
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    assert command("--checkpoint", model_dir, "--output", tmp_path / "distilled")[0] == 0
    assert not list((tmp_path / "distilled").glob("tokenizer*"))
    status, _, stderr = command("--checkpoint", model_dir, "--output", tmp_path / "other", "--verify")
    assert status == 2 and "no tokenizer beside the model" in stderr and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "before, asked, after",
    [("bfloat16", None, "bfloat16"), ("bfloat16", "float32", "float32"), ("float32", "bfloat16", "bfloat16")],
)
def test_dtype_of_the_weights_written(command, model_dir, tmp_path, tiny_model, before, asked, after):
    tiny_model(**SIZES).to(getattr(torch, before)).save_pretrained(model_dir)
    output = tmp_path / "distilled"
    arguments = ("--checkpoint", model_dir, "--output", output, *(() if asked is None else ("--dtype", asked)))
    assert command(*arguments, "--verify", 0.1)[0] == 0
    report = json.loads((output / "distillation.json").read_text())
    assert report["dtype"] == after
    if before == "bfloat16":  # every weight is kept; compared in float32
        assert report["comparison"]["max_abs_logit_difference"] < 1e-4
    weights = load_file(output / "model.safetensors")
    assert weights["model.embed_tokens.weight"].dtype == getattr(torch, after)
    exact = {name: tensor for name, tensor in weights.items() if name.endswith(("decay", "readout"))}
    assert len(exact) == 4 and {tensor.dtype for tensor in exact.values()} == {torch.float32}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--state-dim", 41], "--state-dim is 41; allowed: even numbers from 2 to 1024, or auto"),
        (["--state-dim", "few"], "argument --state-dim: 'few' is not an integer"),
        (["--method", "sgd"], "argument --method: invalid choice: 'sgd'"),
        (["--state-dim", "auto", "--tolerance", 1e-12], "state dimensions up to 256 do not reach it"),
        (["--tolerance", 2], "argument --tolerance: 2 is out of range; allowed: above 0 to 1"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--text", "embedded"], "--text says what to compare the models on: it goes with --verify"),
        (["--verify", "much"], "argument --verify: 'much' is not a number"),
        (["--checkpoint", "/nowhere"], "/nowhere: no such directory"),
        (["--checkpoint", "."], "not a model directory"),
        (["--verify", "--text", "/nowhere.txt"], "--text /nowhere.txt: no such file"),
        (["--verify", "--text", "."], "--text .: not a regular file"),
        (["--output", "model/config.json/x"], "argument --output: model/config.json/x cannot be written: "),
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
    status, _, stderr = command("--checkpoint", model_dir, "--output", tmp_path / "distilled", "--verify")
    assert status == 2 and stderr.count("\n") == 1 and "tokenizer" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_model_without_stu_layers_is_refused(command, model_dir, tiny_model, tmp_path):
    tiny_model(**SIZES, layer_types=["sliding_attention"] * 4).save_pretrained(model_dir)
    status, _, stderr = command("--checkpoint", model_dir, "--output", tmp_path / "distilled")
    assert (status, stderr) == (
        2,
        "error: the model has no STU layers to distill: its layer_types are all sliding_attention\n",
    )
