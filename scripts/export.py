"""Write a step of a training run as a transformers model directory.

python scripts/export.py --run RUN [--step N] --output DIR
"""

from flash_stu.arguments import input_directory, integer, output_directory
from flash_stu.errors import ArgumentParser, run_cli


def main() -> None:
    """Parse the command line and export."""
    parser = ArgumentParser(description="Write a step of a training run as a transformers model directory.")
    parser.add_argument(
        "--run", type=input_directory, required=True, metavar="DIR", help="run directory; it may be training still"
    )
    parser.add_argument("--step", type=integer(), metavar="N", help="which checkpoint (default: the newest)")
    parser.add_argument(
        "--output", type=output_directory, required=True, metavar="DIR", help="where the model directory goes"
    )
    arguments = parser.parse_args()

    from flash_stu.training.model_source import export_checkpoint, find_checkpoint

    path = find_checkpoint(arguments.run, arguments.step)
    export_checkpoint(path, arguments.output)
    print(f"{path} written to {arguments.output}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
