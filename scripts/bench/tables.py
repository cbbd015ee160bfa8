"""Write the benchmarks' tables into the README, from the results they left.

    python scripts/bench/tables.py [--results results] [--readme README.md] [--check]

A place for a table is a pair of lines, `<!-- results: cpu/conv-float32 -->` and `<!-- end -->`, the first of them
naming a file below the results folder: NAME.json of a benchmark's --output, or else NAME.txt, what one printed.
Everything between them is replaced. --check changes nothing and exits with 1 if something would change.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import conv
import generate
import hotspots
import layers
from measuring import describe

import train
from flash_stu.errors import ArgumentParser, UserError, run_cli

PLACE = re.compile(r"^<!-- results: (\S+) -->\n.*?^<!-- end -->$", re.DOTALL | re.MULTILINE)


def with_environment(render: Callable[[dict], str]) -> Callable[[dict], str]:
    """Its table under a line that says where the figures come from."""
    return lambda results: describe(results["environment"]) + "\n\n" + render(results)


def of_training(results: dict) -> str:
    """The tables of train.py, which prints them."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for path, result in results.items():
            train.print_tables(Path(path).stem, result)
    return printed.getvalue().strip()


def of_generation(results: dict) -> str:
    """The tables of generate.py, whose JSON has the lengths as strings."""
    parts = [results["settings"]]
    for name, group in results["results"].items():
        lengths = list(next(iter(group.values()))["tokens_per_second"])
        parts.append(f"{generate.PANELS.get(name, name)}: seconds to generate")
        head = "| |" + "".join(f" {n} |" for n in lengths) + " tokens/s at the end | weights allow | share |"
        rows = [generate.row(label, figures, lengths) for label, figures in group.items()]
        parts.append("\n".join([head, "|:--|" + "--:|" * (len(lengths) + 3), *rows]))
    return "\n\n".join(parts)


RENDER = {
    "conv": with_environment(conv.render),
    "layers": with_environment(layers.render),
    "hotspots": with_environment(hotspots.render),
    "train": of_training,
    "generate": of_generation,
}


def render(folder: Path, name: str) -> str:
    """The Markdown for the results called `name`.

    Raises:
        UserError: if there are none, or nothing here knows how to show them.
    """
    path, text = folder / f"{name}.json", folder / f"{name}.txt"
    if not path.is_file():
        if text.is_file():
            return text.read_text().strip()
        raise UserError(f"the README has a place for {name!r}, but there is neither {path} nor {text}")
    kind = path.stem.split("-")[0]
    if kind not in RENDER:
        raise UserError(f"{path}: no table is known for {kind!r}; known: {', '.join(RENDER)}")
    return RENDER[kind](json.loads(path.read_text()))


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default="results", metavar="DIR")
    parser.add_argument("--readme", default="README.md", metavar="FILE")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = Path(args.readme)
    if not path.is_file():
        raise UserError(f"--readme {path}: no such file")
    before = path.read_text()

    def fill(place: re.Match) -> str:
        return f"<!-- results: {place[1]} -->\n\n{render(Path(args.results), place[1])}\n\n<!-- end -->"

    after, places = PLACE.subn(fill, before)
    print(f"{places} tables in {path}, {'nothing changes' if after == before else 'some change'}")
    if args.check:
        return int(after != before)
    if after != before:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(after)
        os.replace(temporary, path)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
