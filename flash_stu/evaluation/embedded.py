"""Two tasks made from the embedded corpus, for a machine that can download nothing.

Their definitions are the YAML files in tasks/; their data are made here from the corpus' validation documents
and laid out like any local mirror of data sets (see definitions.py).
"""

import atexit
import functools
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import platformdirs

from flash_stu.errors import WriteError
from flash_stu.files import write_text
from flash_stu.reading import DamagedError, read_regular

TASK_FOLDER = Path(__file__).parent / "tasks"
TASK_NAMES = tuple(sorted(path.stem for path in TASK_FOLDER.glob("*.yaml")))

_BPB_DOCUMENT_BYTES = 4096  # a document's beginning: long pages must not crowd out the rest
_BPB_TOTAL_BYTES = 65536
_CLOZE_ITEMS = 200
_CLOZE_CONTEXT = 96  # bytes
_CLOZE_CHOICE = 48  # bytes
_CLOZE_CHOICES = 4


def bpb_documents(documents: Sequence[str], seed: int = 0) -> list[dict]:
    """Choose texts to measure bits per byte on: the first 4 KiB of documents in random order, 64 KiB in all.

    Returns:
        rows {"text": str}.
    """
    rows, total = [], 0
    for index in random.Random(seed).sample(range(len(documents)), len(documents)):
        text = documents[index].encode()[:_BPB_DOCUMENT_BYTES].decode(errors="ignore")
        size = len(text.encode())
        if not text.strip() or total + size > _BPB_TOTAL_BYTES:
            continue
        rows.append({"text": text})
        total += size
    return rows


def cloze_items(documents: Sequence[str], seed: int = 0) -> list[dict]:
    """Cut passages in two and offer the true second half among three from other documents.

    Every choice has 48 bytes, starts with the space before a word and stops at the end of one, so length and
    word boundaries give nothing away. Documents take turns, so that long ones do not dominate.

    Returns:
        at most 200 rows {"context": 96 bytes, "choices": four texts, "label": index of the true one}.
    """
    rng = random.Random(seed)
    cuts = {index: found for index, text in enumerate(documents) if (found := _cuts(text))}
    if len(cuts) < _CLOZE_CHOICES:
        return []
    items, used, sources = [], set(), sorted(cuts)
    while len(items) < _CLOZE_ITEMS:
        before = len(items)
        for index in rng.sample(sources, len(sources)):
            fresh = [cut for cut in cuts[index] if (index, cut) not in used and cut >= _CLOZE_CONTEXT]
            if not fresh or len(items) == _CLOZE_ITEMS:
                continue
            cut = rng.choice(fresh)
            # Passages of one document must not overlap, or one item would give away another.
            used |= {(index, other) for other in fresh if abs(other - cut) < _CLOZE_CONTEXT + _CLOZE_CHOICE}
            others = rng.sample([other for other in sources if other != index], _CLOZE_CHOICES - 1)
            choices = [_choice(documents[index], cut)]
            choices += [_choice(documents[other], rng.choice(cuts[other])) for other in others]
            if len(set(choices)) < _CLOZE_CHOICES:
                continue
            true, label = choices[0], rng.randrange(_CLOZE_CHOICES)
            choices[0], choices[label] = choices[label], true
            context = documents[index][cut - _CLOZE_CONTEXT : cut]
            items.append({"context": context, "choices": choices, "label": label})
        if len(items) == before:
            break
    return items


def _choice(text: str, cut: int) -> str:
    return text[cut : cut + _CLOZE_CHOICE]


def _cuts(text: str) -> list[int]:
    """Positions of the spaces where a choice can start: in plain ASCII, so that characters are bytes."""
    cuts = []
    for cut in range(1, len(text) - _CLOZE_CHOICE):
        if text[cut] != " " or text[cut - 1].isspace() or text[cut + 1].isspace():
            continue
        stop = cut + _CLOZE_CHOICE
        whole_words = text[stop].isspace() and not text[stop - 1].isspace()
        if whole_words and text[max(0, cut - _CLOZE_CONTEXT) : stop].isascii():
            cuts.append(cut)
    return cuts


def write_embedded_data(documents: Sequence[str], cache_dir: Path | None = None) -> Path:
    """Write both tasks' data where they are not there already, byte for byte.

    Args:
        documents: the corpus' validation documents.
        cache_dir: default the user's cache directory. The harness keeps its own converted copy per path, so a
            lasting path keeps that from growing with every run. One that cannot be written is replaced by a temporary
            directory.

    Returns:
        a folder in the layout of a local mirror: flash_stu/embedded/<bpb or cloze>/validation.jsonl.
    """
    files = {
        f"flash_stu/embedded/{name}/validation.jsonl": "".join(json.dumps(row) + "\n" for row in rows)
        for name, rows in (("bpb", bpb_documents(documents)), ("cloze", cloze_items(documents)))
    }
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    folder = (cache_dir or Path(platformdirs.user_cache_dir("flash_stu")) / "evaluation") / digest
    try:
        _complete(folder, files)
    except WriteError:  # a read-only home
        folder = Path(_scratch(), digest)
        _complete(folder, files)
    return folder


def _complete(folder: Path, files: dict[str, str]) -> None:
    """Write those of the files that are not there as they should be."""
    for name, text in files.items():
        with suppress(OSError, DamagedError):
            if read_regular(folder / name) == text.encode():
                continue
        write_text(folder / name, text)


@functools.cache
def _scratch() -> str:
    """A directory that is removed when this process ends."""
    path = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
