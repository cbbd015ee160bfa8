"""evaluate.py from the outside: files, agreement with lm-eval's own runner, and what bad input gets."""

import json
import shutil
import sys
from functools import partial

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from processes import run_processes
from safetensors.torch import load_file, save_file

import evaluate as door
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.evaluation import evaluate, harness, language_model
from flash_stu.evaluation.definitions import official_index, write_generated_task, write_local_task
from flash_stu.evaluation.report import format_csv, format_report, format_table
from flash_stu.model.loading import load_model


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
    assert table == format_report(results) + "\n"
    printed = capsys.readouterr()
    assert table in printed.out
    # nothing of the harness's chatter
    warnings = printed.err.splitlines()
    assert [line.partition(" requests")[0] for line in warnings] == [
        f"warning: embedded_cloze: {name}: 80 of 80" for name in ("stu", "llama")
    ]
    assert list(results["models"]) == ["stu", "llama"]
    files = [".flash_stu.json", "items", "results.json", "table.csv", "table.md", "table.png"]
    assert sorted(path.name for path in output.iterdir()) == files
    assert results["versions"]["lm_eval"] == lm_eval.__version__

    tasks = ["embedded_bpb", "embedded_cloze"]
    folder = tmp_path / "yaml"
    folder.mkdir()
    for name in tasks:
        write_generated_task(name, folder)
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
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")  # which only loading it shows
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "results"
    with pytest.raises(UserError, match="broken: model.norm.weight has values that are not finite"):
        evaluate([stu_dir, broken], "embedded_cloze", limit=2, output=output, device="cpu", progress=False)
    assert list(json.loads((output / "results.json").read_text())["models"]) == ["stu"]
    assert "| stu " in (output / "table.md").read_text()


def test_a_training_run_stands_for_its_final_model(stu_dir, embedded_data, tmp_path):
    run = tmp_path / "my_run"
    run.mkdir()
    shutil.move(stu_dir, run / "final")
    results = evaluate([run], "embedded_cloze", limit=2, device="cpu", progress=False)
    assert results["models"]["my_run"]["path"] == str(run / "final")


def test_official_tasks_equal_the_harness_alone_item_by_item(long_dir, mirror, tmp_path):
    """Five worked examples shared by all questions, one-token choices: every shortcut of ours is taken."""
    path = tmp_path / "suite.yaml"
    path.write_text("tasks: [{name: mmlu_anatomy, shots: 5, metric: acc}]")
    output = tmp_path / "five"
    results = evaluate([long_dir], str(path), data_dir=mirror, output=output, device="cpu", progress=False)
    ours = json.loads((output / "items/long/mmlu_anatomy.json").read_text())["items"]

    entry = official_index()["mmlu_anatomy"]
    (tmp_path / "yaml").mkdir()
    write_local_task("mmlu_anatomy", entry.cfg, entry.yaml_path, mirror, 5, tmp_path / "yaml")
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={long_dir},trust_remote_code=True,dtype=float32",
        tasks=["mmlu_anatomy"],
        num_fewshot=5,
        task_manager=TaskManager(include_path=str(tmp_path / "yaml"), include_defaults=False),
        device="cpu",
        batch_size=1,
    )
    samples = theirs["samples"]["mmlu_anatomy"]
    assert len(samples) == len(ours) == 3
    for own, other in zip(ours, samples, strict=True):
        assert (own["doc"], own["hash"], own["acc"]) == (other["doc_id"], other["doc_hash"][:16], other["acc"])
        for (log_likelihood, greedy), ((expected, likeliest),) in zip(own["answers"], other["resps"], strict=True):
            assert log_likelihood == pytest.approx(expected, abs=1e-4)
            assert greedy == likeliest
    counters = results["models"]["long"]["tasks"]["mmlu_anatomy"]
    assert counters["requests"] == 12
    assert counters["forward_tokens"] * 3 < counters["forward_tokens_unshared"]


def test_an_evaluation_that_was_stopped_goes_on(stu_dir, lds_dir, embedded_data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"

    def run(*models, **changes):
        settings = {"tasks": "embedded_bpb,embedded_cloze", "limit": 4, "output": output, "device": "cpu"}
        return evaluate(models, **(settings | changes))

    run_task = harness.run_task

    def stop(lm, task, limit):
        if task.spec.name in stopped:
            raise KeyboardInterrupt
        return run_task(lm, task, limit)

    stopped = ["embedded_bpb"]

    monkeypatch.setattr(harness, "run_task", stop)
    with pytest.raises(KeyboardInterrupt):
        run(stu_dir)
    stopped = ["embedded_cloze"]
    with pytest.raises(KeyboardInterrupt):
        run(stu_dir)
    monkeypatch.setattr(harness, "run_task", run_task)
    half = json.loads((output / "results.json").read_text())["models"]["stu"]["tasks"]
    assert list(half) == ["embedded_bpb"]
    capsys.readouterr()
    whole = run(stu_dir)["models"]["stu"]["tasks"]
    assert whole["embedded_bpb"] == half["embedded_bpb"]  # its seconds too: it was not run again
    assert "embedded_bpb  bits_per_byte" in capsys.readouterr().out

    monkeypatch.setattr(language_model, "load_source", lambda *_: pytest.fail("a model was loaded"))
    assert run(stu_dir)["models"]["stu"]["tasks"] == whole
    with pytest.raises(UserError, match=r"holds stu on embedded_bpb with other settings \(limit\)"):
        run(stu_dir, limit=5)
    model = load_model(lds_dir)
    shutil.rmtree(stu_dir)
    shutil.copytree(lds_dir, stu_dir)
    with pytest.raises(UserError, match=r"holds stu on embedded_bpb with other settings \(model\)"):
        run(stu_dir)
    assert model.config.lds_state_dim == 10


def in_processes(cache, directories, own_tasks, text, output):
    """Evaluate in one of several processes."""
    datasets.config.HF_DATASETS_CACHE = cache
    return evaluate(
        directories,
        "colours",
        include_path=own_tasks,
        texts=[text],
        text_length=40,
        output=output,
        device="cpu",
        progress=False,
    )


def test_processes_share_the_work_and_agree(stu_dir, lds_dir, own_tasks, documents, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(documents[0])
    arguments = datasets.config.HF_DATASETS_CACHE, [stu_dir, lds_dir], own_tasks, text
    alone = in_processes(*arguments, tmp_path / "alone")
    both = run_processes(2, in_processes, *arguments, tmp_path / "both")
    for results in both:
        assert results["settings"]["processes"] == 2
        for label in ("stu", "lds"):
            one, other = (r["models"][label] for r in (alone, results))
            assert one["texts"]["a.txt"]["loss"] == pytest.approx(other["texts"]["a.txt"]["loss"], abs=1e-5)
            one, other = one["tasks"]["colours"], other["tasks"]["colours"]
            for key in ("value", "requests", "forward_tokens", "forward_tokens_unshared", "config_hash"):
                assert one[key] == other[key]
    for label in ("stu", "lds"):
        path = f"items/{label}/colours.json"
        items = [json.loads((tmp_path / name / path).read_text())["items"] for name in ("alone", "both")]
        for one, other in zip(*items, strict=True):
            for (x, _), (y, _) in zip(one["answers"], other["answers"], strict=True):
                assert x == pytest.approx(y, abs=1e-4)


def test_two_models_are_compared_and_texts_drawn(stu_dir, own_tasks, documents, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(stu_dir, copy)
    (tmp_path / "a.txt").write_text(documents[0])
    output = tmp_path / "out"
    settings = {"tasks": "colours", "include_path": own_tasks, "texts": [tmp_path / "a.txt"], "progress": False}
    results = evaluate([stu_dir, copy], **settings, output=output, device="cpu")
    (pair,) = results["comparisons"]
    assert (pair["first"], pair["second"]) == ("stu", "copy")
    colours = pair["tasks"]["colours"]
    assert (colours["alike"], colours["items"], colours["p_value"]) == (9, 9, 1.0)
    assert colours["largest_log_likelihood_difference"] == 0.0
    assert {"a.by-position.png", "table.png", "table.csv"} <= {path.name for path in output.iterdir()}
    report = (output / "table.md").read_text()
    assert "copy minus stu, item by item" in report and "33 to 48" in report
    first, *rows = (output / "table.csv").read_text().splitlines()
    assert first.startswith("model,published,task,metric,shots,value,stderr,items") and len(rows) == 2


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    monkeypatch.setattr(language_model, "load_source", lambda *_: pytest.fail("a model was loaded"))


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
        (lambda directory: (directory / "config.json").write_text("{"), "config.json: not valid JSON"),
        (drop("model.safetensors"), "model.safetensors, a .safetensors file with weights, is missing"),
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
        (["--limit", "0"], "argument --limit: 0 is out of range; allowed: 1 to"),
        (["--limit", "-3"], "argument --limit: -3 is out of range; allowed: 1 to"),
        (["--batch-size", "0"], "argument --batch-size: 0 is out of range; allowed: 1 to"),
        (["--data-dir", "nowhere"], "argument --data-dir: nowhere does not exist"),
        (["--device", "tpu"], "--device is 'tpu'; allowed here: cpu"),
        (["--tasks", "paper,mmlu"], "task 'mmlu' is asked for twice"),
        (["--tasks", "piqa_"], "unknown task 'piqa_'; close matches: piqa"),
        (["--include-path", "nowhere"], "argument --include-path: nowhere does not exist"),
        (["--text", "nowhere.txt"], "argument --text: nowhere.txt does not exist"),
        (["--text", "config.json", "--text-length", "0"], "argument --text-length: 0 is out of range; allowed: 1 to"),
        (["--output", "config.json"], "argument --output: config.json exists and is not a directory"),
        (["--output", "."], "--output . exists and was not written by this program"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"batch_size": -2}, "batch_size is -2; it must be at least 1"),
        ({"texts": ["config.json"], "text_length": 0}, "text_length is 0; it must be at least 1"),
        ({"data_dir": "nowhere"}, "data_dir nowhere is not a directory"),
        ({"include_path": "config.json"}, "include_path config.json is not a directory"),
        ({"texts": ["nowhere.txt"]}, "texts nowhere.txt: no such file"),
        ({"texts": ["config.json", "./config.json"]}, "texts config.json: another file has the same name"),
        ({"tasks": ","}, "tasks names no task"),
        ({"device": "tpu"}, "device is 'tpu'; allowed here: cpu"),
        ({"output": "."}, "output . exists and was not written by this program"),
        ({"output": "config.json"}, "output config.json exists and is not a directory"),
        ({"model_dirs": []}, "model_dirs is empty"),
        ({"model_dirs": [".", "."]}, "model_dirs . is given twice"),
    ],
)
def test_messages_of_the_function_name_its_arguments(arguments, message, stu_dir, no_model_is_loaded, monkeypatch):
    monkeypatch.chdir(stu_dir)
    with pytest.raises(UserError) as caught:
        evaluate(**({"model_dirs": ["."]} | arguments))
    assert str(caught.value).startswith(message)


def test_options_are_named_for_arguments_at_the_beginning_of_a_message_only(capsys):
    def main(message: str) -> None:
        parser = ArgumentParser()
        parser.add_argument("--batch-size")
        parser.add_argument("--text", dest="texts")
        parser.parse_args([])
        raise UserError(message)

    for message, expected in [
        ("batch_size is 0", "--batch-size is 0"),
        ("texts a.txt: no such file", "--text a.txt: no such file"),
        ("no space left on device", "no space left on device"),
        ("texts: task 'a' failed", "texts: task 'a' failed"),  # a model of that name
    ]:
        assert run_cli(partial(main, message)) == 2
        assert capsys.readouterr().err == f"error: {expected}\n"


def scored(metric, value, stderr=None, shots=0, truncated=0, beyond=0):
    return {
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "shots": shots,
        "requests": 8,
        "truncated": truncated,
        "truncated_tokens": 5 * truncated,
        "beyond_trained_length": beyond,
    }


@pytest.fixture
def some_results():
    def model(accuracy, truncated, beyond):
        tasks = {
            "bits": scored("bits_per_byte", 1.23456),
            "mmlu": scored("acc", accuracy, 0.01, 5, truncated, beyond),
            "piqa": scored("acc", 0.75),
        }
        return {"trained_length": 65, "tasks": tasks}

    return {
        "settings": {"limit": 9, "tasks": [{"name": name} for name in ("bits", "mmlu", "piqa")]},
        "models": {"stu": model(0.25, 3, 0), "distilled": model(0.3, 0, 2)},
        "published": {"Theirs": {"mmlu": 26.5, "piqa": 65.34, "boolq": 60.0}},
    }


def test_table_shows_percent_errors_average_and_warnings(some_results):
    lines = format_table(some_results).splitlines()
    assert lines[:5] == [
        "| model              |   bits (bits_per_byte) |   mmlu 5-shot |   piqa |   average acc |",
        "|:-------------------|-----------------------:|--------------:|-------:|--------------:|",
        "| stu                |                 1.2346 |  25.00 ± 1.00 |  75.00 |         50.00 |",
        "| distilled          |                 1.2346 |  30.00 ± 1.00 |  75.00 |         52.50 |",
        "| Theirs (published) |                        |         26.50 |  65.34 |         45.92 |",
    ]
    assert "Only the first 9 items of each task were scored" in "\n".join(lines)
    assert "stu: 3 of 24 requests were longer than its 65 tokens and were cut from the left, by 15 tokens" in lines[-3]
    assert "distilled: 2 of 24 requests were longer than the 65 tokens it was trained on; its state read" in lines[-1]


def test_a_table_that_is_not_finished_has_gaps(some_results):
    del some_results["models"]["distilled"]["tasks"]["piqa"]
    row = format_table(some_results).splitlines()[3]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["distilled", "1.2346", "30.00 ± 1.00", "", ""]
    last = format_csv(some_results).splitlines()[-1].split(",")
    assert last[:4] == ["Theirs", "1", "piqa", "acc"] and last[5] == "0.6534"
