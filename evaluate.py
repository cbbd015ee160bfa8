"""Evaluate models with lm-eval-harness; writes results.json and table.md.

python evaluate.py --model DIR [--model DIR ...] [--tasks LIST] [--limit N] [--data-dir DIR] [--output DIR]
"""

from flash_stu.errors import ArgumentParser, run_cli
from flash_stu.evaluation import evaluate


def main() -> None:
    """Parse the command line, evaluate, and say where the results are."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", action="append", required=True, metavar="DIR", help="model or training run; repeatable")
    add("--tasks", metavar="LIST", help="tasks and groups of lm-eval, suites of configs/eval such as paper, "
        "comma-separated; default: embedded_bpb,embedded_cloze, which need no download")  # fmt: skip
    add("--limit", type=int, metavar="N", help="score only the first N items of each task")
    add("--data-dir", metavar="DIR", help="local mirror of data sets: <id>/<config or default>/<split>.jsonl")
    add("--output", default="runs/evaluation", metavar="DIR", help="where results go (%(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences per forward pass (%(default)s)")
    add("--device", metavar="D", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    args = parser.parse_args()
    evaluate(args.model, args.tasks, args.limit, args.data_dir, args.output, args.batch_size, args.device)
    print(f"\nresults: {args.output}/results.json, {args.output}/table.md")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
