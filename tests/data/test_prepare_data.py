"""The command that prepares data, in one part and in several."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from flash_stu.data import DataConfig, prepare, tokenize
from flash_stu.errors import run_cli

CONFIG = """
output_dir: unused
model: {vocab_size: 257}
data: {dataset: DATASET, validation_fraction: 0.2, cache_dir: CACHE}
train: {sequence_length: 8, global_batch_size: 8, steps: 1}
"""


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
    spec = importlib.util.spec_from_file_location("prepare_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path, write_documents) -> DataConfig:
    for number in range(3):
        write_documents(tmp_path / "text" / f"{number}.jsonl", [f"document {number}.{i}" for i in range(50)])
    return DataConfig(dataset=str(tmp_path / "text"), validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def run(script, config, tmp_path, monkeypatch, capfd):
    """Run the command; gives its exit status, and its output and errors as lines."""
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("DATASET", config.dataset).replace("CACHE", config.cache_dir))

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--config", str(path), *arguments])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            status = run_cli(script.main)
        finally:
            signal.signal(signal.SIGTERM, handler)
        output, errors = capfd.readouterr()
        return status, output.splitlines(), errors.splitlines()

    return run


def refusal(run, *arguments) -> str:
    status, output, errors = run(*arguments)
    assert status == 2 and output == [] and len(errors) == 1
    return errors[0]


def test_training_finds_what_it_wrote(run, config, monkeypatch):
    status, output, errors = run()
    assert status == 0 and "MB/s" in errors[1] and "tokens/s" in errors[1]
    monkeypatch.setattr(tokenize.Part, "tokenize", None)
    data = prepare(config, progress=False)
    assert output[0].startswith(f"train: {len(data.train):,} tokens, {data.train.num_documents} documents, ")
    assert output[2] == str(data.directory)
    assert run() == (0, output, [])


def test_parts(run, config):
    assert run("--part", "2/3")[1] == ["part 2 of 3 is done; still to be finished: --part 1/3, 3/3"]
    assert run("--part", "1/3")[1] == ["part 1 of 3 is done; still to be finished: --part 3/3"]
    assert run("--part", "1/3")[1] == ["part 1 of 3 is done; still to be finished: --part 3/3"]
    entry = next(Path(config.cache_dir).glob(".*.unfinished"))
    expected = (
        f"error: data.dataset '{config.dataset}' is being prepared in 3 part(s), not {{}} (finished: 1, 2); "
        f"resume with scripts/prepare_data.py --part i/3, or delete {entry} to start again"
    )
    assert refusal(run) == expected.format(1)
    assert refusal(run, "--part", "4/4") == expected.format(4)
    with pytest.raises(ValueError, match="is being prepared in 3 part"):
        prepare(config, progress=False)
    status, output, errors = run("--part", "3/3")
    assert status == 0 and output[2] in errors[2]
    assert "3 shard(s)" in output[0]
    assert prepare(config).train.num_documents + prepare(config).validation.num_documents == 150


def test_impossible_parts(run, config):
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0", "-1/3"):
        assert refusal(run, f"--part={wrong}") == (
            f"error: --part is {wrong!r}; allowed: i/N with i from 1 to N, such as 1/4"
        )
    assert refusal(run, "--part", "1/4") == (
        f"error: data.dataset '{config.dataset}' cannot be divided into 4 parts: "
        "it has 3 file(s) or parquet row group(s)"
    )
    assert "1 file(s) or parquet row group(s); with data.max_documents each split is one" in refusal(
        run, "--part", "1/2", "data.max_documents=7"
    )


def test_one_process_has_the_whole_in_work(run, config, fork, monkeypatch):
    """Several parts of what one process has begun are refused too."""
    monkeypatch.setattr(tokenize, "_COMMIT_EVERY", 0)
    monkeypatch.setattr(tokenize, "_BATCH", 100)
    original = tokenize.Part._commit

    def commit_and_die(*args, **kwargs):
        original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(tokenize.Part, "_commit", commit_and_die)
    process = fork.Process(target=prepare, args=(config, False))
    process.start()
    process.join(60)
    message = refusal(run, "--part", "1/2")
    assert "in 1 part(s), not 2 (finished: none); resume with scripts/prepare_data.py, or delete" in message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(run, config, fork, monkeypatch, number):
    monkeypatch.setattr(tokenize, "_COMMIT_EVERY", 0)
    monkeypatch.setattr(tokenize, "_BATCH", 100)
    committed = fork.Event()
    original = tokenize.Part._commit

    def commit_and_wait(*args, **kwargs):
        original(*args, **kwargs)
        committed.set()
        time.sleep(60)

    def command():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        monkeypatch.setattr(tokenize.Part, "_commit", commit_and_wait)
        status, _, errors = run()
        assert errors[-1] == "stopped; the same command resumes here"
        os._exit(status)

    process = fork.Process(target=command)
    process.start()
    assert committed.wait(60)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 130
    status, output, errors = run()
    assert status == 0 and "MB are done" in errors[0]
    assert sum(int(line.split()[3]) for line in output[:2]) == 150


def test_overrides(run, config):
    status, output, _ = run("data.max_documents=20")
    assert status == 0
    counts = [int(line.split()[3]) for line in output[:2]]
    assert sum(counts) == 20
