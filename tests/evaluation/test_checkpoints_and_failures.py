"""evaluate.py on training checkpoints, and what a user reads when a task or a model fails."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import run_settings

import evaluate as door
from flash_stu.errors import UserError, run_cli
from flash_stu.evaluation import evaluate, harness, language_model
from flash_stu.training import RunConfig, Trainer, join_world
from flash_stu.training.model_source import find_source, load_source

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A finished run with a checkpoint of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"a document {i} " * 9}) + "\n" for i in range(60)))
    settings = run_settings(folder / "tiny", folder / "text.jsonl", folder / "cache")
    settings["train"] |= {"checkpoint_every": 3, "validation_every": 6}
    config = RunConfig.model_validate(settings)
    with join_world(config) as world:
        Trainer(config, world).fit()
    return folder / "tiny"


def test_a_checkpoint_is_evaluated_like_the_final_model(run_directory, embedded_data, monkeypatch, capsys):
    output = run_directory.parent / "evaluation"
    words = ["--tasks", "embedded_bpb", "--limit", "3", "--device", "cpu", "--output", str(output)]
    for step in (3, 6):
        words += ["--model", str(run_directory / "checkpoints" / f"step-{step}")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, "--model", str(run_directory)])
    assert run_cli(door.main) == 0, capsys.readouterr().err
    models = json.loads((output / "results.json").read_text())["models"]
    assert list(models) == ["tiny-step-3", "tiny-step-6", "tiny"]
    three, six, final = (model["tasks"]["embedded_bpb"]["value"] for model in models.values())
    assert six == pytest.approx(final, rel=1e-6) and abs(three - final) > 1e-4
    assert len({model["content_hash"] for model in models.values()}) == 3
    assert run_cli(door.main) == 0 and "found earlier" in capsys.readouterr().out


def test_one_meaning_of_a_path(run_directory, tmp_path, monkeypatch, capsys):
    step = run_directory / "checkpoints" / "step-6"
    assert find_source(step) == step and find_source(run_directory) == run_directory / "final"
    for path in (step, run_directory):
        model, tokenizer = load_source(path, "cpu", torch.bfloat16)
        assert model.dtype == torch.bfloat16 and model.model.filters.phi.dtype == torch.float32
        assert tokenizer("a").input_ids == [97]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-6").symlink_to(step)
    with pytest.raises(UserError, match="has no final/ yet; a checkpoint of it can be evaluated: .*step-6"):
        evaluate([tmp_path])
    main = runpy.run_path(str(ROOT / "scripts" / "generate.py"))["main"]
    texts = []
    for path in (step, run_directory):
        words = ["--model", str(path), "--prompt", "a", "--max-new-tokens", "9", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["generate.py", *words])
        assert run_cli(main) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


ROWS = [{"text": f"pot {i}", "choices": ["red", "blue"], "label": i % 2} for i in range(3)]
GENERATION = {"output_type": "generate_until", "doc_to_target": "{{label}}", "doc_to_choice": None}
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
GENERATION |= {"metric_list": [EXACT], "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}


@pytest.fixture
def write_task(tmp_path):
    def write(rows=ROWS, **changes) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir()
        data = folder / "rows.jsonl"
        if rows is not None:
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "pots",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(data)}},
            "output_type": "multiple_choice",
            "validation_split": "validation",
            "doc_to_text": "{{text}}",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        task = {key: value for key, value in (task | changes).items() if value is not None}
        (folder / "pots.yaml").write_text(yaml.safe_dump(task))
        return folder

    return write


@pytest.fixture
def command(stu_dir, tmp_path, monkeypatch, capfd):
    def run(folder: Path, *words: str) -> tuple[int, str]:
        words = ["--model", str(stu_dir), "--device", "cpu", "--output", str(tmp_path / "out"), *words]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, "--tasks", "pots", "--include-path", str(folder)])
        capfd.readouterr()
        status = run_cli(door.main)
        return status, capfd.readouterr().err

    return run


def without(key):
    return [{k: v for k, v in row.items() if k != key} for row in ROWS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": None}, "task 'pots' cannot be loaded: FileNotFoundError"),
        ({"rows": []}, "task 'pots' cannot be loaded"),
        ({"rows": without("choices")}, "task 'pots' cannot be loaded"),
        ({"rows": without("label")}, "task 'pots': doc_to_target is 'label', a field that the data lack; there are:"),
        ({"rows": without("text")}, "task 'pots' cannot be loaded: UndefinedError: 'text' is undefined"),
        ({"validation_split": "absent"}, "task 'pots' cannot be loaded: KeyError: 'absent'"),
        ({"doc_to_text": "{{ text"}, "task 'pots' cannot be loaded: TemplateSyntaxError"),
        ({"output_type": "strange"}, "task 'pots' cannot be loaded: ValueError: Got invalid output_type 'strange'"),
        ({"metric_list": [{"metric": "acc", "aggregation": "odd"}]}, "task 'pots': the harness has no metric 'acc'"),
        ({"metric_list": [{"metric": "odd", "aggregation": "mean"}]}, "stu: task 'pots' reports no number"),
        (GENERATION | {"generation_kwargs": {"max_gen_toks": 65}}, "stu: task 'pots': max_gen_toks is 65"),
        (GENERATION | {"generation_kwargs": {"odd": 65, "max_gen_toks": 4}}, "stu: task 'pots' failed: ValueError"),
        (GENERATION | {"generation_kwargs": {"max_gen_toks": "x"}}, "stu: task 'pots' failed: ValueError"),
    ],
)
def test_a_task_that_fails_is_one_line(changes, message, write_task, command):
    status, error = command(write_task(**changes))
    assert status == 2 and error.count("\n") == 1 and error.startswith(f"error: {message}"), error


@pytest.mark.parametrize(
    ("content", "message"),
    [("task: [", "not valid YAML"), ("a: " + "[" * 5000, "not valid YAML"), (b"\xff", "not UTF-8 text at byte 0")],
)
def test_a_broken_definition_is_named(content, message, tmp_path, command):
    folder = tmp_path / "broken" / "deep"
    folder.mkdir(parents=True)
    (folder / "pots.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    status, error = command(tmp_path / "broken")
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("error: --include-path") and message in error and "pots.yaml" in error


def test_a_failing_metric_names_task_and_model(write_task, command, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(harness, "run_harness", fail)
    status, error = command(write_task())
    assert (status, error) == (2, "error: stu: task 'pots' failed: ZeroDivisionError: division by zero\n")


def test_generation_tasks_show_what_was_run(write_task, command, tmp_path):
    rows = [{"text": text, "label": "x"} for text in ("", "abc", "")]
    status, error = command(write_task(rows, **GENERATION))
    assert status == 0, error
    (model,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"].values()
    assert 5 <= model["tasks"]["pots"]["forward_tokens"] <= 5 + 3 * 3


def test_checks_go_from_cheap_to_slow(write_task, stu_dir, monkeypatch):
    slow = []
    monkeypatch.setattr(harness, "load_tasks", lambda *_: slow.append("tasks") or [])
    (stu_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        evaluate([stu_dir], "pots", include_path=write_task())
    assert slow == []
    monkeypatch.undo()
    monkeypatch.setattr(language_model, "load_source", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("flash_stu.evaluation.runner.check_model_dir", lambda path: path)
    monkeypatch.setattr("flash_stu.evaluation.definitions.official_index", dict)
    with pytest.raises(UserError, match="unknown task 'nothing'"):
        evaluate([stu_dir], "nothing")
