"""Write the benchmarks' tables into docs/results.md, from the results they left.

    python scripts/bench/tables.py [--results results] [--page docs/results.md] [--check]

A place for a table is a pair of lines, `<!-- results: cpu/conv-float32 -->` and `<!-- end -->`, the first of them
naming a file below the results folder without its .json: what a benchmark's --output left, its name up to a dash that
of the benchmark. Everything between them is replaced by what the benchmark's `render` makes of the file, or by a file
of that name with .md, which is what evaluate.py leaves. A place whose file is not there stays as it is. --check changes
nothing and exits with 1 if something would change.
"""

import json
import re
from importlib import import_module
from pathlib import Path

from flash_stu.arguments import input_directory, input_file
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.files import write_text

BENCHMARKS = (
    "branches",
    "conv",
    "data",
    "fits",
    "generation",
    "hotspots",
    "imports",
    "layers",
    "lds",
    "loss",
    "optimizers",
    "training",
)
BEGIN = "<!-- results: "
PLACE = re.compile(rf"^{BEGIN}(\S+) -->\n((?:(?!{BEGIN}).)*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)


def fill(text: str, results: Path) -> tuple[str, list[str]]:
    """A text with the tables of the results in their places, and the names of the places that have no results.

    Raises:
        UserError: for a place that does not end, or whose name is no benchmark's.
    """
    missing = []

    def put(place: re.Match) -> str:
        tables = _tables(results, place[1])
        if tables is None:
            missing.append(place[1])
            return place[0]
        return f"{BEGIN}{place[1]} -->\n\n{tables}\n\n<!-- end -->"

    filled, count = PLACE.subn(put, text)
    if count != len(re.findall(rf"^{BEGIN}", text, re.MULTILINE)):
        raise UserError(f"a line that begins with {BEGIN!r} is not complete, or has no {'<!-- end -->'!r} below it")
    return filled, missing


def _tables(results: Path, name: str) -> str | None:
    """The Markdown for a place; None if its results are not there."""
    written, raw = results / f"{name}.md", results / f"{name}.json"
    if written.is_file():
        return written.read_text().strip()
    benchmark = raw.stem.split("-")[0]
    if benchmark not in BENCHMARKS:
        raise UserError(f"{name!r} names no benchmark and no Markdown file; known: {', '.join(BENCHMARKS)}")
    return import_module(benchmark).render(json.loads(raw.read_text())) if raw.is_file() else None


def main() -> int:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--results", type=input_directory, default="results", metavar="DIR")
    parser.add_argument("--page", type=input_file, default="docs/results.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if something would change")
    args = parser.parse_args()
    path = Path(args.page)
    before = path.read_text()
    after, missing = fill(before, Path(args.results))
    for name in missing:
        print(f"{name}: no results in {args.results}; its place stays as it is")
    same = after == before
    print(f"{path}: {'nothing changes' if same else 'tables differ from the results' if args.check else 'updated'}")
    if args.check:
        return int(not same)
    if not same:
        write_text(path, after)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
