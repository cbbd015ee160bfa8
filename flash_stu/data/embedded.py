"""The embedded corpus: the English text inside every Python installation."""

import ast
import functools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from flash_stu.data.split import in_validation

VALIDATION_FRACTION = 0.05
# Tests carry no documentation; distributions ship the others as separate packages, or not at all.
_SKIPPED = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"),
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"),
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def embedded_corpus() -> dict[str, list[str]]:
    """Collect the documentation of the running Python: its language reference and its library's docstrings.

    A document is one pydoc topic, or all docstrings of one standard-library module in the order of its
    source. The modules are parsed, never imported. A docstring that appears again is dropped, so no text is
    in both splits. About 1.9 MB, the same for every run of one Python installation.

    Returns:
        documents of "train" (about 95 %) and "validation", split by the hash of each document.
    """
    corpus: dict[str, list[str]] = {"train": [], "validation": []}
    for document in _documents():
        split = "validation" if in_validation(document, VALIDATION_FRACTION) else "train"
        corpus[split].append(document)
    return corpus


def library_files() -> list[tuple[str, Path]]:
    """List the standard library's documented modules as (name relative to the library, path), sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted((path.relative_to(root).as_posix(), path) for path in files)


def _documents() -> Iterator[str]:
    seen: set[str] = set()

    def new(text: str) -> bool:
        return bool(text) and not (text in seen or seen.add(text))

    for name in sorted(topics):
        if new(topics[name].strip()):
            yield topics[name].strip()
    for _, path in library_files():
        docstrings = [text for text in _docstrings(ast.parse(path.read_bytes())) if new(text)]
        if docstrings:
            yield "\n\n".join(docstrings)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Walk the statements of a module, in source order, and give the docstrings of what it defines."""
    if isinstance(node, _DOCUMENTED):
        yield (ast.get_docstring(node) or "").strip()
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield from _docstrings(child)
