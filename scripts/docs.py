"""Write the pages of docs/ that are generated from the code.

python scripts/docs.py config [--check]
"""

from pathlib import Path

from flash_stu.errors import ArgumentParser, UserError, run_cli
from flash_stu.files import read_text, write_text

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Parse the command line and write the page, or compare it with the code."""
    parser = ArgumentParser(description="Write the pages of docs/ that are generated from the code.")
    parser.add_argument("page", choices=["config"], help="config: all settings of a run")
    parser.add_argument("--check", action="store_true", help="only compare the page with the code")
    arguments = parser.parse_args()

    from flash_stu.training.settings_table import as_markdown

    path = DOCS / f"{arguments.page}.md"
    if not arguments.check:
        write_text(path, as_markdown())
    elif read_text(path) != as_markdown():
        raise UserError(f"{path} is not what the code says; run python scripts/docs.py {arguments.page}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
