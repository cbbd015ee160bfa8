"""Start-up times: imports and --help, beside the libraries that they need.

    python scripts/bench/imports.py [--repeats 5] [--output results/cpu]

Every row is a process of its own; processor time too, since a busy machine makes the rest wait. All take turns.
"""

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from measuring import seconds, take_turns
from plots import bars

from flash_stu.arguments import integer, output_directory
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.results import environment, finish, page, spread, table

CPU = torch.device("cpu")
_LIBRARIES = "import torch\nfrom transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel"
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "torch, and transformers' model classes": ["-c", _LIBRARIES],
    "import flash_stu": ["-c", "import flash_stu"],
    "import flash_stu, and its model classes": ["-c", "from flash_stu import FlashSTUForCausalLM"],
    "train.py --help": ["train.py", "--help"],
    "distill.py --help": ["distill.py", "--help"],
    "evaluate.py --help": ["evaluate.py", "--help"],
}


def start(arguments: list[str]) -> list[float]:
    """Run Python; returns seconds until it ends, and of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = partial(subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    taken = seconds(run, CPU)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return [taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime]


def render(results: dict) -> str:
    """A table of the times."""
    rows = [
        [row["what"], spread([wall for wall, _ in row["seconds"]], 1), spread([cpu for _, cpu in row["seconds"]], 1)]
        for row in results["rows"]
    ]
    return page(results, table(["start", "s", "of processor time"], rows))


def plot(results: dict, path: Path) -> None:
    bars({"s": {row["what"]: [wall for wall, _ in row["seconds"]] for row in results["rows"]}}, path)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--repeats", type=integer(1, 100), default=5)
    parser.add_argument("--output", type=output_directory, metavar="DIR", help="write imports.json and .png there")
    args = parser.parse_args()
    taken = take_turns({what: partial(start, command) for what, command in COMMANDS.items()}, args.repeats, 600.0)
    rows = [{"what": what, "seconds": samples} for what, samples in taken.items()]
    finish("imports", {"environment": environment(CPU), "rows": rows}, render, plot, args.output)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
