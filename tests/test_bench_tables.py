"""Tables of benchmarks and experiments: scripts render what they leave in a file; tables.py keeps docs/ like it."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from flash_stu.errors import UserError, run_cli
from flash_stu.files import write_text
from flash_stu.results import environment, finish

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "scripts" / name for name in ("bench", "experiments")]
PATHS = [path for folder in FOLDERS for path in folder.glob("*.py")]
EXPERIMENTS = sorted(path.stem for path in FOLDERS[1].glob("*.py") if "\ndef render(" in path.read_text())
NEEDS = {"robotics": "mujoco", "forecasting": "statsmodels"}
CPU = torch.device("cpu")
PLACES = {"cpu/loss": "old", "gpu/loss": "not yet"}


def test_scripts_have_names_of_their_own():
    """An import of a script by another means one file, wherever it is resolved from."""
    others = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("*/__init__.py")]
    taken = [path.parent.name if path.stem == "__init__" else path.stem for path in [*others, *PATHS]]
    assert not {path.stem for path in PATHS if taken.count(path.stem) > 1}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_and_leaves_its_results(scripts, name, tmp_path, monkeypatch, capsys):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", f"--output={tmp_path}"])
    status = run_cli(scripts[name].main)
    printed, error = capsys.readouterr()
    assert status == 0, error
    (path,) = tmp_path.glob(f"{name}*.json")
    results = json.loads(path.read_text())
    assert results["size"] == "quick" and scripts[name].render(results) in printed
    assert path.with_suffix(".png").stat().st_size > 1000
    check_tables(printed)


def check_tables(text):
    """A text has tables, with as many cells in every row."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


@pytest.fixture(scope="module")
def results(scripts):
    """Small results of every benchmark: measured where that takes no time, else made up."""
    conv, layers, lds, fits = (scripts[name] for name in ("conv", "layers", "lds", "fits"))
    timing = {"repeats": 2, "seconds": 5}
    shape = Namespace(batch=2, channels=3, direct_up_to=24, width=16, lengths=[24, 30], **timing)
    built = layers.build(shape, CPU)
    bank = fits.FilterBank(fits.compute_filters(64, 4, "hankel")[1])
    tiny_lds = Namespace(hidden_size=4, state_dim=8, length=32, loop_tokens=4, **timing)
    training = {"curve": [[20, 3.0], [40, 2.5]], "validation": 2.75}
    part = {"part": "STU layers", "of": None, "seconds": [0.02, 0.03]}
    variant = {"variant": "PyTorch alone", "seconds": [0.1, 0.2], "product_rates": [1e11, 2e11]}
    failed = {"failed": "out of memory"}
    fine = {"differences": {"logits": 1e-7}, "bounds": {"logits": 1e-6}, "within": True}
    lengths = {"curve": [[0, 0.0], [3, 0.1]], "seconds": [[3, [0.1, 0.2]]], "rates": [[3, [20.0, 30.0]]]}
    made = {
        "conv": {
            "rates": {"flops": 1e11, "bytes": 1e10},
            "batch": 2, "channels": 3, "dtype": "float32",
            "rows": [row for n in shape.lengths for row in conv.compare(n, shape, CPU, torch.float32)]
            + [{"variant": name, "length": 36, **failed} for name in ("chunked", conv.TWO_BRANCH)],
        },
        "layers": {
            "batch": 2, "width": 16, "dtype": "float32",
            "rows": [row for n in shape.lengths for row in layers.compare(n, shape, CPU, torch.float32, *built)]
            + [{"layer": "MLP", "length": 36, **failed}],
        },
        "hotspots": {
            "config": "configs/a.yaml", "dtype": "float32", "tokens": 64, "milliseconds": 5.0,
            "rows": [{"operation": "aten::mm", "ms": 4.0, "calls": 3.0}],
        },
        "training": {
            "rows": [{
                "config": "configs/a.yaml", "dtype": "float32", "parameters": 10, "tokens": 64, "shape": (2, 16),
                "micro_batches": 2, "train_flops": 1e6, "forward_flops": 1e5, "peak_flops": 1e12,
                "variants": [first, *(variant | {"peak_memory_gib": memory} for memory in (None, 1.5))],
                "parts": [part, part | {"part": "convolution", "of": "STU layers"}],
            } for first in (variant | {"peak_memory_gib": None}, {"variant": "two-branch", **failed})],
        },
        "generation": {
            "shape": "quickstart", "dtype": "float32", "batch": 1, "bandwidth": 1e10, "lengths": [3],
            "rows": [
                {"panel": panel, "label": label, "limit": 90.0, **lengths}
                for panel in ("layer", "hybrid") for label in ("naive", "attention")
            ],
        },
        "fits": {
            "length": 64, "filters": 4, "basis": "hankel", "filter_seconds": [0.01], "fit_seconds": [0.2, 0.1],
            "recurrence_error": None, "floors": dict.fromkeys(fits.DTYPES, 1e-6),
            "rows": [dict.fromkeys((*fits.METHODS, "bound", "run_time_error", "max_coefficient", "lambda_max_h"), 1e-9)
                     | {"state_dim": states} for states in (8, 16)],
            "smallest": [fits.smallest(bank, tolerance) for tolerance in (1e-2, 1e-30)],
        },
        "lds": {**vars(tiny_lds), **lds.measure(tiny_lds, CPU)},
        "loss": {
            "hidden": 8, "vocabulary": 64,
            "rows": [{"variant": name, "tokens": 4, "seconds": [0.1], "bytes": 2**20, "loss": 1.0, **more}
                     for name, more in {"plain": {}, "chunked": {"differences": [0.0, 1e-7, 1e-7]}}.items()]
            + [{"variant": "liger", "tokens": 4, **failed}],
        },
        "optimizers": {
            "steps": 40, "sweep_steps": 20,
            "rows": [{"optimizer": name, "sweep": [[1e-3, 3.0], [1e-2, 2.9]], "best": 1e-2, **training}
                     for name in ("adamw", "muon")],
        },
        "agreement": {
            "rows": [
                {"what": "model", "dtype": "float32", "backends": backends, **more}
                for backends, more in (
                    ({"conv_backend": "fft", "attention_backend": "sdpa", "loss_backend": "liger"}, fine),
                    ({}, fine | {"within": False}), ({}, {"failed": "out of memory", "within": False}),
                    ({}, {"unavailable": "it needs a GPU"}),
                )
            ],
        },
        "ceilings": {
            "rows": [{"dtype": "bfloat16", "flops": 8e14, "bytes": 3e12, "peak": 1e15},
                     {"dtype": "float32", "flops": 8e14, "bytes": 3e12, "peak": None}, {"dtype": "a", **failed}],
        },
        "convsweep": {
            "batch": 2, "channels": 3, "left_out": 1,
            "rows": [{"settings": {"_CHANNELS": 32}, "length": 24, "forward": [0.1], "total": [0.2]},
                     {"settings": {"_CHANNELS": 64}, "length": 24, **failed}],
        },
        "gputraining": {
            "config": "configs/a.yaml", "toy": False, "data": "text",
            "resumed": {"after": 4, "killed_at": 6, "difference": 0.0},
            "rows": [{"what": "FSDP", "processes": 1, "steps": 2, "tokens_per_second": 1e5, "mfu": mfu,
                      "memory_gib": 1.5, "losses": [[1, 3.0], [2, None]]} for mfu in (None, 0.3)]
            + [{"what": "DDP", "processes": 1, "steps": 0, **failed}],
        },
        "estimates": {
            "rows": [{"config": "configs/a.yaml", "tokens": 64, "table": [["estimate, ms", "H100"], ["step", "3.0"]],
                      "parts": {"H100": dict.fromkeys(scripts["estimates"].PARTS, 1e-3)}}],
        },
        "context": {
            "rows": [{"length": 64, "processes": 2, "pieces": pieces, "tokens_per_second": 1e3, "peak_bytes": 2**30,
                      "sent_bytes": 1e3, "modelled_bytes": 1e3} for pieces in (1, 4)],
            "estimates": [{"ranks": 8, "sent_bytes": 1e6, "exchange_seconds": 1e-3, "product_seconds": 0.5}],
        },
        "imports": {"rows": [{"what": "import a", "seconds": [[0.2, 0.1], [0.3, 0.1]]}]},
        "data": {
            "tiktoken": "0", "tokenizer": "tiktoken:a", "cores": 2, "text": "embedded", "documents": 3,
            "megabytes": 1.0, "tokens": 1000, "bare": [0.1, 0.2], "whole": [0.2, 0.3], "tokens_read": 500,
            "loaders": [{"loader": "read by the caller", "seconds": [0.1]}],
        },
    }  # fmt: skip
    return {name: {"environment": environment(CPU), **own} for name, own in made.items()}


def test_every_benchmark_has_a_table_here(scripts, results):
    assert set(scripts["tables"].renderers()) == {name for name, script in scripts.items() if hasattr(script, "render")}
    assert set(scripts["tables"].renderers()) == {*results, *EXPERIMENTS}


def test_tables_and_pictures_of_what_is_left_in_a_file(scripts, results, tmp_path, capsys):
    for name, own in results.items():
        script = scripts[name]
        finish(f"{name}-x", own, script.render, script.plot, str(tmp_path))
        printed = capsys.readouterr().out
        assert script.render(json.loads((tmp_path / f"{name}-x.json").read_text())) in printed
        assert (own["environment"]["torch"] in printed or name == "estimates") and (
            tmp_path / f"{name}-x.png"
        ).stat().st_size > 1000
        check_tables(printed)


def test_figures_of_a_table(scripts, results):
    assert "| STU layers: convolution" in scripts["training"].render(results["training"])
    row = next(line for line in scripts["lds"].render(results["lds"]).splitlines() if line.startswith("| step "))
    assert row.endswith("1.0x |")
    generation = scripts["generation"].render(results["generation"])
    assert re.search(r" 25.0 \(20.0-30.0\) \| +90 \| +28% \|", generation)
    assert re.search(r"fewest states, float32 \|\s+\d+ \|\s+- \|", scripts["fits"].render(results["fits"]))


@pytest.fixture
def tables_page(scripts, results, tmp_path, monkeypatch, capsys):
    """A page with two places and the results of one: runs tables.py, which says its status, output and errors."""
    write_text(tmp_path / "results/cpu/loss.json", json.dumps(results["loss"]))
    places = (
        "<!-- results: cpu/loss -->\nold\n<!-- end -->\n\nbetween\n\n<!-- results: gpu/loss -->\nnot yet\n<!-- end -->"
    )
    path = tmp_path / "page.md"
    path.write_text(f"before\n\n{places}\n\nafter\n")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tables.py", f"--results={tmp_path / 'results'}", f"--page={path}", *words])
        return run_cli(scripts["tables"].main), *capsys.readouterr()

    run.path = path
    return run


def test_places_are_filled_once_and_checked(tables_page, scripts, results):
    before = tables_page.path.read_text()
    assert tables_page("--check")[0] == 1 and tables_page.path.read_text() == before
    status, printed, _ = tables_page()
    filled = tables_page.path.read_text()
    assert status == 0 and "gpu/loss: no results" in printed
    assert filled == before.replace("old", "\n" + scripts["loss"].render(results["loss"]) + "\n")
    assert tables_page()[0] == tables_page("--check")[0] == 0 and tables_page.path.read_text() == filled
    tables_page.path.write_text(filled.replace("1.0e-07", "1.0e-08", 1))
    assert tables_page("--check")[0] == 1


def test_a_page_is_taken_as_it_is(tables_page):
    page = tables_page.path.parent / "results/gpu/loss.md"
    page.parent.mkdir()
    page.write_text("a page\n")
    assert tables_page()[0] == 0
    assert "<!-- results: gpu/loss -->\n\na page\n\n<!-- end -->" in tables_page.path.read_text()


def test_bad_places_are_one_line(tables_page):
    good = tables_page.path.read_text()
    for bad, said in {
        good.replace("gpu/loss", "gpu/lss"): "error: 'gpu/lss' names no benchmark",
        good.replace("<!-- end -->", "", 1): "error: a line that begins with '<!-- results: '",
    }.items():
        tables_page.path.write_text(bad)
        status, _, error = tables_page()
        assert status == 2 and error.startswith(said) and error.count("\n") == 1
        assert tables_page.path.read_text() == bad


@pytest.mark.parametrize("page", ["results", "experiments"])
def test_the_page_has_the_results(scripts, page):
    if not (ROOT / "results").is_dir():
        pytest.skip("there is no results/: make bench-cpu, bench-gpu or experiments leaves it")
    text = (ROOT / "docs" / f"{page}.md").read_text()
    try:
        filled, _ = scripts["tables"].fill(text, ROOT / "results")
    except UserError as error:
        pytest.fail(str(error))
    assert filled == text, f"docs/{page}.md and results/ disagree: run scripts/bench/tables.py"
