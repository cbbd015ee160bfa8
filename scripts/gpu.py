"""The first hour on a GPU, in stages: is it correct, how fast is it, does it train.

    python scripts/gpu.py check                       # correctness, 5 minutes on an H100
    python scripts/gpu.py bench                       # the tables of docs/results.md, 20 minutes
    python scripts/gpu.py train --data DIR            # 340M on real text, 15 minutes: text, or prepared data
    python scripts/gpu.py conv loss                   # some stages
    python scripts/gpu.py --toy bench                 # the same scripts in toy sizes, on a CPU: a dry run

Every stage is a process of its own with a limit of minutes, prints its table and leaves its JSON in --output as it
goes: one that fails or takes too long takes no other with it. Runs from a checkout that is not installed. Exits with 1
if a stage failed. `make gpu-check`, `make bench-gpu` and `make gpu-train` call this.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# modules by the name of their package; datasets, lm-eval, wandb and the optional kernels are not needed here
NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "tiktoken": "tiktoken",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "numpy": "numpy",
    "scipy": "scipy",
    "tabulate": "tabulate",
    "pyarrow": "pyarrow",
    "matplotlib": "matplotlib",
    "platformdirs": "platformdirs",
    "huggingface-hub": "huggingface_hub",
    "packaging": "packaging",
    "tqdm": "tqdm",
    "requests": "requests",
    "pytest": "pytest",
}
TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.sliding_window=16",
    "model.max_position_embeddings=64",
    "model.num_filters=4",
    "train.sequence_length=32",
    "train.global_batch_size=64",
    "train.micro_batch_size=1",
]


class Stage(NamedTuple):
    """A command, below the folder of its script, with its arguments at full and at toy size.

    Attributes:
        minutes: after which it is stopped.
        toy: None if it has no toy size.
        environment: variables of the toy size, or of both.
        output: whether it has an option --output.
    """

    script: str
    full: str
    toy: str | None
    minutes: float = 8
    environment: dict[str, str] = {}
    output: bool = True


_340M = "--config configs/flash_stu_340m.yaml"
_QUICK = "--config configs/quickstart.yaml"
_STEP = "train.global_batch_size=32768"  # one micro batch
GROUPS = {
    "check": {
        "tests": Stage(
            "-m pytest",
            "-k gpu tests/ops tests/model tests/generation",
            "-k gpu tests/generation/test_static_step.py",
            environment={"FLASH_STU_GPU_TESTS": "1"},
            output=False,
        ),
        "agreement": Stage("bench/agreement.py", "", ""),
    },
    "bench": {
        "ceilings": Stage("bench/ceilings.py", "", "--repeats 1"),
        "conv": Stage(
            "bench/conv.py",
            "--dtype bfloat16 --direct-up-to 0",
            "--dtype bfloat16 --lengths 40 --channels 4 --batch 1 --repeats 1",
        ),
        "layers": Stage("bench/layers.py", "--dtype bfloat16", "--lengths 64 --width 32 --batch 1 --repeats 1"),
        "loss": Stage(
            "bench/loss.py",
            "--dtype bfloat16 --tokens 8192 --chunked-tokens 2048 32768",
            "--dtype bfloat16 --tokens 8 --chunked-tokens --hidden 8 --vocabulary 64 --repeats 1",
        ),
        "training": Stage(
            "bench/training.py", f"{_340M} --repeats 3 {_STEP}", " ".join([_QUICK, "--repeats 1", *TINY])
        ),
        "hotspots": Stage("bench/hotspots.py", f"{_340M} {_STEP}", " ".join([_QUICK, "--steps 1", *TINY])),
        "generation": Stage(
            "bench/generation.py",
            f"{_340M} --panels hybrid --state-dims 160 --lengths 512 2048 8192 --repeats 1 --compile",
            f"{_QUICK} --panels layer --state-dims 8 --lengths 3 5 --repeats 1",
        ),
        "lds": Stage(
            "bench/lds.py",
            "--hidden-size 1024",
            "--hidden-size 8 --state-dim 8 --length 32 --loop-tokens 4 --repeats 1",
        ),
        "sweep": Stage(
            "bench/convsweep.py",
            "--minutes 5",
            "--lengths 40 --channels 8 --batch 1 --repeats 1 --minutes 0",
            environment={"TRITON_INTERPRET": "toy"},
        ),
        "tables": Stage("bench/tables.py", "", None, output=False),
    },
    "train": {
        "text": Stage("bench/gputraining.py", "train", "train --toy", minutes=15),
        "resume": Stage("bench/gputraining.py", "resume", "resume --toy"),
        "ways": Stage("bench/gputraining.py", "ways", "ways --toy", minutes=12),
    },
}
STAGES = {name: stage for group in GROUPS.values() for name, stage in group.items()}


def command(name: str, toy: bool, output: str, data: str | None) -> tuple[list[str], dict[str, str]]:
    """Returns the command of a stage and its environment."""
    stage = STAGES[name]
    script = stage.script.split() if stage.script.startswith("-m") else [str(ROOT / "scripts" / stage.script)]
    words = [sys.executable, *script]
    if stage.output:
        words += ["--output", output]
    if name in GROUPS["train"]:
        words += ["--data", str(data)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {key: "1" for key, value in stage.environment.items() if value == "1" or toy}
    arguments = stage.toy if toy else stage.full
    return words + (arguments or "").split(), {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **own}


def run(name: str, toy: bool, output: str, data: str | None) -> dict:
    """Run a stage, its output passed on; returns its status, its minutes and the last line that it printed."""
    words, environment = command(name, toy, output, data)
    print(f"\n=== {name}: {' '.join(words[1:])}", flush=True)
    start, last = time.monotonic(), ""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(60 * STAGES[name].minutes, stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.strip() and not line.startswith("written to"):
                last = line.strip()
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if late.is_set():
        last = f"stopped after {STAGES[name].minutes:g} minutes; what was measured by then is written"
    return {"stage": name, "status": status, "minutes": (time.monotonic() - start) / 60, "last": last}


def missing() -> list[str]:
    """Returns the packages that are needed and not installed."""
    return [package for package, module in NEEDED.items() if importlib.util.find_spec(module) is None]


class Parser(argparse.ArgumentParser):
    """argparse's, with a wrong command line reported in one line; flash_stu's needs packages that may be missing."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main() -> int:
    parser = Parser(description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    names = [*GROUPS, *STAGES]
    parser.add_argument("stages", nargs="+", choices=names, metavar="STAGE", help=f"one of {', '.join(names)}")
    parser.add_argument("--toy", action="store_true", help="in toy sizes; runs without a GPU")
    parser.add_argument("--data", metavar="DIR", help="for train: a folder of text, or prepared data")
    parser.add_argument("--output", metavar="DIR", default="results/gpu", help="where the results go")
    try:
        args = parser.parse_intermixed_args()
    except ValueError as error:
        return fail(f"{error}; see --help")
    names = [name for word in args.stages for name in GROUPS.get(word, [word])]
    if lacking := missing():
        return fail(f"{sys.executable} lacks {', '.join(lacking)}; pip install {' '.join(lacking)}")
    if set(names) & set(GROUPS["train"]) and not (args.data and Path(args.data).exists()):
        return fail(f"--data is {args.data!r}; needed to train: a folder of text, or prepared data")
    import torch

    if not (args.toy or torch.cuda.is_available()):
        return fail("no CUDA GPU is visible; --toy runs the same scripts in toy sizes on the CPU")
    output = Path(args.output).resolve()
    data = args.data and str(Path(args.data).resolve())
    names = [name for name in names if not args.toy or STAGES[name].toy is not None]
    done: list[dict] = []
    for name in names:
        done.append(run(name, args.toy, str(output), data))
        output.mkdir(parents=True, exist_ok=True)
        (output / "stages.json").write_text(json.dumps({"toy": args.toy, "rows": done}, indent=1) + "\n")
    print("\nstage        minutes  result")
    for row in done:
        result = "ok" if row["status"] == 0 else f"FAILED ({row['status']}): {row['last'][:120]}"
        print(f"{row['stage']:<12} {row['minutes']:7.1f}  {result}")
    return int(any(row["status"] for row in done))


def fail(message: str) -> int:
    """Print an error of the user's in one line; returns the exit status for it."""
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
