"""Replace a model's STU layers by linear dynamical systems: constant time and memory per generated token.

python distill.py --checkpoint RUN_OR_MODEL_DIR --state-dim 160 --output DIR [--method M] [--text FILE]
"""

from functools import partial

from transformers.utils import logging

from flash_stu.errors import ArgumentParser, run_cli
from spectralds.directory import FIGURE, REPORT, distill_directory, summary
from spectralds.fit import METHODS


def main() -> None:
    """Parse the command line, distill, and say what it did to the model."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="training run, or transformers model directory")
    add("--output", required=True, metavar="DIR", help="where the distilled model goes")
    add("--state-dim", type=int, default=160, metavar="N", help="states per layer and channel (%(default)s)")
    add("--method", default=METHODS[0], help=f"{' or '.join(METHODS)} (default: the first)")
    add("--text", metavar="FILE", help="what to compare the models on, or 'embedded'; "
        "default: the validation split of the run, else the embedded corpus")  # fmt: skip
    args = parser.parse_args()
    logging.disable_progress_bar()
    say = partial(print, flush=True)
    report = distill_directory(args.checkpoint, args.output, args.state_dim, args.method, args.text, say)
    print(f"\n{summary(report)}\n\nwritten to {args.output}: the model, {REPORT}, {FIGURE}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
