"""The main job from end to end on the embedded corpus: train, distill, evaluate, generate; minutes on a laptop's CPU.

    make quickstart        or: python scripts/quickstart.py [--config configs/quickstart.yaml]

Every stage is one of the project's own commands, printed before it runs, so that each can be repeated alone. Stages
whose results are there already are not run again.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

from flash_stu.arguments import any_path
from flash_stu.errors import ArgumentParser, UserError, run_cli

ROOT = Path(__file__).parents[1]
PROMPT = "Return a list of the "


def main() -> None:
    """Parse the command line and run the stages."""
    parser = ArgumentParser(description="Train, distill, evaluate and generate on the embedded corpus.")
    parser.add_argument("--config", type=any_path, default="configs/quickstart.yaml", help="a run")
    args = parser.parse_args()
    started = time.perf_counter()

    from flash_stu.training import load_config

    config = load_config(ROOT / args.config)
    run = Path(config.output_dir)
    lds, results, bench = run / "distilled", run / "evaluation", run / "generation"
    longest = config.model["max_position_embeddings"]
    lengths = (256, longest - 256)

    stage("1/4 train", "train.py", "--config", args.config)
    call("scripts/plot_run.py", run, "--output", run / "loss.png")
    stage("2/4 distill", "distill.py", "--checkpoint", run, "--state-dim", 160, "--output", lds, "--verify")
    stage("3/4 evaluate", "evaluate.py", "--model", run, "--model", lds, "--output", results)
    stage(
        "4/4 generate",
        *("scripts/bench/generation.py", "--model", run, "--model", lds, "--lengths", *lengths, "--repeats", 1),
        *("--output", bench),
    )
    call("scripts/generate.py", "--model", lds, "--prompt", PROMPT, "--max-new-tokens", 300)

    print(f"\n{'=' * 100}\n{summary(run, lds, results, bench, lengths)}")
    print(f"\nmodel              {run / 'final'}")
    print(f"distilled model    {lds}")
    print(f"scores             {results / 'table.md'}")
    print(f"plots              {run / 'loss.png'}, {lds / 'distillation.png'}, {bench / 'generation.png'}")
    print(f"another sample     python scripts/generate.py --model {lds} --prompt '{PROMPT}'")
    print(f"\nall of it took {(time.perf_counter() - started) / 60:.1f} minutes")


def stage(title: str, *command: object) -> None:
    """Announce a stage and run it."""
    print(f"\n{'-' * 100}\n{title}", flush=True)
    call(*command)


def call(*command: object) -> None:
    """Run one of the project's scripts in this interpreter's environment.

    Raises:
        UserError: if it fails; what it printed says why.
    """
    words = [str(word) for word in command]
    print("$ python " + " ".join(f"'{w}'" if " " in w else w for w in words), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise UserError(f"{words[0]} failed; see above")


def summary(run: Path, lds: Path, results: Path, bench: Path, lengths: tuple[int, int]) -> str:
    """Returns the closing table, from the files that the stages wrote."""
    before = json.loads((ROOT / lds / "distillation.json").read_text())["comparison"]
    scores = json.loads((ROOT / results / "results.json").read_text())["models"]
    generation = json.loads((ROOT / bench / "generation.json").read_text())["rows"]
    rates = {row["label"]: dict(row["rates"]) for row in generation}
    rows = [["", "STU", f"distilled, {_state_dim(lds)} states"]]
    losses = [before["validation_loss_before"], before["validation_loss_after"]]
    rows.append(["validation loss, nats per byte", *(f"{loss:.6f}" for loss in losses)])
    for name in next(iter(scores.values()))["tasks"]:
        tasks = [model["tasks"][name] for model in scores.values()]
        cells = [f"{t['value']:.4f}" + (f" ± {t['stderr']:.4f}" if t["stderr"] else "") for t in tasks]
        rows.append([f"{name} ({tasks[0]['metric']})", *cells])
    for length in lengths:
        medians = (statistics.median(rates[str(model)][length]) for model in (run, lds))
        rows.append([f"tokens/s after {length} tokens", *(f"{median:.0f}" for median in medians)])
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=("left", "right", "right"))


def _state_dim(lds: Path) -> int:
    return json.loads((ROOT / lds / "config.json").read_text())["lds_state_dim"]


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
