"""Replace a model's STU layers by linear dynamical systems: constant time and memory per generated token.

python distill.py --checkpoint RUN_OR_CHECKPOINT_OR_MODEL_DIR --output DIR [--state-dim N|auto] [--verify]
"""

import sys
from argparse import Namespace
from functools import partial

from flash_stu.arguments import any_path, integer, number, output_directory
from flash_stu.errors import ArgumentParser, UserError, run_cli
from spectralds.options import AUTO, DTYPES, MAX_STATE_DIM, METHODS, TOLERANCE, VERIFY_TOLERANCE


def main() -> int:
    """Parse the command line, distill, and print what that changed in the model."""
    args = parse()

    from transformers.utils import logging

    from spectralds.directory import FIGURE, REPORT, distill_directory, summary

    logging.disable_progress_bar()
    report = distill_directory(
        checkpoint=args.checkpoint,
        output=args.output,
        state_dim=args.state_dim,
        method=args.method,
        tolerance=args.tolerance,
        dtype=args.dtype,
        verify=args.verify,
        text=args.text,
        say=partial(print, flush=True),
    )
    print(f"\n{summary(report)}\n\nwritten to {args.output}: the model, {REPORT}, {FIGURE}", flush=True)
    if report["verified"] is False:
        found = report["comparison"]["relative_logit_difference"]
        problem = f"the logits' relative difference is {found:.2e}; --verify allows {args.verify:g}"
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def parse() -> Namespace:
    """Returns the command line."""
    parser = ArgumentParser(description="Replace a model's STU layers by linear dynamical systems.")
    add = parser.add_argument
    model = "model directory, training run, or its checkpoints/step-N"
    add("--checkpoint", type=any_path, required=True, metavar="DIR", help=model)
    add("--output", type=output_directory, required=True, metavar="DIR", help="where the distilled model goes")
    states = "states per layer and channel, or auto (default: %(default)s)"
    add("--state-dim", type=state_dim, default=160, metavar="N", help=states)
    error = "for auto: relative error of the impulse responses, in float32 (default: %(default)s)"
    add("--tolerance", type=number(0, 1, above=True), default=TOLERANCE, metavar="T", help=error)
    add("--method", choices=(AUTO, *METHODS), default=AUTO, help="auto: the best of the others (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="of the weights written (default: as they are)")
    verify = """compare logits, validation loss and generated tokens with the original's; exit with 1 if the logits'
        relative difference exceeds T (default: %(const)s)"""
    add("--verify", type=number(0, 1e6), nargs="?", const=VERIFY_TOLERANCE, metavar="T", help=verify)
    text = """for --verify: what to compare on, or 'embedded'; default: the validation split of the run, else the
        embedded corpus"""
    add("--text", type=any_path, metavar="FILE", help=text)
    args = parser.parse_args()
    if args.text is not None and args.verify is None:
        raise UserError("--text says what to compare the models on: it goes with --verify")
    return args


def state_dim(value: str) -> int | str:
    """Returns an argument that is a number of states, or "auto"."""
    return AUTO if value == AUTO else integer(2, MAX_STATE_DIM)(value)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
