"""Train the 340M model on real text for some minutes, kill and resume it, and take a few steps in every way there is.

    python scripts/bench/gputraining.py train --data DIR [--minutes 6] [--output results/gpu]    # loss curve, MFU
    python scripts/bench/gputraining.py resume --data DIR                                        # killed, and resumed
    python scripts/bench/gputraining.py ways --data DIR                     # FSDP, DDP, Muon, checkpointing

DIR holds text, or prepared data (train/ and validation/ of shards). Runs are those of train.py, in processes of their
own, below --runs; FSDP and DDP under torchrun with all GPUs there are, one is enough. `resume` exits with 1 if the run
does not continue from its checkpoint, or a loss after it differs from the one before the kill by more than the GPU's
sums in another order explain (1 %). --toy takes a tiny model, bytes and the CPU.
"""

import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from flash_stu.arguments import any_path, input_directory, integer, number, output_directory
from flash_stu.devices import default_device
from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.figures import save_figure
from flash_stu.results import environment, failure_cells, finish, page, panels, save, table
from flash_stu.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
FULL = [
    "train.global_batch_size=131072",
    "train.validation_every=100",
    "train.validation_tokens=524288",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=100",
    "data.tokenizer=tiktoken:o200k_base",
    "data.validation_fraction=0.1",
]
TOY = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.sliding_window=16",
    "model.max_position_embeddings=64",
    "model.num_filters=4",
    "train.sequence_length=32",
    "train.global_batch_size=128",
    "train.micro_batch_size=2",
    "train.validation_tokens=256",
    "data.tokenizer=bytes",
    "data.validation_fraction=0.3",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=2",
    "optimizer.name=adamw",
]
# processes (None: no torchrun; 0: one for each GPU) and settings
WAYS: dict[str, tuple[int | None, list[str]]] = {
    "one process": (None, []),
    "FSDP": (0, ["parallel.strategy=fsdp"]),
    "DDP": (0, ["parallel.strategy=ddp"]),
    "Muon": (None, ["optimizer.name=muon"]),
    "selective checkpointing": (None, ["train.activation_checkpointing=selective"]),
    "full checkpointing": (None, ["train.activation_checkpointing=full"]),
    "not compiled": (None, ["train.compile=false"]),
}
ENDLESS = 1_000_000  # steps
RESUMED = 0.01  # relative difference of a loss that sums in another order explain


class Run:
    """A run of train.py in a directory.

    Args:
        args: of the command line.
        folder: the run directory.
        settings: beside those of the command line's size.
        processes: under torchrun; 0 for one per GPU, None for none.
    """

    def __init__(self, args: Namespace, folder: Path, settings: list[str], processes: int | None = None) -> None:
        self.folder = folder
        self.processes = processes if processes is None else processes or max(1, torch.cuda.device_count())
        self.log = folder.with_name(f"{folder.name}.log")
        launcher = [] if self.processes is None else ["-m", "torch.distributed.run", "--standalone"]
        launcher += [] if self.processes is None else [f"--nproc-per-node={self.processes}"]
        common = ["wandb.mode=disabled", f"data.dataset={args.data}", f"data.cache_dir={args.runs}/tokens"]
        strategy = [] if processes is not None else ["parallel.strategy=none"]
        sizes = TOY if args.toy else FULL
        overrides = [f"output_dir={folder}", *common, *strategy, *sizes, *args.overrides, *settings]
        self.command = [sys.executable, *launcher, str(ROOT / "train.py"), "--config", args.config, *overrides]

    def start(self) -> subprocess.Popen:
        """Start it in the background, its output appended to the log."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:
            return subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )

    def until(self, reached: Callable[[], bool], number: signal.Signals, patience: float = 600) -> int:
        """Run until something is reached, then send a signal to all its processes; returns the status.

        It ends by itself when it fails, and is killed when nothing is reached for so many seconds.
        """
        process, start = self.start(), time.monotonic()
        while process.poll() is None and not reached() and time.monotonic() < start + patience:
            time.sleep(0.1)
        if process.poll() is None:
            os.killpg(process.pid, number if reached() else signal.SIGKILL)
        return process.wait()

    def records(self) -> list[dict]:
        """The steps that are logged."""
        return [record for record in read_metrics(self.folder / "metrics.jsonl") if "loss" in record]

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        errors = [line for line in lines if line.startswith("error:")] or [line for line in lines if "Error:" in line]
        return (errors or lines or ["see above"])[-1].strip()[:160]

    def row(self, what: str, status: int) -> dict:
        """Returns the outcome: speed after the first two steps, which compile."""
        records = self.records()
        row: dict = {"what": what, "processes": self.processes or 1, "steps": len(records)}
        if status or not records:
            return row | {"failed": f"status {status}: {self.last_line()}"}
        warm = records[2:] or records
        mfu = [record["mfu"] for record in warm if record["mfu"] is not None]
        return row | {
            "tokens_per_second": statistics.median(record["tokens_per_second"] for record in warm),
            "mfu": statistics.median(mfu) if mfu else None,
            "memory_gib": max(record["memory_gib"] for record in records),
            "losses": [[record["step"], record["loss"]] for record in records],
        }


def train(args: Namespace, results: dict) -> int:
    """Prepare the data, then train for some minutes and stop as a cluster's scheduler would."""
    run = Run(args, Path(args.runs, "train"), [f"train.steps={ENDLESS}", f"train.checkpoint_every={ENDLESS}"])
    start = time.monotonic()
    prepare = [sys.executable, str(ROOT / "scripts/prepare_data.py"), *run.command[run.command.index("--config") :]]
    status = subprocess.run(prepare, cwd=ROOT).returncode
    results["seconds_to_prepare"] = time.monotonic() - start
    first: list[float] = []

    def enough() -> bool:
        if not first and run.records():
            first.append(time.monotonic())
        return bool(first) and time.monotonic() > first[0] + 60 * args.minutes

    status = status or run.until(enough, signal.SIGTERM, patience=60 * args.minutes + 600)
    results["rows"].append(run.row(f"{args.minutes:g} minutes", status))
    return status


def resume(args: Namespace, results: dict) -> int:
    """Kill a run some steps after a checkpoint, resume it, and compare the losses of the steps that it took twice."""
    every, checkpoints = 4, Path(args.runs, "resume", "checkpoints")
    run = Run(args, checkpoints.parent, [f"train.steps={ENDLESS}", f"train.checkpoint_every={every}"])

    def past_a_checkpoint() -> bool:
        saved = [int(path.name[5:]) for path in checkpoints.glob("step-*") if path.name[5:].isdigit()]
        return bool(saved) and len(run.records()) >= max(saved) + 2

    run.until(past_a_checkpoint, signal.SIGKILL)
    before = {record["step"]: record["loss"] for record in run.records()}
    status = run.until(lambda: len(run.records()) >= max(before, default=0) + 2, signal.SIGTERM)
    after = {record["step"]: record["loss"] for record in run.records()}
    continued = [line for line in run.log.read_text(errors="replace").splitlines() if line.startswith("continuing")]
    row = run.row(continued[0] if continued else "did not continue from a checkpoint", status)
    since = int(continued[0].split("after step ")[1].split()[0]) if continued else 0
    twice = [step for step in before if step > since and step in after]
    worst = max((abs(after[step] / before[step] - 1) for step in twice), default=math.inf)
    results["resumed"] = {"after": since, "killed_at": max(before, default=0), "difference": worst}
    results["rows"].append(row)
    return status or int(not continued or worst > RESUMED)


def ways(args: Namespace, results: dict) -> int:
    """Take a few steps in every way; what they write is not kept."""
    every = [f"train.{key}={args.steps}" for key in ("steps", "validation_every", "checkpoint_every")]
    statuses = []
    Path(args.runs).mkdir(parents=True, exist_ok=True)
    for name in args.ways:
        processes, settings = WAYS[name]
        print(name, flush=True)
        with tempfile.TemporaryDirectory(dir=args.runs) as folder:
            run = Run(args, Path(folder, "run"), [*every, "optimizer.warmup_steps=2", *settings], processes)
            statuses.append(run.until(lambda: False, signal.SIGTERM))
            results["rows"].append(run.row(name, statuses[-1]))
        save("gputraining-ways", results, args.output)
    return max(statuses)


def render(results: dict) -> str:
    """One table, and what resuming changed."""
    rows = []
    for row in results["rows"]:
        cells = [row["what"], str(row["processes"]), str(row["steps"])]
        if "failed" in row:
            rows.append([*cells, *failure_cells(row, 5)])
            continue
        losses = [loss for _, loss in row["losses"]]
        figures = [f"{row['tokens_per_second']:,.0f}", "" if row["mfu"] is None else f"{row['mfu']:.1%}"]
        rows.append([*cells, *figures, f"{row['memory_gib']:.1f} GiB", _loss(losses[0]), _loss(losses[-1])])
    header = ["run", "processes", "steps", "tokens/s", "MFU", "memory", "first loss", "last loss"]
    text = f"{Path(results['config']).stem}, {'toy size' if results['toy'] else Path(results['data']).name}."
    if resumed := results.get("resumed"):
        text += (
            f" Killed after step {resumed['killed_at']}, continued after step {resumed['after']}: the losses of steps "
            f"taken twice differ by {resumed['difference']:.1e} at most, relative."
        )
    return page(results, text, table(header, rows))


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"


def plot(results: dict, path: Path) -> None:
    figure, (axes,) = panels(height=5)
    for row in results["rows"]:
        if losses := [(step, loss) for step, loss in row.get("losses", []) if loss is not None]:
            axes.plot(*zip(*losses, strict=True), label=row["what"], linewidth=1.2)
            axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel="step", ylabel="training loss, nats per token")
    save_figure(figure, path)


PARTS = {"train": train, "resume": resume, "ways": ways}


def main() -> int:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--data", type=input_directory, required=True, metavar="DIR", help="a folder of text, or prepared data")
    add("--config", type=any_path, help="default: configs/flash_stu_340m.yaml")
    add("--minutes", type=number(0, 1e4), help="of training (default: 6)")
    add("--steps", type=integer(3), default=12, help="of each way")
    add("--ways", choices=WAYS, nargs="+", default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    add("--toy", action="store_true", help="a tiny model on bytes, on the CPU too")
    add("--runs", type=output_directory, metavar="DIR", help="where the runs go (default: runs/gpu)")
    add("--set", dest="overrides", nargs="+", default=[], metavar="section.key=value", help="settings of every run")
    add("--output", type=output_directory, metavar="DIR", help="write gputraining-PART.json and .png there")
    args = parser.parse_args()
    args.config = args.config or str(ROOT / "configs" / ("quickstart.yaml" if args.toy else "flash_stu_340m.yaml"))
    args.minutes = (0.02 if args.toy else 6) if args.minutes is None else args.minutes
    args.data = str(Path(args.data).resolve())
    with tempfile.TemporaryDirectory() as scratch:  # of a toy nothing is kept
        args.runs = str(Path(args.runs or (scratch if args.toy else "runs/gpu")).resolve())
        results = {"environment": environment(default_device()), "toy": args.toy, "config": args.config}
        results |= {"data": args.data, "rows": []}
        status = PARTS[args.part](args, results)
    finish(f"gputraining-{args.part}", results, render, plot, args.output)
    return int(status != 0)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
