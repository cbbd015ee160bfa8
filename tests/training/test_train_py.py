"""The command line: bad input, --dry-run, and the plot of a run."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

from flash_stu import UserError
from flash_stu.training import load_config
from flash_stu.training.run_size import describe

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run train.py's command line in this process; returns exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def plot_run():
    """scripts/plot_run.py as a module."""
    spec = importlib.util.spec_from_file_location("plot_run", REPOSITORY / "scripts" / "plot_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bad_input_is_exit_code_2_and_one_line(train_py, config_file, settings):
    run = train_py("--config", config_file, "train.global_batch_size=97")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: train.global_batch_size is 97")
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.dataset=/nowhere/*.txt", "/nowhere"),
        ("data.tokenizer=/nowhere", "/nowhere"),
        ("model.vocab_size=100", "model.vocab_size is 100"),
        ("model.conv_backend=flashfftconv", "flashfftconv"),
        ("model.attention_backend=flash_attn", "flash_attn"),
        ("train.sequence_length=25", "longer than the filters"),
        ("output_dir=/proc/nowhere", "output_dir /proc/nowhere cannot be written"),
    ],
)
def test_nothing_is_written_for_a_run_that_cannot_start(command, config_file, settings, override, words):
    code, _, stderr = command("--config", config_file, override)
    assert code == 2
    lines = [line for line in stderr.splitlines() if not line.startswith("token")]  # of preparing the data
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not Path(settings["output_dir"]).exists()


def test_dry_run_describes_and_touches_nothing(command, config_file, settings, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, stdout, stderr = command("--config", config_file, "--dry-run", "optimizer.learning_rate=0.02")
    assert (code, stderr) == (0, "")
    config, summary, times = stdout.split("\n\n")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config)
    assert load_config(resolved).optimizer.learning_rate == 0.02
    resolved.unlink()
    # embedding 264 x 16; two blocks of MLP 3 x 16 x 24 and norms; STU 16 x 16 + 4 x 16; attention 4 x 16 x 16
    parameters = 264 * 16 + 2 * (3 * 16 * 24 + 2 * 16) + 16 * 16 + 4 * 16 + 4 * 16 * 16 + 16
    assert f"{parameters:,} " in summary
    assert "6 steps, 576 tokens" in summary
    assert "96 tokens = 4 sequences of 24 = 1 processes x 2 sequences x 2 accumulated" in summary
    assert "GiB per GPU" in summary
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path(settings["output_dir"]).exists()


def test_dry_run_of_the_largest_config_allocates_nothing():
    summary = describe(load_config(REPOSITORY / "configs" / "flash_stu_2.6b.yaml"), processes=8)
    assert "2,669" in summary
    assert "8 processes x 1 sequences x 8 accumulated" in summary
    memory = float(summary.split("memory estimate")[1].split()[0])
    states = 2.6695e9 * 16 / 8 / 2**30
    assert states < memory < 80


def test_plot(plot_run, tmp_path, load):
    for name, offset in [("one", 0.0), ("two", 0.5)]:
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(load().to_yaml())
        records = [{"step": 0, "validation_loss": 5.5, "validation_bits_per_byte": 8.0}]
        for step in range(1, 41):
            records.append({"step": step, "loss": 5.5 / step**0.3 + offset})
            if step % 10 == 0:
                records.append({"step": step, "validation_loss": 5.6 / step**0.3 + offset})
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    training, validation = plot_run.read_losses(tmp_path / "one")
    assert training[0] == (96, 5.5) and len(training) == 40
    assert [tokens for tokens, _ in validation] == [0, 960, 1920, 2880, 3840]
    image = plot_run.plot_runs([tmp_path / "one", tmp_path / "two"], tmp_path / "plots" / "loss.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="format"):
        plot_run.plot_runs([tmp_path / "one"], tmp_path / "loss.xyz")
    with pytest.raises(UserError, match="not a run directory"):
        plot_run.plot_runs([tmp_path], tmp_path / "loss.png")


def test_smoothing_keeps_a_constant_and_follows_a_step(plot_run):
    points = [(x, 2.0) for x in range(200)] + [(x, 1.0) for x in range(200, 400)]
    smoothed = plot_run.smooth(points)
    assert smoothed[100] == (100, pytest.approx(2.0))
    assert smoothed[-1] == (399, pytest.approx(1.0, abs=1e-6))
