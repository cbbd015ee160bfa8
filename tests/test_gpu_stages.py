"""The stages of a first hour on a GPU, in toy sizes: none of their scripts runs for the first time there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from flash_stu.errors import run_cli
from flash_stu.ops.conv import choice

ROOT = Path(__file__).parents[1]
HIDE = """
import sys
class Hidden:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest): return None if name.split(".")[0] in {} else self.finder.find_spec(name, *rest)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Hidden(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def gpu():
    """The module scripts/gpu.py."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import gpu

    yield gpu
    sys.path.remove(str(ROOT / "scripts"))
    del sys.modules["gpu"]


@pytest.fixture
def bare(tmp_path):
    """Make the environment of a GPU image without packages that GPU stages do not need, nor some that they do."""
    (tmp_path / "site").mkdir()

    def make(*more):
        (tmp_path / "site" / "sitecustomize.py").write_text(
            HIDE.replace("{}", repr(("datasets", "lm_eval", "wandb", *more)))
        )
        return {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    return make


def run_script(environment, *words):
    command = [sys.executable, ROOT / "scripts/gpu.py", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_stages_run_from_a_checkout_on_a_bare_image(bare, tmp_path):
    stages = ["ceilings", "tests", *(["sweep"] if importlib.util.find_spec("triton") else [])]
    result = run_script(bare(), "--toy", "--output", tmp_path / "out", *stages)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "out/stages.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == stages and not any(row["status"] for row in rows)
    assert json.loads((tmp_path / "out/ceilings.json").read_text())["rows"]


def test_what_is_missing_is_one_line(bare):
    result = run_script(bare("pydantic", "tabulate"), "bench")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "lacks pydantic, tabulate; pip install pydantic tabulate" in result.stderr


def test_without_a_gpu_or_data_nothing_runs(bare):
    for words, said in {("bench",): "no CUDA GPU", ("--toy", "train"): "--data is None", ("nope",): "nope"}.items():
        result = run_script(bare(), *words)
        assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_stage_that_fails_or_takes_too_long_takes_no_other_with_it(gpu, tmp_path, monkeypatch, capsys):
    slow = gpu.Stage("-m this", "", "", minutes=0.002, output=False)
    stages = {
        "fails": slow._replace(script="-m nonsense", minutes=1),
        "slow": slow._replace(script="-m pydoc", toy="-p 0"),
    }
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "GROUPS", {"train": {}, "both": stages})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "both", "--output", str(tmp_path)])
    assert gpu.main() == 1
    fails, slow = json.loads((tmp_path / "stages.json").read_text())["rows"]
    assert "No module named nonsense" in fails["last"] and "stopped after" in slow["last"]


IN_PROCESS = ("agreement", "conv", "layers", "loss", "training", "hotspots", "generation", "lds")


@pytest.fixture
def run_stage(gpu, scripts, monkeypatch, capsys, tmp_path):
    """Run a stage's script in this process, in toy size: its status, output and errors."""

    def run(name, *more, data=None):
        words, _ = gpu.command(name, True, str(tmp_path / "out"), data)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [*words[1:], *map(str, more)])
        return run_cli(scripts[Path(words[1]).stem].main), *capsys.readouterr()

    return run


def test_no_stage_is_left_out(gpu):
    tested = {*IN_PROCESS, "ceilings", "tests", "sweep", "text", "resume", "ways"}
    assert set(gpu.STAGES) == tested | {"tables"}


@pytest.fixture
def small(scripts, monkeypatch):
    """The agreement's model, smaller."""
    for name, value in {"BATCH": 1, "LENGTH": 128, "GENERATED": 12, "STEPS": 2}.items():
        monkeypatch.setattr(scripts["agreement"], name, value)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_toy_stages(run_stage, small, scripts, tmp_path, monkeypatch, name):
    monkeypatch.setattr(scripts["loss"], "OTHERS", ["chunked", "liger"])  # a process each; the latter fails
    status, printed, error = run_stage(name)
    assert status == 0, printed + error
    assert list((tmp_path / "out").glob("*.json")) and list((tmp_path / "out").glob("*.png"))
    assert name != "loss" or "loss back end 'liger' is not available" in printed


def test_compiled_steps_and_generation(run_stage, small, scripts, monkeypatch):
    """As traced, without C++; the forward passes have a test of their own."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **named: compile(*args, **{**named, "backend": "aot_eager"}))
    monkeypatch.setattr(scripts["agreement"], "UNITS", {"float32": 2.0**-22})
    monkeypatch.setattr(scripts["agreement"], "forward_and_backward", lambda device: iter(()))
    status, printed, error = run_stage("agreement", "--compile")
    assert status == 0 and printed.count(", compiled") == 3, printed + error


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_agreement_finds_faults(run_stage, small, scripts, monkeypatch, fault):
    def faulty(x, filters):
        if fault == "broken":
            raise torch.OutOfMemoryError("tried to allocate")
        return choice.direct_conv(x, filters * (1 + 1e-4))

    monkeypatch.setitem(choice._ANY_FILTER, "fft", faulty)
    monkeypatch.setattr(scripts["agreement"], "UNITS", {"float32": 2.0**-22})
    status, printed, _ = run_stage("agreement")
    rows = [line for line in printed.splitlines() if re.match(r"\| model .* fft ", line)]
    said = {"wrong": "OUT OF BOUND", "broken": "failed: out of memory"}[fault]
    assert status == 1 and rows and all(said in row for row in rows)


def test_variants_survive_each_other(scripts):
    conv, measuring = scripts["conv"], scripts["measuring"]
    args = Namespace(batch=1, channels=2, repeats=1, seconds=1, direct_up_to=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choice._ANY_FILTER, "fft", lambda *_: torch.empty(2**60))
        rows = conv.compare(24, args, torch.device("cpu"), torch.float32)
    failed = {row["variant"]: row["failed"] for row in rows if "failed" in row}
    assert failed == {"one full-length FFT": "out of memory", "polyphase FFT": "out of memory"}
    assert {row["variant"] for row in rows} > set(failed)
    assert measuring.attempt(lambda: 1) == (1, None)


@pytest.fixture
def text_folder(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} of a few words\n" * 20)
    return tmp_path / "text"


def test_training_on_text_is_stopped_killed_and_resumed(run_stage, text_folder, tmp_path):
    status, printed, error = run_stage("text", data=text_folder)
    assert status == 0, printed + error
    (row,) = json.loads((tmp_path / "out/gputraining-train.json").read_text())["rows"]
    assert row["steps"] > 2 and row["losses"][-1][1] < row["losses"][0][1]
    status, printed, error = run_stage("resume", data=text_folder)
    resumed = json.loads((tmp_path / "out/gputraining-resume.json").read_text())["resumed"]
    assert status == 0 and 0 < resumed["after"] < resumed["killed_at"] and resumed["difference"] == 0, printed + error


def test_a_few_steps_under_torchrun(run_stage, text_folder, tmp_path):
    status, printed, error = run_stage("ways", "--steps", 4, "--ways", "FSDP", data=text_folder)
    assert status == 0 and "FSDP" in printed, printed + error


def test_every_way_is_a_config(scripts):
    training = scripts["gputraining"]
    from flash_stu.training import load_config

    for _, settings in training.WAYS.values():
        for config, sizes in (("flash_stu_340m", training.FULL), ("quickstart", training.TOY)):
            load_config(ROOT / f"configs/{config}.yaml", [*sizes, "train.steps=1000000", *settings])


def test_tests_that_want_a_gpu_say_so_in_their_names():
    """`gpu.py check` selects them by it."""
    pattern = re.compile(r"skipif\(not torch\.cuda\.is_available\(\)[^\n]*\n(?:@[^\n]*\n)*def (\w+)")
    names = [name for path in (ROOT / "tests").rglob("test_*.py") for name in pattern.findall(path.read_text())]
    assert names and all("gpu" in name for name in names), names
