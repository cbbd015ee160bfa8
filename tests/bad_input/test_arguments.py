"""Command lines: every entry point refuses bad arguments by name, before it does or writes anything."""

import os

import pytest

NUMBERS = ["nan", "inf", "-inf", "-1", "1e300", "", "one", "9" * 5000, "0x10", "1,5"]
LONG = "x" * 256
PLACES = ["", LONG, "a\tb", "taken", "taken/below", "/dev/null", "/dev/null/x"]  # taken: a file
MISSING = ["", LONG, "absent", "/dev/null/x", "folder", "a\nb"]  # where a file is wanted
NOT_FOLDERS = ["", LONG, "absent", "/dev/null", "taken"]

# script, arguments that are good, the bad argument, its values
TABLE = [
    ("train.py", [], "--config", MISSING),
    ("scripts/prepare_data.py", [], "--config", MISSING),
    (
        "scripts/prepare_data.py",
        ["--config", "taken"],
        "--part",
        ["", "0/1", "2/1", "1/0", "-1/2", "1", "a/b", "1/1e9"],
    ),
    ("distill.py", ["--checkpoint", "folder"], "--output", PLACES),
    ("distill.py", ["--output", "out"], "--checkpoint", ["", LONG, "absent", "taken", "/dev/null", "folder"]),
    ("distill.py", ["--checkpoint", "folder", "--output", "out"], "--state-dim", [*NUMBERS, "0", "1", "1e9", "1025"]),
    ("distill.py", ["--checkpoint", "folder", "--output", "out"], "--tolerance", [*NUMBERS, "0", "2"]),
    ("distill.py", ["--checkpoint", "folder", "--output", "out"], "--verify", NUMBERS),
    ("distill.py", ["--checkpoint", "folder", "--output", "out"], "--method", ["", "sgd"]),
    ("distill.py", ["--checkpoint", "folder", "--output", "out"], "--dtype", ["", "float16", "int8"]),
    ("evaluate.py", ["--model", "folder"], "--output", PLACES),
    ("evaluate.py", [], "--model", ["", LONG, "absent", "taken", "/dev/null", "folder"]),
    ("evaluate.py", ["--model", "folder"], "--limit", [*NUMBERS, "0", "1.5"]),
    ("evaluate.py", ["--model", "folder"], "--batch-size", [*NUMBERS, "0"]),
    ("evaluate.py", ["--model", "folder"], "--text-length", [*NUMBERS, "0"]),
    ("evaluate.py", ["--model", "folder"], "--text", MISSING),
    ("evaluate.py", ["--model", "folder"], "--text-column", ["", LONG]),
    ("evaluate.py", ["--model", "folder"], "--data-dir", NOT_FOLDERS),
    ("evaluate.py", ["--model", "folder"], "--include-path", NOT_FOLDERS),
    ("evaluate.py", ["--model", "folder"], "--tasks", ["", ",", "absent.yaml", "mmlu,mmlu", "passkey", "copy_0"]),
    ("scripts/generate.py", ["--prompt", "a"], "--model", ["", LONG, "absent", "taken", "/dev/null", "folder"]),
    ("scripts/generate.py", ["--model", "folder", "--prompt", "a"], "--max-new-tokens", [*NUMBERS, "0"]),
    ("scripts/generate.py", ["--model", "folder", "--prompt", "a"], "--temperature", NUMBERS),
    ("scripts/generate.py", ["--model", "folder", "--prompt", "a"], "--top-k", [*NUMBERS, "0"]),
    ("scripts/generate.py", ["--model", "folder", "--prompt", "a"], "--top-p", [*NUMBERS, "0", "2"]),
    ("scripts/generate.py", ["--model", "folder", "--prompt", "a"], "--min-p", [*NUMBERS, "2"]),
    ("scripts/generate.py", ["--model", "folder", "--prompt", "a"], "--repetition-penalty", [*NUMBERS, "0"]),
    ("scripts/generate.py", ["--model", "folder", "--prompt", "a"], "--seed", [*NUMBERS, str(2**70)]),
    ("scripts/generate.py", ["--model", "folder", "--prompt", "a"], "--device", ["", "tpu", "cuda:99", "cpu:0", "-1"]),
    ("scripts/generate.py", ["--model", "folder", "--prompt", "a"], "--dtype", ["", "int8"]),
    ("scripts/generate.py", ["--model", "folder"], "--prompt-file", MISSING),
    ("scripts/export.py", ["--output", "out"], "--run", NOT_FOLDERS),
    ("scripts/export.py", ["--run", "folder"], "--output", PLACES),
    ("scripts/export.py", ["--run", "folder", "--output", "out"], "--step", [*NUMBERS, "0"]),
    ("scripts/convert_checkpoint.py", ["--config", "taken", "--output", "out"], "--checkpoint", MISSING),
    ("scripts/convert_checkpoint.py", ["--checkpoint", "taken", "--output", "out"], "--config", MISSING),
    ("scripts/convert_checkpoint.py", ["--checkpoint", "taken", "--config", "taken"], "--output", PLACES),
    (
        "scripts/convert_checkpoint.py",
        ["--checkpoint", "taken", "--config", "taken", "--output", "out"],
        "--filters",
        MISSING,
    ),
    (
        "scripts/convert_checkpoint.py",
        ["--checkpoint", "taken", "--config", "taken", "--output", "out"],
        "--positions",
        ["", "nope"],
    ),
    ("scripts/fetch_eval_data.py", [], "--output", PLACES),
    ("scripts/fetch_eval_data.py", ["--output", "out"], "--include-path", NOT_FOLDERS),
    ("scripts/fetch_eval_data.py", ["--output", "out"], "--tasks", ["", ",", "absent.yaml"]),
    ("scripts/plot_run.py", ["folder"], "--output", ["", LONG, "folder", "taken/below", "/dev/null/x"]),
    ("scripts/identify.py", ["--inputs", "u", "--outputs", "y", "--output", "out"], "--data", MISSING),
    ("scripts/identify.py", ["--data", "taken", "--inputs", "u", "--outputs", "y"], "--output", PLACES),
    (
        "scripts/identify.py",
        ["--data", "taken", "--outputs", "y", "--output", "out"],
        "--inputs",
        ["", ",", "u,", "u,u", "a\tb"],
    ),
    (
        "scripts/identify.py",
        ["--data", "taken", "--inputs", "u", "--output", "out"],
        "--outputs",
        ["", ",", "y,,z", "y,y"],
    ),
    (
        "scripts/identify.py",
        ["--data", "taken", "--inputs", "u", "--outputs", "y", "--output", "out"],
        "--max-states",
        [*NUMBERS, "0", "4097"],
    ),
    (
        "scripts/identify.py",
        ["--data", "taken", "--inputs", "u", "--outputs", "y", "--output", "out"],
        "--method",
        ["", "adam"],
    ),
    ("scripts/quickstart.py", [], "--config", ["", LONG, "absent.yaml", "a\nb", "/dev/zero"]),
]
BENCHMARKS = {
    "agreement": {"--output": PLACES},
    "ceilings": {"--repeats": [*NUMBERS, "0"], "--output": PLACES},
    "context": {
        **dict.fromkeys(("--lengths", "--processes", "--piece", "--repeats", "--long"), [*NUMBERS, "0"]),
        **{"--output": PLACES},
    },
    "convsweep": {
        **dict.fromkeys(("--lengths", "--channels", "--batch", "--repeats"), [*NUMBERS, "0"]),
        **{"--minutes": NUMBERS, "--output": PLACES},
    },
    "conv": {
        **dict.fromkeys(("--lengths", "--channels", "--batch", "--repeats"), [*NUMBERS, "0"]),
        **{"--seconds": NUMBERS, "--direct-up-to": NUMBERS, "--dtype": ["int8"], "--output": PLACES},
    },
    "data": {
        "--megabytes": [*NUMBERS, "0"],
        "--repeats": [*NUMBERS, "0"],
        "--tokenizer": ["", "bytes"],
        "--output": PLACES,
    },
    "imports": {"--repeats": [*NUMBERS, "0"], "--output": PLACES},
    "estimates": {"--config": MISSING, "--output": PLACES},
    "fits": {
        "--length": [*NUMBERS, "0"],
        "--filters": [*NUMBERS, "0"],
        "--repeats": [*NUMBERS, "0"],
        "--output": PLACES,
    },
    "generation": {
        **dict.fromkeys(("--lengths", "--state-dims", "--batch", "--repeats", "--long"), [*NUMBERS, "0"]),
        **{"--config": MISSING, "--panels": ["nope"], "--device": ["tpu"], "--output": PLACES},
    },
    "hotspots": {"--config": MISSING, "--steps": [*NUMBERS, "0"], "--output": PLACES},
    "layers": {
        **dict.fromkeys(("--lengths", "--width", "--batch", "--repeats"), [*NUMBERS, "0"]),
        **{"--seconds": NUMBERS, "--output": PLACES},
    },
    "lds": {
        **dict.fromkeys(("--hidden-size", "--state-dim", "--length", "--loop-tokens", "--repeats"), [*NUMBERS, "0"]),
        **{"--seconds": NUMBERS, "--output": PLACES},
    },
    "loss": {
        **dict.fromkeys(("--tokens", "--chunked-tokens", "--hidden", "--vocabulary", "--repeats"), [*NUMBERS, "0"]),
        **{"--variant": ["nope"], "--dtype": ["int8"], "--output": PLACES},
    },
    "optimizers": {
        **dict.fromkeys(("--steps", "--sweep-steps", "--rates"), [*NUMBERS, "0"]),
        **{"--runs": PLACES, "--output": PLACES},
    },
    "tables": {"--results": NOT_FOLDERS, "--page": MISSING},
    "training": {"--config": MISSING, "--repeats": [*NUMBERS, "0"], "--output": PLACES},
}
EXPERIMENTS: dict[str, dict[str, list]] = {
    **{
        name: {"--output": PLACES}
        for name in (
            "forecasting",
            "futurefill",
            "identification",
            "length_generalisation",
            "marginal_lds",
            "recall",
            "theorem_1",
        )
    },
    "loss_landscape": {
        "--model": ["", LONG, "absent", "taken", "/dev/null", "folder"],
        **{"--text": MISSING, "--runs": PLACES, "--output": PLACES},
    },
    "long_context": {"--runs": PLACES, "--output": PLACES},
    "lra": {
        **{"--runs": PLACES, "--output": PLACES, "--config": MISSING, "--task": ["", "nope"], "--model": ["", "gru"]},
        **{"--seeds": [*NUMBERS, "0"], "--processes": [*NUMBERS, "0"], "--data-dir": NOT_FOLDERS},
    },
    "robotics": {
        **{"--output": PLACES, "--data": PLACES, "--env": ["", "humanoid"]},
        **dict.fromkeys(("--seeds", "--trajectories"), [*NUMBERS, "0"]),
    },
    "text": {
        **{"--runs": PLACES, "--output": PLACES, "--steps": [*NUMBERS, "0"], "--bpe": [*NUMBERS, "319"]},
        "--name": ["", LONG, "a/b", "../a", "a b"],
    },
}
_TRAIN = ["train", "--data", "folder"]
TABLE += [
    ("scripts/gpu.py", ["--toy", "train"], "--data", ["", "absent"]),
    ("scripts/bench/gputraining.py", ["train"], "--data", NOT_FOLDERS),
    ("scripts/bench/gputraining.py", _TRAIN, "--minutes", NUMBERS),
    ("scripts/bench/gputraining.py", _TRAIN, "--steps", [*NUMBERS, "2"]),
    ("scripts/bench/gputraining.py", _TRAIN, "--ways", ["nope"]),
    ("scripts/bench/gputraining.py", _TRAIN, "--output", PLACES),
]
TABLE += [
    (f"scripts/{folder}/{name}.py", [], option, values)
    for folder, scripts in {"bench": BENCHMARKS, "experiments": EXPERIMENTS}.items()
    for name, options in scripts.items()
    for option, values in options.items()
]


@pytest.fixture
def folder(tmp_path):
    """The working directory, with a file `taken` and an empty folder `folder`."""
    (tmp_path / "taken").write_text("not what anybody wants\n")
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize(
    ("script", "good", "option", "values"), TABLE, ids=[f"{row[0].split('scripts/')[-1]} {row[2]}" for row in TABLE]
)
def test_bad_values_of_an_option(refuses, folder, script, good, option, values):
    for value in values:
        named = option
        if value in ("absent", "folder", "taken", "/dev/null") and option in ("--model", "--checkpoint"):
            named = value
        if option == "--tasks" and value.strip(","):
            named = "task"
        refuses(script, [*good, f"{option}={value}"], named)


SCRIPTS = sorted({row[0] for row in TABLE})


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_options_and_abbreviations(refuses, script):
    refuses(script, ["--nonsense", "1"], "--")
    refuses(script, ["--outp", "out", "--conf", "x", "--mod", "x", "--read", "x"], "--")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_places_that_are_not_writable(refuses, folder, tmp_path):
    (tmp_path / "folder").chmod(0o500)
    try:
        refuses("distill.py", ["--checkpoint", "folder", "--output", "folder/out"], "--output", "not writable")
    finally:
        (tmp_path / "folder").chmod(0o700)


def test_a_prompt_is_needed(refuses, folder):
    refuses("scripts/generate.py", ["--model", "folder"], "--prompt")
    refuses("scripts/generate.py", ["--model", "folder", "--prompt", "\ud800"], "not UTF-8")
    refuses("distill.py", ["--checkpoint", "folder", "--output", "out", "--text", "embedded"], "--verify")


def test_arguments_do_not_reach_the_terminal_as_control_characters(refuses):
    assert "\x1b" not in refuses("train.py", ["--config", "\x1b[31mred"])
