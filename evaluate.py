"""Evaluate models with lm-eval-harness and on texts; writes results.json, tables and pictures.

python evaluate.py --model DIR [--model DIR ...] [--tasks LIST] [--limit N] [--data-dir DIR] [--output DIR]
    [--text FILE ...]; or torchrun --nproc-per-node GPUS evaluate.py ...
"""

from flash_stu.arguments import (
    any_path,
    input_directory,
    input_file,
    integer,
    output_directory,
    printable,
)
from flash_stu.errors import ArgumentParser, end_process, run_cli


def main() -> None:
    """Parse the command line, evaluate, and print where the results are."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    model = "model directory, training run, or its checkpoints/step-N; repeatable"
    add("--model", dest="model_dirs", type=any_path, action="append", required=True, metavar="DIR", help=model)
    tasks = "tasks and groups of lm-eval, suites such as paper, comma-separated; "
    tasks += "passkey_N and copy_N for any length of N tokens; "
    tasks += "default: embedded_bpb,embedded_cloze, which like those need no download"
    add("--tasks", metavar="LIST", help=tasks)
    own = "task definitions of your own, in lm-eval's YAML format"
    add("--include-path", type=input_directory, metavar="DIR", help=own)
    text = "txt, jsonl or parquet file to measure bits per byte and perplexity on, also by position; repeatable; "
    text += "without --tasks, nothing else is done"
    add("--text", dest="texts", type=input_file, action="append", default=[], metavar="FILE", help=text)
    window = "tokens in a window; default: twice a model's trained length, or as many as it can take"
    add("--text-length", type=integer(), metavar="N", help=window)
    column = "where jsonl and parquet have the text (%(default)s)"
    add("--text-column", type=printable, default="text", metavar="NAME", help=column)
    first = "score only the first N items of each task, N windows of each text"
    add("--limit", type=integer(), metavar="N", help=first)
    mirror = "local mirror of data sets, see scripts/fetch_eval_data.py"
    add("--data-dir", type=input_directory, metavar="DIR", help=mirror)
    results = "where results go; what is there already is not done again (%(default)s)"
    add("--output", type=output_directory, default="runs/evaluation", metavar="DIR", help=results)
    add("--batch-size", type=integer(), metavar="N", help="sequences per forward pass; default: as many as fit")
    add("--device", metavar="D", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    options = vars(parser.parse_args())

    from flash_stu.distributed import read_launch
    from flash_stu.evaluation import evaluate

    evaluate(**options)
    if read_launch().rank == 0:
        print(f"\nresults: {options['output']}/results.json, table.md, table.csv, pictures")


if __name__ == "__main__":
    end_process(run_cli(main))
