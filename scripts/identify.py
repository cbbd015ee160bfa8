"""Identify a linear dynamical system from a recorded signal.

python scripts/identify.py --data FILE.csv|.npz|.parquet --inputs COLUMNS --outputs COLUMNS --output DIR
"""

from argparse import ArgumentTypeError, Namespace

from flash_stu.arguments import input_file, integer, output_directory, printable
from flash_stu.errors import ArgumentParser, run_cli
from spectralds.identification.options import AUTO, MAX_STATES, METHODS, STATES


def main() -> None:
    """Parse the command line, identify, and print what was found."""
    args = parse()

    from spectralds.identification.directory import POLES, PREDICTION, REPORT, SYSTEM, identify_directory, summary

    report = identify_directory(args.data, args.inputs, args.outputs, args.output, args.method, args.max_states)
    print(f"{summary(report)}\n\nwritten to {args.output}: {SYSTEM}, {REPORT}, {PREDICTION}, {POLES}")


def parse() -> Namespace:
    """Returns the command line."""
    parser = ArgumentParser(description="Identify a linear dynamical system from a recorded signal.")
    add = parser.add_argument
    add("--data", type=input_file, required=True, metavar="FILE", help=".csv, .parquet, or .npz of named arrays")
    add("--inputs", type=columns, required=True, metavar="COLUMNS", help="names, separated by commas")
    add("--outputs", type=columns, required=True, metavar="COLUMNS", help="names, separated by commas")
    add("--output", type=output_directory, required=True, metavar="DIR", help="where system, report and figures go")
    best = "auto: the best of the others on held-out data (default: %(default)s)"
    add("--method", choices=(AUTO, *METHODS), default=AUTO, help=best)
    add("--max-states", type=integer(1, MAX_STATES), default=STATES, metavar="N", help="default: %(default)s")
    return parser.parse_args()


def columns(value: str) -> list[str]:
    """Returns the names of an argument that lists columns."""
    names = printable(value).split(",")
    if "" in names or len(set(names)) != len(names):
        raise ArgumentTypeError(f"{value}: names of columns must not be empty, and none may be there twice")
    return names


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
