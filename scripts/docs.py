"""Write the pages of docs/ that are generated from the code: config.md, all settings, and api.md, the public names.

python scripts/docs.py [--check]
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.files import write_text
from flash_stu.reading import read_text

DOCS = Path(__file__).parents[1] / "docs"
PACKAGES = (
    "flash_stu",
    "flash_stu.filters",
    "flash_stu.ops",
    "flash_stu.data",
    "flash_stu.training",
    "flash_stu.evaluation",
    "spectralds",
)


def main() -> None:
    """Parse the command line and write the pages, or compare them with the code."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--check", action="store_true", help="only compare the pages with the code")
    arguments = parser.parse_args()

    from flash_stu.training.settings_table import as_markdown

    for name, content in {"config.md": as_markdown(), "api.md": public_names()}.items():
        if not arguments.check:
            write_text(DOCS / name, content)
        elif read_text(DOCS / name) != content:
            raise UserError(f"{DOCS / name} is not what the code says; run python scripts/docs.py")


def public_names() -> str:
    """Returns the docstrings of everything that the packages export, as Markdown."""
    parts = ["# Python API", "Written by `python scripts/docs.py` from the docstrings."]
    seen = set()
    for package in PACKAGES:
        module = import_module(package)
        parts += [f"## {package}", inspect.getdoc(module) or ""]
        for name in module.__all__:
            thing = getattr(module, name)
            if id(thing) not in seen:
                seen.add(id(thing))
                parts += _entries(name, thing)
    return "\n\n".join(parts) + "\n"


def _entries(name: str, thing: object) -> Iterator[str]:
    """Yields headings and docstrings of a name, and of a class's own public methods."""
    yield f"### `{name}{_arguments(thing)}`"
    yield _text(thing)
    for key, method in vars(thing).items() if inspect.isclass(thing) else ():
        if not key.startswith("_") and inspect.isfunction(method) and method.__doc__:
            yield f"#### `{name}.{key}{_arguments(method)}`"
            yield _text(method)


def _arguments(thing: object) -> str:
    if not inspect.isfunction(thing):
        return ""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(thing).parameters.values()
    return f"({', '.join(marks.get(p.kind, '') + p.name for p in parameters if p.name != 'self')})"


def _text(thing: object) -> str:
    return f"```text\n{inspect.cleandoc(thing.__doc__ or '')}\n```"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
