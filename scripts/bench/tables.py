"""Write the tables of benchmarks and experiments into docs/results.md and docs/experiments.md, from what they left.

    python scripts/bench/tables.py [--results results] [--page docs/results.md docs/experiments.md] [--check]

A place for a table is a pair of lines, `<!-- results: cpu/conv-float32 -->` and `<!-- end -->`, the first of them
naming a file below the results folder without its .json: what a script's --output left, its name up to a dash that of
the script. Everything between them is replaced by what the script's `render` makes of the file, or by a file of that
name with .md, which is what evaluate.py leaves. A place whose file is not there stays as it is. --check changes
nothing and exits with 1 if something would change.
"""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

from flash_stu.arguments import input_directory, input_file
from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.files import write_text

BENCH, EXPERIMENTS = (Path(__file__).parents[1] / name for name in ("bench", "experiments"))
BEGIN = "<!-- results: "
PLACE = re.compile(rf"^{BEGIN}(\S+) -->\n((?:(?!{BEGIN}).)*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)


def fill(text: str, results: Path) -> tuple[str, list[str]]:
    """A text with the tables of the results in their places, and the names of the places that have no results.

    Raises:
        UserError: for a place that does not end, or whose name is no script's.
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
    script, known = raw.stem.split("-")[0], renderers()
    if script not in known:
        raise UserError(f"{name!r} names no benchmark, experiment or Markdown file; known: {', '.join(known)}")
    return import_module(script).render(json.loads(raw.read_text())) if raw.is_file() else None


def renderers() -> list[str]:
    """Returns the names of the scripts that have results."""
    scripts = [*BENCH.glob("*.py"), *EXPERIMENTS.glob("*.py")]
    return sorted(path.stem for path in scripts if "\ndef render(" in path.read_text())


def main() -> int:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--results", type=input_directory, default="results", metavar="DIR")
    pages = ["docs/results.md", "docs/experiments.md"]
    parser.add_argument("--page", type=input_file, nargs="+", default=pages, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if something would change")
    args = parser.parse_args()
    sys.path.append(str(EXPERIMENTS))  # as python does for the script that it runs
    before = {path: path.read_text() for path in map(Path, args.page)}
    after = {path: fill(text, Path(args.results)) for path, text in before.items()}
    for path, (text, missing) in after.items():
        for name in missing:
            print(f"{name}: no results in {args.results}; its place stays as it is")
        same = text == before[path]
        print(f"{path}: {'nothing changes' if same else 'tables differ from the results' if args.check else 'updated'}")
        if not (same or args.check):
            write_text(path, text)
    return int(args.check and any(text != before[path] for path, (text, _) in after.items()))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
