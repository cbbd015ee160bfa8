"""evaluate.py from the outside: files, agreement with lm-eval's own runner, and what bad input gets."""

import json
import shutil
import sys

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

import evaluate as door
from flash_stu.errors import UserError, run_cli
from flash_stu.evaluation import evaluate
from flash_stu.evaluation.harness import write_embedded_task
from flash_stu.evaluation.report import format_table


def test_results_of_two_models_equal_those_of_the_harness_alone(
    stu_dir, llama_dir, embedded_data, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "results"
    models = ["--model", str(stu_dir), "--model", str(llama_dir)]
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *models, "--output", str(output), "--limit", "20", "--device", "cpu"]
    )
    assert run_cli(door.main) == 0

    results = json.loads((output / "results.json").read_text())
    table = (output / "table.md").read_text()
    assert table == format_table(results) + "\n"
    printed = capsys.readouterr()
    assert table in printed.out
    assert printed.err == ""  # nothing of the harness's chatter
    assert list(results["models"]) == ["stu", "llama"]
    assert sorted(path.name for path in output.iterdir()) == ["results.json", "table.md"]
    assert results["versions"]["lm_eval"] == lm_eval.__version__

    tasks = ["embedded_bpb", "embedded_cloze"]
    folder = tmp_path / "yaml"
    folder.mkdir()
    for name in tasks:
        write_embedded_task(name, folder)
    manager = TaskManager(include_path=folder, include_defaults=False)
    for label, directory in (("stu", stu_dir), ("llama", llama_dir)):
        theirs = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={directory},trust_remote_code=True,dtype=float32",
            tasks=tasks,
            task_manager=manager,
            device="cpu",
            batch_size=4,
            limit=20,
        )
        ours = results["models"][label]["tasks"]
        bits, cloze = (theirs["results"][name] for name in tasks)
        assert ours["embedded_bpb"]["value"] == pytest.approx(bits["bits_per_byte,none"], rel=1e-6)
        assert ours["embedded_cloze"]["value"] == cloze["acc,none"]
        assert ours["embedded_cloze"]["stderr"] == pytest.approx(cloze["acc_stderr,none"])
        assert ours["embedded_cloze"]["items"] == theirs["n-samples"]["embedded_cloze"]["effective"] == 20


def test_a_model_that_fails_leaves_the_results_of_those_before_it(stu_dir, embedded_data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(stu_dir, broken)
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"], config["layer_types"] = 1, config["layer_types"][:1]
    (broken / "config.json").write_text(json.dumps(config))
    output = tmp_path / "results"
    with pytest.raises(UserError, match="broken"):
        evaluate([stu_dir, broken], "embedded_cloze", limit=2, output=output, device="cpu", progress=False)
    assert list(json.loads((output / "results.json").read_text())["models"]) == ["stu"]
    assert "| stu " in (output / "table.md").read_text()


def test_a_training_run_stands_for_its_final_model(stu_dir, embedded_data, tmp_path):
    run = tmp_path / "my_run"
    run.mkdir()
    shutil.move(stu_dir, run / "final")
    results = evaluate([run], "embedded_cloze", limit=2, device="cpu", progress=False)
    assert results["models"]["my_run"]["path"] == str(run / "final")


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    from flash_stu.evaluation import language_model

    monkeypatch.setattr(language_model, "load_model", lambda *_: pytest.fail("a model was loaded"))


def drop(name):
    return lambda directory: (directory / name).unlink()


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tokenizer(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such directory"),
        (drop("config.json"), "not a model directory"),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json: not a JSON object"),
        (drop("model.safetensors"), "model.safetensors, the weights, is missing"),
        (truncate, "model.safetensors: damaged or truncated"),
        (drop_tokenizer, "no tokenizer"),
    ],
)
def test_a_damaged_model_directory_is_refused(damage, message, stu_dir, no_model_is_loaded):
    damage(stu_dir)
    with pytest.raises(UserError, match=message):
        evaluate([stu_dir])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--limit", "-3"], "--limit is -3; it must be at least 1"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--data-dir", "nowhere"], "--data-dir nowhere is not a directory"),
        (["--device", "tpu"], "--device is 'tpu'; allowed here: cpu"),
        (["--tasks", "paper,mmlu"], "task 'mmlu' is asked for twice"),
        (["--tasks", "piqa_"], "unknown task 'piqa_'; close matches: piqa"),
        (["--output", "config.json"], "--output config.json is not a directory"),
        (["--model", "."], "is given twice"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments, message, stu_dir, no_model_is_loaded, monkeypatch, capsys):
    monkeypatch.chdir(stu_dir)
    before = sorted(path.name for path in stu_dir.iterdir())
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(stu_dir), *arguments])
    assert run_cli(door.main) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in stu_dir.iterdir()) == before


def test_table_shows_percent_errors_average_and_warnings():
    def task(metric, value, stderr=None, shots=0, truncated=0):
        return {
            "metric": metric,
            "value": value,
            "stderr": stderr,
            "shots": shots,
            "truncated": truncated,
            "requests": 8,
        }

    def model(accuracy, truncated):
        tasks = {
            "bits": task("bits_per_byte", 1.23456),
            "mmlu": task("acc", accuracy, 0.01, shots=5, truncated=truncated),
            "piqa": task("acc", 0.75),
        }
        return {"max_length": 65, "tasks": tasks}

    results = {"settings": {"limit": 9}, "models": {"stu": model(0.25, 3), "distilled": model(0.3, 0)}}
    lines = format_table(results).splitlines()
    assert lines[:4] == [
        "| model     | bits (bits_per_byte) |  mmlu 5-shot |  piqa | average acc |",
        "| --------- | -------------------: | -----------: | ----: | ----------: |",
        "| stu       |               1.2346 | 25.00 ± 1.00 | 75.00 |       50.00 |",
        "| distilled |               1.2346 | 30.00 ± 1.00 | 75.00 |       52.50 |",
    ]
    assert "Only the first 9 items of each task were scored" in "\n".join(lines)
    assert "stu: 3 of 24 requests were longer than its 65 tokens" in "\n".join(lines)
    assert "distilled:" not in "\n".join(lines)
